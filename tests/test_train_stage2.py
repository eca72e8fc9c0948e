"""Stage 2 on a tiny prepared dataset with tiny random decoders: Eq. 10 in the one-step form, the script,
going on, what does not fit."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import REPO, chatter, environment, run_script, sha256, write_prepared
from diffusers import WanPipeline
from PIL import Image
from safetensors.torch import load_file
from test_video_decoder import cogvideox_pipeline, wan_pipeline

import train_stage2
from brain_model import BrainModel
from data import ClipDataset, DecoderData, hide_voxels, memories
from heads import Stage1Heads, stage1_loss
from mixture_of_memories import DirectProjection, MemoryPool, MixtureOfMemories, TopTextMemory, condition
from prepare.decoder import prepare_decoder
from prepare.release import Release
from support.training import compile_blocks
from support.videos import video_frames
from toy.world import combinations, random_clip, render
from train_stage2 import Config, Parts, losses_and_gradients, main, parse
from video_decoder import VideoDecoder, clip_generator, condition_dropout, draw, recompute

diffusers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)

WORDS = "red blue a circle square grows moves".split()
L, D, D_TXT, WIDTH, SIZE = (
    12,
    16,
    16,
    24,
    (9, 32, 32),
)  # text tokens, CLIP's width, the text's, D', frames x height x width
WEIGHTS = {"tau": 0.07, "lambda_1": 1.0, "lambda_2": 0.5}
RUN = [
    "--data",
    "cc2017",
    "--frames",
    9,
    "--height",
    32,
    "--width",
    32,
    "--epochs",
    2,
    "--batch_size",
    8,
    "--micro_batch",
    4,
]
RUN += [
    "--attention_heads",
    4,
    "--lora_rank",
    4,
    "--sample_every",
    0,
    "--save_every",
    2,
    "--log_every",
    1,
    "--lr",
    1e-3,
    "--lr_lora",
    1e-3,
]


class Films(Release):
    """A source of moving bars, one a clip, for the prepared clips of write_prepared."""

    splits = {"train": ["seg1", "seg2", "seg3"], "test": ["test1", "test2"]}

    def __init__(self, root: Path):
        self.root = root

    def stimulus(self, segment: str) -> list[Path]:
        path = self.root / f"{segment}.mp4"
        path.write_text(segment)
        return [path]

    def read_clips(self, segment: str) -> Iterator[np.ndarray]:
        for k in range(12 if "test" in segment else 16):
            clip = np.full((20, 40, 48, 3), 40, np.uint8)
            for t, frame in enumerate(clip):
                frame[:, (t + 3 * k) % 40 :][:, :8, k % 3] = 230
            yield clip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """data/cc2017 with latents and text for a tiny wan and cogvideox, and the stage 1 of run full."""
    root = tmp_path_factory.mktemp("stage2")
    folder = write_prepared(root / "data", copies=12)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        file = folder / "stimuli" / split / "clips.jsonl"
        rows = [
            json.loads(line) | {"caption": " ".join(rng.choice(WORDS, rng.integers(1, 9)))}
            for line in open(file)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    for name, pipe in (("wan", wan_pipeline()), ("cogvideox", cogvideox_pipeline())):
        for p in pipe.transformer.parameters():  # the output layer starts at zero, where nothing can be seen
            p.data += 0.05 * torch.randn_like(p)
        pipe.save_pretrained(root / "models" / name)
        prepare_decoder("cc2017", Films(root), root / "data", str(root / "models" / name), *SIZE)
    write_stage1(root)
    return root


def write_stage1(root: Path, name: str = "full-s0", voxels: int = 40, tokens: int = L, **changes) -> None:
    torch.manual_seed(1)
    out = root / "runs" / "cc2017" / "sub1" / name / "stage1"
    BrainModel(voxels, 1, tokens, WIDTH, 2, 4, D, 4, 0.1).save_pretrained(out / "brain_model")
    Stage1Heads(D, 3, 4).save_pretrained(out / "heads")
    config = {"data": "cc2017", "subject": 1, "rois": None, "val_segments": None, "cls": True, "action": True}
    config |= {"tau": 0.07, "lambda_1": 1.0, "lambda_2": 1.0, "step": 9, "steps_in_all": 9}
    sizes = {"volumes": 1, "voxels": voxels, "frames": 3, "embed_dim": D, "classes": 4}
    (out / "config.json").write_text(json.dumps(config | {"sizes": sizes} | changes))


def stage2(world: Path, *args: object) -> subprocess.CompletedProcess:
    return run_script("train_stage2.py", *RUN, "--decoder", "models/wan", *args, cwd=world)


@pytest.fixture
def here(world, monkeypatch):
    """The script's main, in this process."""
    monkeypatch.chdir(world)
    return lambda *args: main(parse([*map(str, RUN), "--decoder", "models/wan", *map(str, args)]))


@pytest.fixture(scope="module")
def data(world) -> tuple[ClipDataset, DecoderData]:
    at = world / "data"
    return ClipDataset("cc2017", 1, "train", root=at), DecoderData(
        "cc2017", str(world / "models" / "wan"), "train", at, SIZE
    )


def make_parts(world: Path, data, mom=None, model: str = "wan") -> Parts:
    """Parts whose LoRA and zero-convs are away from zero where `mom` is not given."""
    torch.manual_seed(2)
    train, _ = data
    videos = DecoderData("cc2017", str(world / "models" / model), "train", world / "data", SIZE)
    stage1 = world / "runs" / "cc2017" / "sub1" / "full-s0" / "stage1"
    brain_model = BrainModel.from_pretrained(stage1 / "brain_model").train()
    heads = Stage1Heads.from_pretrained(stage1 / "heads").requires_grad_(False).eval()
    torch.nn.init.normal_(heads.phi_a.mlp[3].weight, std=0.3)
    pool = MemoryPool(**memories(train, videos, heads.phi_v, np.arange(48)))
    decoder = VideoDecoder.from_pretrained(world / "models" / model, 4, 4)
    if mom is None:
        mom = MixtureOfMemories(L, WIDTH, D, D_TXT, 5, 4, text_rms=pool.text_rms())
        for p in [p for n, p in mom.named_parameters() if ".Z_" in n] + [
            p for n, p in decoder.named_parameters() if "lora_B" in n
        ]:
            torch.nn.init.normal_(p, std=0.2)
    return Parts(brain_model, heads, mom, decoder, pool, torch.from_numpy(np.array(videos.empty)))


STEP, CLIPS = 5, np.array([3, 40, 17, 25])


def batch_of(data, clips: np.ndarray = CLIPS, step: int = STEP) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """x, y and the targets of Eq. 3."""
    train, videos = data
    batch = train.batch(clips, 0, step)
    x = hide_voxels(batch.pop("x"), 0.1, 0, step, clips)
    return x, torch.from_numpy(videos.latents[clips]), batch


def gradients(parts: Parts) -> dict[str, torch.Tensor]:
    modules = {
        "brain_model": parts.brain_model,
        "heads": parts.heads,
        "mom": parts.mom,
        "decoder": parts.decoder,
    }
    found = {f"{a}.{b}": p for a, module in modules.items() for b, p in module.named_parameters()}
    grads = {name: p.grad.clone() for name, p in found.items() if p.grad is not None}
    for p in found.values():
        p.grad = None
    return grads


def one_step(
    parts: Parts, data, micro_batch: int, weights=WEIGHTS, dropout: float = 0.3
) -> tuple[dict, dict]:
    """What is logged, and the gradients by name."""
    memory, how = torch.from_numpy(CLIPS), (0, STEP, micro_batch, dropout, nullcontext, len(CLIPS))
    logged = losses_and_gradients(
        parts, *batch_of(data), CLIPS, memory, parts.pool.excluded(memory), weights, *how
    )
    return logged, gradients(parts)


def plain_step(parts: Parts, data, dropout: float = 0.3) -> tuple[torch.Tensor, dict]:
    """Eq. 10 as one graph and one backward."""
    (x, y, targets), (brain_model, heads, mom, decoder, pool, empty, _) = batch_of(data), parts
    f_c, f_e = brain_model(x)
    stage1 = stage1_loss(heads, f_c, **targets, **WEIGHTS)
    q = torch.stack([f_c, f_c, heads.phi_a(f_c)], 1)
    f_fuse = mom(f_e, q, pool, pool.excluded(torch.from_numpy(CLIPS))).f_fuse
    noise, u, dropped = draw(0, STEP, CLIPS, y.shape[1:], dropout)
    loss = stage1.loss + decoder(y, condition_dropout(f_fuse, empty, dropped), noise, u).mean()
    loss.backward()
    return loss.detach(), gradients(parts)


# -- preparation ---------------------------------------------------------------------------------------------------


def test_prepared_latents_and_text_are_the_decoders_own(world):
    for model in ("wan", "cogvideox"):
        name = str(world / "models" / model)
        videos = DecoderData("cc2017", name, "test", world / "data", SIZE)
        decoder = VideoDecoder.from_pretrained(
            name, load_transformer=False, load_vae=True, load_text_encoder=True
        )
        assert videos.latents.dtype == np.float16 and videos.latents.shape == (24, 4, 3, 4, 4)
        shown = [clip for segment in Films.splits["test"] for clip in Films(world).read_clips(segment)]
        for i in (0, 7, 23):
            y = decoder.encode_latents(torch.from_numpy(video_frames(shown[i], *SIZE))[None])[0]
            torch.testing.assert_close(torch.tensor(videos.latents[i]).float(), y, rtol=2e-3, atol=2e-3)
            caption = json.loads(
                (world / "data/cc2017/stimuli/test/clips.jsonl").read_text().splitlines()[i]
            )["caption"]
            tokens = videos.text_tokens[videos.text_offsets[i] : videos.text_offsets[i + 1]]
            assert len(tokens) == (L if model == "cogvideox" else len(caption.split()) + 1)
            torch.testing.assert_close(
                torch.tensor(tokens).float(), decoder.encode_text([caption])[0], rtol=2e-3, atol=2e-3
            )
        (empty,) = decoder.encode_text([""])
        assert videos.empty.shape == (L, D_TXT) and not videos.empty[len(empty) :].any()
        torch.testing.assert_close(torch.tensor(videos.empty[: len(empty)]), empty)


def test_video_frames_are_the_middle_ones_of_the_centred_rectangle():
    clip = np.zeros((60, 4, 8, 3), np.uint8)
    clip[..., 0] = np.arange(60)[:, None, None]
    clip[..., 1] = np.arange(8)
    square = video_frames(clip, 57, 4, 4)
    assert square.shape == (57, 4, 4, 3) and square[0, 0, :, 1].tolist() == [2, 3, 4, 5]
    assert square[:, 0, 0, 0].tolist() == list(range(1, 58))
    assert video_frames(clip, 9, 2, 8)[:, 0, 0, 0].tolist() == list(range(5, 54, 6))
    assert video_frames(np.full((17, 64, 64, 3), 9, np.uint8), 17, 32, 32).shape == (17, 32, 32, 3)
    with pytest.raises(ValueError, match="6 frames, wanted 57"):
        video_frames(clip[:6], 57, 4, 4)


def test_files_of_another_size_vae_or_text_encoder_are_refused(world, tmp_path):
    model = tmp_path / "wan"
    shutil.copytree(world / "models" / "wan", model)
    with pytest.raises(ValueError, match=r"latents.npy was made with frames = 9, but frames = 17"):
        DecoderData("cc2017", str(model), "train", world / "data", (17, 32, 32))
    for part, file in (("vae", "latents.npy"), ("text_encoder", "text_tokens.npy")):
        weights = next((model / part).glob("*.safetensors"))
        before = weights.read_bytes()
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{file} was made with {part} = '[0-9a-f]+', but {part} = "):
            DecoderData("cc2017", str(model), "train", world / "data", SIZE)
        weights.write_bytes(before)
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="python data.py cc2017 .*--decoder .*other"):
        DecoderData("cc2017", str(tmp_path / "other"), "train", world / "data", SIZE)


def test_memories_are_the_three_unit_embeddings_and_the_captions_of_the_clips(world, data):
    train, videos = data
    heads, clips = make_parts(world, data).heads, np.array([1, 5, 16, 20, 47])
    pool = MemoryPool(**memories(train, videos, heads.phi_v, clips))
    image = np.einsum("nfd,f->nd", train.e_img[clips], heads.phi_v.mix.weight.detach().numpy().reshape(-1))
    for m, e in enumerate((train.e_txt[clips], image, train.e_act[clips])):
        np.testing.assert_allclose(pool.e[:, m], e / np.linalg.norm(e, axis=1, keepdims=True), atol=1e-6)
    assert pool.segment.tolist() == [0, 0, 1, 1, 2] and pool.position.tolist() == [1, 5, 0, 4, 15]
    for n, clip in enumerate(clips):
        real = videos.text_tokens[videos.text_offsets[clip] : videos.text_offsets[clip + 1]]
        np.testing.assert_array_equal(pool.text(torch.tensor([n]), L)[0, : len(real)], real)


# -- one step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["wan", "cogvideox"])
def test_the_one_step_form_is_the_plain_backward_however_the_clips_are_split(world, data, model):
    data = (data[0], DecoderData("cc2017", str(world / "models" / model), "train", world / "data", SIZE))
    parts = make_parts(world, data, model=model)
    loss, plain = plain_step(parts, data)
    assert {name.split(".")[0] for name in plain} == {
        "brain_model",
        "mom",
        "decoder",
    }  # and none of the frozen heads
    assert all("lora_" in name for name in plain if name.startswith("decoder"))
    assert all(
        plain[name].abs().sum() > 0
        for name in plain
        if "R.3.weight" in name or "W_Q" in name or "lora_A" in name
    )
    for micro_batch in (4, 2, 1, 3):
        logged, grads = one_step(parts, data, micro_batch)
        assert grads.keys() == plain.keys()
        torch.testing.assert_close(grads, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logged["loss"], loss)
    parts.brain_model.gradient_checkpointing = (
        True  # and the conditioning is made once more in the backward pass
    )
    _, grads = one_step(parts, data, 2)
    torch.testing.assert_close(grads, plain, rtol=1e-4, atol=1e-5)
    terms = (
        logged["diffusion"] + logged["image"] + logged["text"] + logged["action"] + 0.5 * logged["category"]
    )
    torch.testing.assert_close(logged["loss"], terms)
    assert abs(sum(logged[w] for w in ("w_txt", "w_img", "w_act")) - 1) < 1e-6


def test_compiled_blocks_have_the_same_gradients(world, data):
    """--compile, with what the blocks of Brain Model and DiT recompute."""
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    logged, grads = one_step(make_parts(world, data), data, 2)
    parts = make_parts(world, data)
    parts.brain_model.gradient_checkpointing = True
    parts.decoder.transformer.enable_gradient_checkpointing(recompute)
    compile_blocks(True, parts.brain_model.blocks, parts.decoder.transformer)
    compiled, compiled_grads = one_step(parts, data, 2)
    torch.testing.assert_close(compiled["loss"], logged["loss"])
    torch.testing.assert_close(compiled_grads, grads, rtol=1e-3, atol=1e-5)


def test_f_fuse_starts_as_the_text_and_eq_9_teaches_router_and_brain_model_after_one_step(world, data):
    torch.manual_seed(4)
    parts = make_parts(world, data, mom=MixtureOfMemories(L, WIDTH, D, D_TXT, 5, 4))
    nothing = {"tau": 1e6, "lambda_1": 0.0, "lambda_2": 0.0}  # Eq. 3 leaves no gradient
    x, memory = batch_of(data)[0], torch.from_numpy(CLIPS)
    excluded = parts.pool.excluded(memory)
    _, remembered = condition(parts.brain_model, parts.heads, parts.mom, parts.pool, x, excluded)
    assert torch.equal(remembered.f_fuse, parts.pool.text(remembered.indices[:, 0], L))
    optimiser = torch.optim.AdamW([*parts.brain_model.parameters(), *parts.mom.parameters()], 1e-2)
    taught = ("mom.router.R.3.weight", "brain_model.regression.contract.weight", "brain_model.to_f_c.weight")
    for step in (0, 1):
        how = (0, STEP, 4, 0.0, nullcontext, len(CLIPS))
        losses_and_gradients(parts, *batch_of(data), CLIPS, memory, excluded, nothing, *how)
        if step == 0:
            optimiser.step()
            before = gradients(parts)
    after = gradients(parts)
    for name in taught:
        assert before[name].abs().max() < 1e-6 < after[name].abs().max() / 10, name  # 1e-6: of Eq. 3 at 1e6
    assert before["mom.integration.Z_fMRI.weight"].abs().max() > 1e-5


def test_without_mom_eq_9_teaches_the_decoder_alone(world, data):
    """f_fuse has no gradient there: Brain Model and its gradients are those of Eq. 3 alone."""
    parts = make_parts(world, data, mom=TopTextMemory(L))
    for name, p in parts.decoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    logged, grads = one_step(parts, data, 2)
    assert {name.split(".")[0] for name in grads} == {"brain_model", "decoder"}
    assert "z_f/z_t" not in logged and (logged["w_txt"], logged["w_img"]) == (1, 0)
    x, _, targets = batch_of(data)
    stage1_loss(parts.heads, parts.brain_model(x)[0], **targets, **WEIGHTS).loss.backward()
    for name, grad in gradients(parts).items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-7)
    assert any(grads[name].abs().max() > 0 for name in grads if "lora_A" in name)


def test_without_integration_the_plain_backward_is_the_same(world, data):
    torch.manual_seed(3)
    parts = make_parts(world, data, mom=DirectProjection(WIDTH, D_TXT))
    loss, plain = plain_step(parts, data)
    logged, grads = one_step(parts, data, 2)
    assert not logged.keys() & {"alike", "w_txt", "z_f/z_t"} and grads["mom.project.weight"].abs().max() > 0
    torch.testing.assert_close(grads, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logged["loss"], loss)


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3)])
def test_the_mean_over_processes_is_the_step_of_one(world, data, monkeypatch, sizes):
    """Eq. 9, its share of f.grad and the logged loss, of two processes one after the other. Eq. 3 is left
    out: its processes must meet (test_heads.py)."""
    parts = make_parts(world, data)
    whole = {"tau": 1e6, "lambda_1": 0.0, "lambda_2": 0.0}
    logged, grads = one_step(parts, data, 4, whole)
    sums, diffusion = {}, 0
    for clips in np.split(CLIPS, [sizes[0]]):
        how = (0, STEP, 3, 0.3, nullcontext, len(CLIPS) / 2)
        memory = torch.from_numpy(clips)
        part = losses_and_gradients(
            parts, *batch_of(data, clips), clips, memory, parts.pool.excluded(memory), whole, *how
        )
        diffusion = diffusion + part["diffusion"] / 2
        for name, grad in gradients(parts).items():
            sums[name] = sums.get(name, 0) + grad / 2
    torch.testing.assert_close(diffusion, logged["diffusion"])
    for name in sums:
        torch.testing.assert_close(sums[name], grads[name], rtol=1e-4, atol=1e-5)


def test_hidden_voxels_belong_to_seed_step_and_clip():
    x, clips = torch.ones(4, 1, 4000), np.arange(4)
    hidden = hide_voxels(x, 0.25, 0, 7, clips)
    assert set(hidden.unique().tolist()) == {0, np.float32(1 / 0.75)}
    assert abs((hidden == 0).float().mean() - 0.25) < 0.02
    assert torch.equal(hide_voxels(x[2:], 0.25, 0, 7, clips[2:]), hidden[2:])
    assert not torch.equal(hide_voxels(x, 0.25, 0, 8, clips), hidden) and hide_voxels(x, 0, 0, 7, clips) is x


def test_four_clips_are_learnt_by_heart_until_the_videos_match():
    """With toy/wan, random fMRI and only memories of other clips: what is reconstructed is what was watched,
    and no other of the four."""
    torch.manual_seed(0)
    rng, unit = (
        np.random.default_rng(0),
        lambda *shape: torch.nn.functional.normalize(torch.randn(*shape), dim=-1),
    )
    pool_of = combinations()[0]
    clips = [random_clip(pool_of[i], rng) for i in rng.permutation(len(pool_of))[:14]]
    decoder = VideoDecoder.from_pretrained(REPO / "toy" / "wan", load_vae=True, load_text_encoder=True)
    video = torch.from_numpy(np.stack([render(clip) for clip in clips[:4]]))  # (4, 17, 64, 64, 3)
    text, (empty,) = decoder.encode_text([clip.caption for clip in clips[4:]]), decoder.encode_text([""])
    offsets = torch.tensor([0, *np.cumsum([len(tokens) for tokens in text])])
    position = torch.zeros(10, dtype=torch.long)
    pool = MemoryPool(
        unit(10, 3, 64), torch.cat(text), offsets, *[torch.arange(10)] * 2, position, unit(10, 64)
    )
    brain_model, heads = BrainModel(50, 1, 16, 128, 2, 4, 64), Stage1Heads(64, 8, 5).requires_grad_(False)
    mom = MixtureOfMemories(16, 128, 64, 64, 5, 4, text_rms=pool.text_rms())
    empty = torch.nn.functional.pad(empty, (0, 0, 0, 16 - len(empty)))
    parts = Parts(brain_model, heads, mom, decoder, pool, empty)
    x, y = torch.randn(4, 1, 50), decoder.encode_latents(video)
    targets = {"e_img": unit(4, 8, 64), "e_txt": unit(4, 64), "e_act": unit(4, 64)}
    targets |= {"categories": torch.zeros(4, 5)}
    lora = [p for p in decoder.parameters() if p.requires_grad]
    groups = [(brain_model.parameters(), 3e-3), (mom.parameters(), 3e-3), (lora, 1e-3)]
    optimiser = torch.optim.AdamW([{"params": [*parameters], "lr": lr} for parameters, lr in groups])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [lr for _, lr in groups], total_steps=400)
    for step in range(400):
        how = (
            np.arange(4),
            torch.arange(4),
            pool.excluded(torch.arange(4)),
            WEIGHTS,
            0,
            step,
            4,
            0.1,
            nullcontext,
            4,
        )
        losses_and_gradients(parts, x, y, targets, *how)
        torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step(), optimiser.zero_grad(), schedule.step()
    with torch.inference_mode():
        f_fuse = condition(brain_model, heads, mom, pool, x)[1].f_fuse
        generators = [clip_generator(0, i) for i in range(4)]
        shown = decoder.generate(f_fuse, parts.empty, 17, 64, 64, generators, 16, 3.0)
    error = ((shown[:, None].float() - video.float()) / 255).square().mean((2, 3, 4, 5))
    psnr = -10 * error.log10()  # (4 shown, 4 watched)
    others = (psnr - 99 * torch.eye(4)).max(1).values
    assert psnr.diag().min() > 18 and (psnr.diag() - others).min() > 2, psnr


# -- the script ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(world) -> Path:
    done = stage2(world, "--sample_every", 12, "--sampling_steps", 2, "--samples", 2)
    assert done.returncode == 0, done.stderr
    assert not chatter(done)
    few, many = map(
        int, re.search(r"48 clips and memories; a clip may retrieve (\d+) to (\d+)", done.stdout).groups()
    )
    assert 5 <= few < many <= 32  # 48 clips less the own segment, and for some the planted copies
    return world / "runs/cc2017/sub1/full-s0/stage2"


def test_a_run_holds_all_that_is_needed_to_use_it(world, trained):
    steps = 2 * (48 // 8)
    rows = [json.loads(line) for line in open(trained / "log.jsonl")]
    assert [row["step"] for row in rows] == list(range(steps)) and rows[0]["z_f/z_t"] == 0 < rows[-1][
        "z_f/z_t"
    ]
    for row in rows:
        parts = sum(row[name] for name in ("diffusion", "image", "text", "action", "category"))
        assert row["loss"] == pytest.approx(parts, abs=1e-4)
    near = json.loads((trained / "near_copies.json").read_text())
    assert set(near["best_match"]) == {"held out", "training, all", "training, left"}
    config = json.loads((trained / "config.json").read_text())
    assert (
        config["K"] == 5 and config["stage1_config"]["tau"] == 0.07 and config["stage1_config"]["step"] == 9
    )
    assert config["step"] == config["steps_in_all"] == steps
    for picture in ("losses.png", "near_copies.png"):
        assert (trained / picture).stat().st_size > 5000
    from PIL import Image, ImageSequence

    with Image.open(trained / "samples" / "step-000012.gif") as gif:
        assert gif.n_frames == 9
        frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(gif)]
    height, width = frames[0].shape[:2]  # two columns of pictures 128 high, two rows of them
    assert 2 * 128 < height < 420 and 2 * 128 < width < 320
    moves = abs(frames[0] - frames[4]).max(2)  # the stimulus moves: its bar, in the left column
    assert moves[:, : width // 2].max() > 60
    folders = trained.parent / "stage1", trained
    start, end = (BrainModel.from_pretrained(at / "brain_model").state_dict() for at in folders)
    assert all(not torch.equal(start[name], end[name]) for name in start)
    assert BrainModel.from_pretrained(trained / "brain_model").dropout == 0.1
    before, after = (sha256(at / "heads" / "model.safetensors") for at in folders)
    assert before == after
    mom = MixtureOfMemories.from_pretrained(trained / "mixture_of_memories")
    assert mom.integration.Z_fMRI.weight.abs().max() > 0
    pipe = WanPipeline.from_pretrained(world / "models" / "wan")
    pipe.load_lora_weights(trained / "lora")
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in pipe.transformer.named_parameters())
    assert not list(trained.rglob("*.part*")), "left over"


SAVED = ["brain_model/model", "mixture_of_memories/model", "lora/pytorch_lora_weights"]


def assert_bit_equal(a: Path, b: Path) -> None:
    """Two runs' weights; not the bytes, since safetensors writes its metadata in any order."""
    for name in SAVED:
        here, there = load_file(a / f"{name}.safetensors"), load_file(b / f"{name}.safetensors")
        assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here), name


def started(world: Path, run: str, lines: int, number: int) -> subprocess.CompletedProcess:
    """The script, sent a signal once log.jsonl of the run has so many lines."""
    log = world / f"runs/cc2017/sub1/{run}-s0/stage2/log.jsonl"
    command = [sys.executable, str(REPO / "train_stage2.py"), *map(str, RUN)]
    command += ["--decoder", "models/wan", "--run", run]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=world, env=environment(), **pipes) as process:
        while not (log.is_file() and log.read_text().count("\n") >= lines) and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, "ended before it was stopped"
        process.send_signal(number)
        _, stderr = process.communicate(timeout=200)
    return subprocess.CompletedProcess(command, process.returncode, "", stderr)


def test_a_killed_run_goes_on_bit_equal(world, trained):
    """Killed at some moment after the first checkpoint; twice, the second time while it goes on."""
    out = world / "runs/cc2017/sub1/killed-s0/stage2"
    write_stage1(world, "killed-s0")
    for until in (3, 8):
        assert started(world, "killed", until, signal.SIGKILL).returncode == -signal.SIGKILL
        for file in out.rglob("*.safetensors"):
            if ".part" not in str(file):
                load_file(file)
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 9, "lo')  # as a kill may leave it
    step = torch.load(out / "state" / "state.pt", weights_only=True)["step"]
    assert 2 <= step < 12
    done = stage2(world, "--run", "killed", "--sample_every", 12, "--sampling_steps", 2, "--samples", 2)
    assert done.returncode == 1 and "sampling_steps" in done.stderr, "other settings"
    done = stage2(world, "--run", "killed")
    assert done.returncode == 0, done.stderr
    assert_bit_equal(out, trained)  # which, besides, has shown samples
    losses = [[json.loads(line)["loss"] for line in open(run / "log.jsonl")] for run in (out, trained)]
    assert losses[0] == losses[1]


def test_sigterm_saves_the_step_and_the_same_command_goes_on(world, trained):
    write_stage1(world, "stopped-s0")
    out = world / "runs/cc2017/sub1/stopped-s0/stage2"
    done = started(world, "stopped", 3, signal.SIGTERM)
    step = json.loads((out / "config.json").read_text())["step"]
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"saved after step {step} of 12; the same command goes on"
    assert stage2(world, "--run", "stopped").returncode == 0
    assert_bit_equal(out, trained)
    again = stage2(world, "--run", "stopped", "--micro_batch", 2)
    assert again.returncode == 0 and "stage2 is finished" in again.stdout


@pytest.mark.parametrize("batch", [8, 7])
def test_two_processes_train_as_one_does(world, here, batch):
    """Dropout included, and where the clips do not divide; and they share the rows of the samples."""
    samples = ["--sample_every", "6", "--samples", "3", "--sampling_steps", "2"]
    here("--run", f"one-{batch}", "--stage1", "full", "--batch_size", batch, *samples)
    options = [*map(str, RUN), "--decoder", "models/wan", "--run", f"two-{batch}", "--stage1", "full"]
    options += ["--micro_batch", "3", "--batch_size", str(batch), *samples]
    (world / "two.py").write_text(
        f"import train_stage2\ntrain_stage2.main(train_stage2.parse({options!r}))\n"
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "two.py",
    ]
    how = {"cwd": world, "env": environment(), "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(launch, **how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: python evaluate.py") == 1  # they are one run of two, not two runs
    runs = [world / f"runs/cc2017/sub1/{name}-{batch}-s0/stage2" for name in ("two", "one")]
    two, one = (Image.open(run / "samples" / "step-000006.gif").convert("RGB") for run in runs)
    assert two.size == one.size
    assert abs(np.asarray(two, np.float32) - np.asarray(one, np.float32)).mean() < 2  # of 255
    two, one = ([json.loads(line) for line in open(run / "log.jsonl")] for run in runs)
    assert len(two) == len(one) == 2 * (48 // batch)
    for a, b in zip(two, one, strict=True):
        assert a.pop("z_f/z_t") == pytest.approx(
            b.pop("z_f/z_t"), rel=0.2, abs=1e-5
        )  # of norms: no mean over clips
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    assert two[0] == pytest.approx(one[0], rel=1e-5, abs=1e-6)  # the gradient's norm, too


def shown_by(
    folder: Path, world: Path, model: str, x: torch.Tensor
) -> tuple[torch.Tensor, MemoryPool, object]:
    """f_fuse of fMRI x by a run's own weights, read again from its folder, and what made it."""
    ablations = {"full-no-mom-s0": TopTextMemory, "full-no-integration-s0": DirectProjection}
    mom = ablations.get(folder.parent.name, MixtureOfMemories).from_pretrained(folder / "mixture_of_memories")
    heads = Stage1Heads.from_pretrained(folder / "heads")
    train = ClipDataset("cc2017", 1, "train", root=world / "data")
    videos = DecoderData("cc2017", str(world / "models" / model), "train", world / "data", SIZE)
    settings = json.loads((folder / "config.json").read_text())["stage1_config"]
    clips = [i for i, clip in enumerate(train.clips) if clip["segment"] != settings["val_segments"]]
    pool = MemoryPool(**memories(train, videos, heads.phi_v, np.array(clips)))
    brain_model = BrainModel.from_pretrained(folder / "brain_model")
    with torch.no_grad():
        return condition(brain_model, heads, mom, pool, x)[1], pool, mom


@pytest.mark.parametrize("ablation", ["no-mom", "no-integration"])
def test_an_ablation_shows_what_its_table_says(world, here, data, ablation):
    """Without MoM the top-1 text alone conditions the video, without integration a projection of f_e does."""
    here(f"--{ablation}", "--epochs", 1, "--sample_every", 6, "--sampling_steps", 1, "--samples", 1)
    out = world / f"runs/cc2017/sub1/full-{ablation}-s0/stage2"
    x = ClipDataset("cc2017", 1, "test", root=world / "data").averaged()
    remembered, pool, mom = shown_by(out, world, "wan", x)
    row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    if ablation == "no-mom":
        cosines = torch.nn.functional.normalize(condition_of(out, x)[0], dim=-1) @ pool.e[:, 0].T
        best = remembered.indices[:, 0]
        torch.testing.assert_close(cosines[torch.arange(len(x)), best], cosines.max(1).values)
        assert len(best.unique()) > 1 and torch.equal(remembered.f_fuse, pool.text(best, L))
        assert row["w_txt"] == 1 and "z_f/z_t" not in row
    else:
        f_e = condition_of(out, x)[1]
        torch.testing.assert_close(remembered.f_fuse, f_e @ mom.project.weight.T + mom.project.bias)
        assert "w_txt" not in row and "alike" not in row
    assert (out / "samples" / "step-000006.gif").is_file()


@torch.no_grad()
def condition_of(out: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f_c and f_e of a run's Brain Model."""
    return BrainModel.from_pretrained(out / "brain_model")(x)


def test_cogvideox_with_a_segment_held_out_learns_and_samples_change_nothing(world, here, capsys):
    """The same script with a decoder of the other family; the LoRA that it leaves lowers Eq. 9 on its
    clips."""
    write_stage1(world, "held-s0", val_segments="seg2")
    options = [
        "--stage1",
        "held",
        "--epochs",
        6,
        "--K",
        3,
        "--decoder",
        "models/cogvideox",
        "--lr_lora",
        3e-3,
    ]
    here("--run", "held", *options)
    assert "32 clips and memories" in capsys.readouterr().out
    here("--run", "shown", *options, "--sample_every", 4, "--sampling_steps", 2, "--samples", 1)
    runs = [world / f"runs/cc2017/sub1/{name}-s0/stage2" for name in ("held", "shown")]
    assert_bit_equal(*runs)
    assert len(list((runs[1] / "samples").glob("*.gif"))) == 6
    x = ClipDataset("cc2017", 1, "train", root=world / "data").averaged()[:8]  # of seg1, trained on
    f_fuse = shown_by(runs[0], world, "cogvideox", x)[0].f_fuse
    videos = DecoderData("cc2017", str(world / "models" / "cogvideox"), "train", world / "data", SIZE)
    y, losses = torch.from_numpy(np.array(videos.latents[:8])), []
    decoder = VideoDecoder.from_pretrained(world / "models" / "cogvideox", 4, 16)
    noise, u, _ = draw(9, 9, range(8), y.shape[1:])
    for _ in range(2):
        with torch.no_grad():
            losses.append(decoder(y, f_fuse, noise, u).mean())
        decoder.load_lora(runs[0] / "lora")
    assert losses[1] < 0.99 * losses[0], losses


@pytest.mark.parametrize("options, expected", [([], 1.0), (["--noise_shift", 2.5], 2.5)])
def test_the_decoder_trains_at_the_noise_that_is_asked_for(world, here, monkeypatch, options, expected):
    seen = []
    monkeypatch.setattr("train_stage2.learn", lambda c, a, run, parts, *rest: seen.append(parts.decoder))
    here("--run", f"noise-{expected}", "--stage1", "full", *options)
    assert [decoder.noise_shift for decoder in seen] == [expected]


@pytest.mark.parametrize("ablation", ["full", "no-mom", "no-integration"])
def test_each_part_learns_at_the_rate_that_is_asked_for(world, here, monkeypatch, ablation):
    class Enough(Exception):
        pass

    seen, groups, load = [], [], train_stage2.load_parts
    monkeypatch.setattr(train_stage2, "load_parts", lambda *of: seen.append(load(*of)) or seen[0])

    def adamw(name, given, *rest, **options):
        groups.extend(given)
        raise Enough

    monkeypatch.setattr(train_stage2.training, "adamw", adamw)
    switch = [] if ablation == "full" else [f"--{ablation}"]
    rates = ["--lr", 1e-5, "--lr_fusion", 1e-3, "--lr_lora", 1e-2]
    with pytest.raises(Enough):
        here("--run", f"rates-{ablation}", "--stage1", "full", *switch, *rates)
    rate = {p: group["lr"] for group in groups for p in group["params"]}
    (parts,) = seen
    assert groups[0]["params"] == list(parts.brain_model.parameters())  # the group that 8 bits are for
    assert {rate.pop(p) for p in parts.brain_model.parameters()} == {1e-5}
    assert {rate.pop(p) for p in parts.decoder.parameters() if p.requires_grad} == {1e-2}
    of_mom = {name: rate.pop(p) for name, p in parts.mom.named_parameters()}
    assert not rate and len(of_mom) == len(list(parts.mom.parameters()))
    if ablation == "full":
        assert {lr for name, lr in of_mom.items() if name.startswith("router.")} == {1e-5}
        assert {lr for name, lr in of_mom.items() if not name.startswith("router.")} == {1e-3}
    else:
        assert set(of_mom.values()) == ({1e-3} if ablation == "no-integration" else set())


def test_training_stops_before_nan_reaches_a_checkpoint(world, here):
    write_stage1(world, "diverges-s0")
    with pytest.raises(ValueError, match=r"step \d+: .*lower --lr.*Clips of the step: seg\d-\d+"):
        here("--run", "diverges", "--lr", 1e30, "--save_every", 1, "--max_norm", 1e30)
    out = world / "runs/cc2017/sub1/diverges-s0/stage2"
    if out.exists():
        for name in SAVED:
            assert all(x.isfinite().all() for x in load_file(out / f"{name}.safetensors").values()), name


def test_names_of_runs():
    names = [([], ("full", "full")), (["--no-mom"], ("full-no-mom", "full")), (["--run", "a"], ("a", "a"))]
    names += [
        (["--stage1", "full-no-cls"], ("full-no-cls", "full-no-cls")),
        (["--run", "b", "--stage1", "a"], ("b", "a")),
    ]
    names += [
        (["--stage1", "runs/toy/sub1/x-s0", "--no-integration"], ("x-no-integration", "runs/toy/sub1/x-s0"))
    ]
    for argv, (run, stage1) in names:
        config = parse(argv)
        assert (config.run, config.stage1) == (run, stage1), argv
    assert parse(["--data", "cc2017"]).lr_fusion == 1e-6
    assert parse(["--data", "cc2017", "--lr-fusion", "1e-4"]).lr_fusion == 1e-4
    assert parse(["--data", "cinebrain"]) == Config(
        data="cinebrain", run="full", stage1="full", frames=33, height=480, width=720, lr_fusion=1e-6
    )


# -- what does not fit ---------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_in_a_line(world, here, trained):
    write_stage1(world, "voxels-s0", voxels=41)
    write_stage1(world, "tokens-s0", tokens=10)
    write_stage1(world, "subject-s0", subject=2)
    write_stage1(world, "unfinished-s0", step=3)
    write_stage1(world, "old-s0")
    old = world / "runs/cc2017/sub1/old-s0/stage1/config.json"
    old.write_text(old.read_text().replace('"step": 9, ', ""))
    again = r"python train_stage1.py --data cc2017 --subject 1 --seed 0 --run"
    cases = [
        (["--run", "never"], rf"never-s0/stage1/config.json is not there: {again} never"),
        (["--run", "voxels"], r"'voxels': 41.*data/ has .*'voxels': 40"),
        (["--run", "tokens"], r"10 tokens, the decoder's text 12: train_stage1.py --tokens 12"),
        (["--run", "subject"], r"'subject': 2.*wanted .*'subject': 1"),
        (["--run", "unfinished"], rf"'step': 3.*wanted .*'step': 9.*finished run: {again} unfinished"),
        (["--run", "old"], rf"no step, wanted step as int: {again} old"),
        (["--frames", 13], r"latents.npy was made with frames = 9, but frames = 13"),
        (["--K", 40, "--run", "many", "--stage1", "full"], r"may retrieve \d+ to \d+ of them; wanted K = 40"),
        (["--batch_size", 64], r"a batch of 64 clips, but only 48"),
        (["--lr_lora", 1e-4], r"lr_lora 0.001 \(now 0.0001\)"),
        (["--guidance", 7], r"guidance 5.0 \(now 7.0\)"),
        (["--attention_heads", 5, "--run", "five", "--stage1", "full"], r"width 24 .* attention_heads 5"),
    ]
    runs = {path: path.stat().st_mtime for path in (world / "runs").rglob("*")}
    for args, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            here(*args)
    assert {path: path.stat().st_mtime for path in (world / "runs").rglob("*") if path.is_file()} == {
        path: time for path, time in runs.items() if path.is_file()
    }, "what is refused changes nothing"
    done = stage2(world, "--run", "voxels")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    with pytest.raises(ValueError, match="two ablations"):
        parse(["--no-mom", "--no-integration"])


def test_a_stage_1_trained_again_is_noticed(world, here, trained):
    config = trained.parent / "stage1" / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"tau": 0.07', '"tau": 0.08'))
    try:
        with pytest.raises(ValueError, match="stage1_config"):
            here("--sample_every", 12, "--sampling_steps", 2, "--samples", 2)
    finally:
        config.write_text(before)


@pytest.mark.parametrize(
    "option",
    "--lr=0 --lr_fusion=0 --lr_lora=-1 --K=0 --micro_batch=0 --lora_rank=0 --sampling_steps=0 --epochs=0 "
    "--batch_size=0 --condition_dropout=1.5 --frames=0 --alpha=nan --save_every=0 --samples=0 --seed=-1".split(),
)
def test_a_value_out_of_its_range_is_one_line_that_names_the_option(option, capsys):
    with pytest.raises(SystemExit) as ended:
        parse([option])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and option.split("=")[0] in error and len(error.splitlines()) == 1
