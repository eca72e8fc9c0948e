"""One tiny world for every test: a data set with a planted signal, its films, tiny video decoders of both families,
and finished runs. No two of its sizes that could be taken for each other are equal."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from brain_model import BrainModel
from data import Clips
from evaluate import CineNeuron
from heads import Stage1Heads
from prepare.copies import prepare_copies, prepare_recorded
from prepare.decoder import prepare_decoder
from prepare.release import Release
from support import shared
from support.files import write_json, writing_array
from support.videos import write_video

T, N, F, D = 2, 40, 5, 20  # volumes, voxels, frames of CLIP, its width
L, WIDTH, D_TXT = 12, 24, 16  # text tokens, D', the text's width
SIZE, LATENT = (9, 32, 48), (4, 3, 4, 6)  # F, H, W -> C, f, h, w
SEGMENTS = {"train": ["seg1", "seg2", "seg3"], "test": ["test1", "test2"]}
LENGTH = {"train": 15, "test": 13}  # clips a segment
WORDS = "red blue a circle square grows moves".split()
AREAS = ["L_V1", "R_FFC", "L_MST", "hippocampus_left", "R_4"]  # of the voxels in turn; R_4 is motor cortex
CLASSES = ["person", "animal", "vehicle", "other"]
COLOURS, SHAPES = ("red", "blue"), ("circle", "square")
STAGE1_CONFIG = dict(
    data="cc2017", subject=1, rois=None, val_segments=None, dropout=0.1, precision="fp32", tau=0.2, lambda_1=0.7,
    lambda_2=0.4, step=9, steps_in_all=9,
    sizes={"volumes": T, "voxels": N, "frames": F, "embed_dim": D, "classes": 4},
)  # fmt: skip
SETTINGS = dict(
    data="cc2017", subject=1, seed=0, mom=True, integration=True, K=3, alpha=1.0, attention_heads=4, frames=SIZE[0],
    height=SIZE[1], width=SIZE[2], lora_rank=4, lora_alpha=8, noise_shift=1.0, checkpointing=False, precision="fp32",
    sampling_steps=2, guidance=2.0, sample_every=0, step=6, steps_in_all=6, stage1_config=STAGE1_CONFIG,
)  # fmt: skip


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def write_prepared(
    root: Path, clips=(48, 24), segments=(3, 2), N=40, T=1, D=16, F=3, hidden_numbers=4, copies=0
) -> Path:
    """root/cc2017 as the contract has it (2 and 3 showings, the last of the last training segment not recorded), with
    so many clips and segments of training and test. Returns root/cc2017.

    fMRI and embeddings are linear in the same `hidden_numbers` a clip, so that one can be read from the
    other. The first `copies` clips of the first segment have the frames of the first of the last segment.
    """
    rng, folder = np.random.default_rng(0), root / "cc2017"
    to_fmri, to_text, to_action = (rng.normal(size=(hidden_numbers, k)) for k in (T * N, D, D))

    def save(path: Path, array: np.ndarray, **recipe) -> None:
        with writing_array(path, array.shape, str(array.dtype), recipe) as out:
            out[:] = array

    for split, n, parts, repeats in (("train", clips[0], segments[0], 2), ("test", clips[1], segments[1], 3)):
        length, prefix = n // parts, {"train": "seg", "test": "test"}[split]
        hidden = rng.normal(size=(n, hidden_numbers))
        if split == "train":
            hidden[:copies] = hidden[-length:][:copies]
        noise = 0.3 * hidden_numbers**0.5 * rng.normal(size=(n, repeats, T, N))
        fmri = (hidden @ to_fmri).reshape(n, 1, T, N) + noise
        fmri = (fmri - fmri.mean(0)) / fmri.std(0)
        moves = (np.arange(n) >= copies)[:, None, None]
        frames = hidden[:, None] + 0.1 * rng.normal(size=(n, F, hidden_numbers)) * moves
        if split == "train":
            fmri[-length:, -1] = np.nan
            frames[:copies] = frames[-length:][:copies]
        labels = (hidden[:, :4] > 0.5).astype(np.uint8)
        save(folder / "sub1" / split / "fmri.npy", fmri.astype(np.float32), subject=1)
        stimuli = folder / "stimuli" / split
        save(stimuli / "e_img.npy", unit(frames @ to_text), clip="planted")
        save(stimuli / "e_txt.npy", unit(hidden @ to_text), clip="planted")
        save(stimuli / "e_act.npy", unit(hidden @ to_action), viclip="planted")
        save(stimuli / "categories.npy", labels, classes=CLASSES)
        with open(stimuli / "clips.jsonl", "w") as file:
            for i, row in enumerate(labels):
                segment, k = f"{prefix}{i // length + 1}", i % length
                clip = {"id": f"{segment}-{k:03d}", "segment": segment, "video": f"{segment}.mp4"}
                clip |= {"start_s": 2.0 * k, "caption": f"clip {i}", "tags": []}
                clip["categories"] = [CLASSES[m] for m in np.flatnonzero(row)]
                file.write(json.dumps(clip) + "\n")
    roi = np.array([AREAS[i % len(AREAS)] for i in range(N)])
    np.savez(folder / "sub1" / "voxels.npz", index=np.arange(N) * 7, roi=roi)
    prepare_copies(folder / "stimuli")
    prepare_recorded(folder / "sub1")
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    words = "<pad> </s> <unk> a red blue circle square grows moves".split()
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=L, **special)


TEXT = dict(vocab_size=16, d_model=D_TXT, d_kv=8, d_ff=32, num_layers=1, num_heads=2)


def wan_pipeline(**vae) -> diffusers.WanPipeline:
    """Tiny Wan2.1: VAE 8x in space and 4x in time, UniPC with the published settings."""
    moments = dict(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0])
    shape = dict(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    shape["temperal_downsample"] = [False, True, True]
    return diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(**TEXT)).eval(),
        vae=diffusers.AutoencoderKLWan(**(shape | moments | vae)),
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, ffn_dim=32,
            text_dim=D_TXT, freq_dim=32, num_layers=2, rope_max_seq_len=32,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    )  # fmt: skip


def cogvideox_pipeline() -> diffusers.CogVideoXPipeline:
    """Tiny CogVideoX 5B: rotary embeddings, v-prediction, zero terminal SNR."""
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=T5EncoderModel(T5Config(**TEXT)).eval(),
        vae=diffusers.AutoencoderKLCogVideoX(
            scaling_factor=0.7, block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1,
            norm_num_groups=2,
        ),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2,
            text_embed_dim=D_TXT, time_embed_dim=8, use_rotary_positional_embeddings=True,
            sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=L,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
            clip_sample=False,
        ),
    )  # fmt: skip


# -- the world ---------------------------------------------------------------------------------------------


class Films(Release):
    """A source of moving bars, one a clip, for the prepared clips."""

    splits = SEGMENTS

    def __init__(self, root: Path):
        self.root = root

    def stimulus(self, segment: str) -> list[Path]:
        (path := self.root / f"{segment}.mp4").write_text(segment)
        return [path]

    def read_clips(self, segment: str) -> Iterator[np.ndarray]:
        for k in range(LENGTH["test" if segment.startswith("test") else "train"]):
            clip = np.full((20, 40, 60, 3), 40, np.uint8)
            for t, frame in enumerate(clip):
                frame[:, (t + 3 * k) % 60 :][:, :8, k % 3] = 230
            yield clip


def away_from_zero(model: nn.Module, std: float = 0.3) -> None:
    """LoRA and zero-convolutions start at zero, where nothing of them can be seen."""
    for name, p in model.named_parameters():
        if ".Z_" in name or "lora_B" in name:
            nn.init.normal_(p, std=std)


def write_stage1(root: Path, run: str = "full-s0", voxels=N, tokens=L, seed=1, **changes) -> None:
    """A finished stage 1: random weights, a φ_v that is no plain mean, a φ_a that is not zero."""
    folder = root / "runs" / "cc2017" / "sub1" / run / "stage1"
    torch.manual_seed(seed)
    heads = Stage1Heads(D, F, len(CLASSES))
    nn.init.normal_(heads.phi_v.mix.weight)
    nn.init.normal_(heads.phi_a.mlp[3].weight, std=0.3)
    BrainModel(voxels, T, tokens, WIDTH, 2, 4, D, 4).save_pretrained(folder / "brain_model")
    heads.save_pretrained(folder / "heads")
    config = STAGE1_CONFIG | {"sizes": STAGE1_CONFIG["sizes"] | {"voxels": voxels}} | changes
    write_json(folder / "config.json", config)


def new_stage2(root: Path, decoder: str = "wan", **changes) -> CineNeuron:
    """A stage 2 on top of a finished stage 1, its LoRA and zero-convolutions away from zero."""
    settings = SETTINGS | {"decoder": str(root / "models" / decoder)} | changes
    train = Clips("cc2017", 1, "train", None, settings["decoder"], SIZE, root / "data")
    torch.manual_seed(0)
    model = CineNeuron.from_stage1(root / "runs/cc2017/sub1/full-s0/stage1", settings, train)
    away_from_zero(model)
    return model


def write_stage2(root: Path, run: str = "full-s0", **changes) -> None:
    """A finished one."""
    model, folder = new_stage2(root, **changes), root / "runs/cc2017/sub1" / run / "stage2"
    for name, write in shared.writers(model).items():
        write(folder / name)
    shared.write_memories(folder, model)
    write_json(folder / "config.json", model.settings)


def write_films(root: Path) -> None:
    """data/cc2017 with its films, described, and prepared for the tiny decoders in models/."""
    folder = write_prepared(root / "data", clips=(45, 26), T=T, D=D, F=F, copies=10)
    rng = np.random.default_rng(0)
    for split in SEGMENTS:
        file = folder / "stimuli" / split / "clips.jsonl"
        lines = [json.loads(line) for line in open(file)]
        for i, line in enumerate(lines):  # of a third of the test clips and of all training clips some recur
            seed = rng.integers(30) if split == "train" or i % 3 == 0 else 1000 + i
            words = np.random.default_rng(seed)
            line["caption"] = " ".join(words.choice(WORDS, words.integers(1, 9)))
            line |= {"colour": COLOURS[i % 2], "shape": SHAPES[i // 2 % 2]}
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_copies(folder / "stimuli")  # the captions are others now
    films = Films(root)
    for segment in SEGMENTS["train"] + SEGMENTS["test"]:  # 20 frames in the 2 s of a clip
        clips = np.concatenate([*films.read_clips(segment)])
        write_video(folder / "raw" / "stimuli" / f"{segment}.mp4", clips, 10)
    torch.manual_seed(0)
    for name, build in {"wan": wan_pipeline, "cogvideox": cogvideox_pipeline}.items():
        pipe = build()
        for p in pipe.transformer.parameters():  # the output layer starts at zero, where nothing can be seen
            p.data += 0.05 * torch.randn_like(p)
        pipe.save_pretrained(root / "models" / name)
        prepare_decoder(films, folder / "stimuli", str(root / "models" / name), SIZE)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The world, to be read only: data/cc2017, models/{wan,cogvideox}, runs full, no-mom and no-integration of
    subject 1, both stages finished. A test that writes below it takes `tiny_copy`, or a run of its own name."""
    root = tmp_path_factory.mktemp("tiny")
    write_films(root)
    write_stage1(root)
    write_stage2(root)
    write_stage2(root, "no-mom-s0", mom=False)
    write_stage2(root, "no-integration-s0", integration=False)
    return root


@pytest.fixture
def linked(tiny, tmp_path, monkeypatch) -> Path:
    """The working directory, with the world's data and models."""
    monkeypatch.chdir(tmp_path)
    for name in ("data", "models"):
        (tmp_path / name).symlink_to(tiny / name, target_is_directory=True)
    return tmp_path


@pytest.fixture
def tiny_copy(tiny, linked) -> Path:
    """And with a copy of its runs."""
    shutil.copytree(tiny / "runs", linked / "runs")
    return linked
