"""Stage 2 on a tiny prepared dataset with tiny random decoders: Eq. 10 in the one-step form, the script,
going on, what does not fit."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import REPO, chatter, environment, run_script, sha256
from diffusers import WanPipeline
from PIL import Image, ImageSequence
from safetensors.torch import load_file
from test_train_stage1 import log, signalled
from tiny import cogvideox_pipeline, wan_pipeline, write_prepared
from torch import Tensor
from torch.nn.functional import normalize, pad

import train_stage2
from brain_model import BrainModel
from data import Batch, Clips, memories, noise_generator
from evaluate import CineNeuron
from heads import Stage1Heads, stage1_loss
from mixture_of_memories import DirectProjection, MemoryPool, MixtureOfMemories, TopTextMemory
from prepare.copies import prepare_copies
from prepare.decoder import prepare_decoder
from prepare.release import Release
from support.pipelines import load_lora, load_pipeline
from support.training import compile_blocks
from support.videos import video_frames
from toy.world import combinations, random_clip, render
from train_stage2 import Config, main, measures, parse, train_step
from video_decoder import VideoDecoder, recompute

diffusers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)

WORDS = "red blue a circle square grows moves".split()
L, D, D_TXT, WIDTH = 12, 16, 16, 24  # text tokens, CLIP's width, the text's, D'
SIZE = (9, 32, 32)  # frames x height x width
WEIGHTS = {"tau": 0.07, "lambda_1": 1.0, "lambda_2": 0.5}
RUN = """--data cc2017 --frames 9 --height 32 --width 32 --epochs 2 --batch_size 8 --micro_batch 4
--attention_heads 4 --lora_rank 4 --sample_every 0 --save_every 2 --log_every 1 --lr 1e-3 --lr_lora 1e-3""".split()
SAMPLES = "--sample_every 12 --sampling_steps 2 --samples 2".split()


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
    stimuli = write_prepared(root / "data", copies=12) / "stimuli"
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        file = stimuli / split / "clips.jsonl"
        lines = [json.loads(line) for line in open(file)]
        for line in lines:
            line["caption"] = " ".join(rng.choice(WORDS, rng.integers(1, 9)))
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_copies(stimuli)
    torch.manual_seed(0)
    for name, pipe in (("wan", wan_pipeline()), ("cogvideox", cogvideox_pipeline())):
        for p in pipe.transformer.parameters():  # the output layer starts at zero, where nothing can be seen
            p.data += 0.05 * torch.randn_like(p)
        pipe.save_pretrained(root / "models" / name)
        prepare_decoder(Films(root), stimuli, str(root / "models" / name), SIZE)
    write_stage1(root)
    return root


def write_stage1(root: Path, name: str = "full-s0", voxels: int = 40, tokens: int = L, **changes) -> None:
    torch.manual_seed(1)
    out = root / "runs" / "cc2017" / "sub1" / name / "stage1"
    BrainModel(voxels, 1, tokens, WIDTH, 2, 4, D, 4).save_pretrained(out / "brain_model")
    Stage1Heads(D, 3, 4).save_pretrained(out / "heads")
    config = {
        "data": "cc2017",
        "subject": 1,
        "rois": None,
        "val_segments": None,
        "dropout": 0.1,
        "precision": "fp32",
    }
    config |= {"tau": 0.07, "lambda_1": 1.0, "lambda_2": 1.0, "step": 9, "steps_in_all": 9}
    sizes = {"volumes": 1, "voxels": voxels, "frames": 3, "embed_dim": D, "classes": 4}
    (out / "config.json").write_text(json.dumps(config | {"sizes": sizes} | changes))


def stage2(world: Path, *args: object) -> subprocess.CompletedProcess:
    return run_script("train_stage2.py", *RUN, "--decoder", "models/wan", *args, cwd=world)


def folder_of(world: Path, name: str) -> Path:
    return world / "runs" / "cc2017" / "sub1" / f"{name}-s0" / "stage2"


@pytest.fixture
def here(world, monkeypatch):
    """The script's main, in this process."""
    monkeypatch.chdir(world)
    return lambda *args: main(parse([*RUN, "--decoder", "models/wan", *map(str, args)]))


def clips_of(world: Path, model: str = "wan", split: str = "train", size=SIZE, **options) -> Clips:
    """The clips with what a decoder reads; a training step has 4 of them."""
    decoder = str(world / "models" / model)
    draws = {"batch_size": 4, "voxel_dropout": 0.1, "condition_dropout": 0.3} | options
    return Clips("cc2017", 1, split, None, decoder, size, world / "data", **draws)


@pytest.fixture(scope="module")
def clips(world) -> Clips:
    return clips_of(world)


def load_decoder(folder: Path, lora_alpha: float = 4, **parts: bool) -> VideoDecoder:
    pipe, text_length, config = load_pipeline(str(folder), **parts)
    return VideoDecoder(pipe, text_length, config, lora_rank=4, lora_alpha=lora_alpha)


def assemble(
    brain_model: BrainModel, heads: Stage1Heads, mom, pool: MemoryPool, decoder, empty, size=SIZE
) -> CineNeuron:
    frames, height, width = size
    settings = {"frames": frames, "height": height, "width": width, "checkpointing": False}
    settings["stage1_config"] = WEIGHTS
    return CineNeuron(settings, brain_model, heads, mom, pool, decoder, empty, lines=[], voxels={})


def make_model(world: Path, clips: Clips, mom=None, model: str = "wan") -> CineNeuron:
    """A model whose LoRA and zero-convs are away from zero where `mom` is not given."""
    torch.manual_seed(2)
    stage1 = folder_of(world, "full").parent / "stage1"
    brain_model = BrainModel.from_pretrained(stage1 / "brain_model")
    heads = Stage1Heads.from_pretrained(stage1 / "heads")
    torch.nn.init.normal_(heads.phi_a.mlp[3].weight, std=0.3)
    decoder = load_decoder(world / "models" / model, transformer=True)
    if mom is None:
        mom = MixtureOfMemories(L, WIDTH, D, D_TXT, 5, 4)
        for name, p in [*mom.named_parameters(), *decoder.named_parameters()]:
            if ".Z_" in name or "lora_B" in name:
                torch.nn.init.normal_(p, std=0.2)
    pool = MemoryPool(*memories(clips, heads.phi_v))
    return assemble(brain_model, heads, mom, pool, decoder, torch.from_numpy(np.array(clips.empty)))


STEP = 5


def gradients(model: CineNeuron) -> dict[str, Tensor]:
    """By name; they are None afterwards."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return found


def one_step(
    model: CineNeuron, clips: Clips, micro_batch: int, batch: Batch | None = None
) -> tuple[dict, dict]:
    """What is logged, and the gradients by name."""
    batch = batch or clips.batch(STEP)
    losses, recalled = train_step(model, batch, Config(micro_batch=micro_batch, precision="fp32"))
    return losses | measures(model, batch, recalled, clips), gradients(model)


def plain_step(model: CineNeuron, clips: Clips) -> tuple[Tensor, dict]:
    """Eq. 10 as one graph and one backward."""
    batch, heads = clips.batch(STEP), model.heads
    f_c, f_e = model.brain_model(batch.x)
    q = torch.stack([f_c, f_c, heads.phi_a(f_c)], 1)
    f_fuse = model.mom(f_e, q, model.pool, batch.excluded).f_fuse
    prompt = torch.where(batch.dropped, model.empty, f_fuse)
    diffusion = model.decoder.diffusion_loss(batch.y, prompt, batch.noise, batch.u).mean()
    loss = stage1_loss(heads, f_c, batch, **WEIGHTS).loss + diffusion
    loss.backward()
    return loss.detach(), gradients(model)


def assert_gradients(found: dict, wanted: dict, rtol: float = 1e-4) -> None:
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-5)


# -- preparation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["wan", "cogvideox"])
def test_prepared_latents_and_text_are_the_decoders_own(world, model):
    test = clips_of(world, model, "test")
    decoder = load_decoder(world / "models" / model, vae=True, text_encoder=True)
    assert test.latents.dtype == np.float16 and test.latents.shape == (24, 4, 3, 4, 4)
    films = [clip for segment in Films.splits["test"] for clip in Films(world).read_clips(segment)]
    for i in (0, 7, 23):
        y = decoder.encode_latents(torch.from_numpy(video_frames(films[i], *SIZE))[None])[0]
        torch.testing.assert_close(torch.tensor(test.latents[i]).float(), y, rtol=2e-3, atol=2e-3)
        caption = test.lines[i]["caption"]
        assert len(test.texts[i]) == (L if model == "cogvideox" else len(caption.split()) + 1)
        (e,) = decoder.encode_text([caption])
        torch.testing.assert_close(torch.tensor(test.texts[i]).float(), e, rtol=2e-3, atol=2e-3)
    (empty,) = decoder.encode_text([""])
    assert test.empty.shape == (L, D_TXT) and not test.empty[len(empty) :].any()
    torch.testing.assert_close(torch.tensor(test.empty[: len(empty)]), empty)


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
        clips_of(world, model, size=(17, 32, 32))
    for part, file in (("vae", "latents.npy"), ("text_encoder", "text_tokens.npy")):
        weights = next((model / part).glob("*.safetensors"))
        before = weights.read_bytes()
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{file} was made with {part} = '[0-9a-f]+', but {part} = "):
            clips_of(world, model)
        weights.write_bytes(before)
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="python data.py cc2017 .*--decoder .*other"):
        clips_of(world, tmp_path / "other")


def test_memories_are_the_three_unit_embeddings_and_the_captions_of_the_clips(world):
    clips = clips_of(world, val_segments="seg2")
    trained, phi_v = clips.recall.trained, Stage1Heads(D, 3, 4).phi_v
    torch.nn.init.normal_(phi_v.mix.weight)
    e, captions = memories(clips, phi_v)
    image = np.einsum("nfd,f->nd", clips.e_img[trained], phi_v.mix.weight.detach().numpy().reshape(-1))
    for m, wanted in enumerate((clips.e_txt[trained], image, clips.e_act[trained])):
        wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
        np.testing.assert_allclose(e[:, m], wanted, atol=1e-6)
    assert len(captions) == len(trained) == 32
    for n, caption in zip(trained, captions, strict=True):
        np.testing.assert_array_equal(caption, clips.texts[n])
    text = MemoryPool(e, captions).text(torch.tensor([3]), L)[0]
    assert torch.equal(text[: len(captions[3])], captions[3].float()) and not text[len(captions[3]) :].any()


# -- one step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_the_one_step_form_is_the_plain_backward_however_the_clips_are_split(world, family):
    clips = clips_of(world, family)
    model = make_model(world, clips, model=family)
    loss, plain = plain_step(model, clips)
    assert {name.split(".")[0] for name in plain} == {"brain_model", "mom", "decoder"}  # the heads are frozen
    assert all("lora_" in name for name in plain if name.startswith("decoder"))
    taught = [name for name in plain if "R.3.weight" in name or "W_Q" in name or "lora_A" in name]
    assert all(plain[name].abs().sum() > 0 for name in taught)
    for micro_batch in (4, 2, 1, 3):
        logged, grads = one_step(model, clips, micro_batch)
        assert_gradients(grads, plain)
        torch.testing.assert_close(logged["loss"], loss)
    model.brain_model.gradient_checkpointing = True  # the conditioning, too, is computed again
    assert_gradients(one_step(model, clips, 2)[1], plain)
    terms = sum(logged[name] for name in ("diffusion", "image", "text", "action"))
    torch.testing.assert_close(logged["loss"], terms + 0.5 * logged["category"])
    assert abs(sum(logged[w] for w in ("w_txt", "w_img", "w_act")) - 1) < 1e-6


def test_compiled_blocks_have_the_same_gradients(world, clips):
    """--compile, with what the blocks of Brain Model and DiT recompute."""
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    logged, grads = one_step(make_model(world, clips), clips, 2)
    model = make_model(world, clips)
    model.brain_model.gradient_checkpointing = True
    model.decoder.transformer.enable_gradient_checkpointing(recompute)
    compile_blocks(model.brain_model.blocks, model.decoder.transformer)
    compiled, compiled_grads = one_step(model, clips, 2)
    torch.testing.assert_close(compiled["loss"], logged["loss"])
    assert_gradients(compiled_grads, grads, rtol=1e-3)


def test_f_fuse_starts_as_the_text_and_eq_9_teaches_router_and_brain_model_after_one_step(world):
    clips = clips_of(world, condition_dropout=0)
    torch.manual_seed(4)
    model = make_model(world, clips, mom=MixtureOfMemories(L, WIDTH, D, D_TXT, 5, 4))
    model.tau, model.lambda_1, model.lambda_2 = 1e6, 0.0, 0.0  # Eq. 3 leaves no gradient
    batch = clips.batch(STEP)
    _, recalled = model(batch.x, batch.excluded)
    assert torch.equal(recalled.f_fuse, model.pool.text(recalled.indices[:, 0], L))
    optimiser = torch.optim.AdamW([*model.brain_model.parameters(), *model.mom.parameters()], 1e-2)
    train_step(model, batch, Config(micro_batch=4, precision="fp32"))
    optimiser.step()
    before = gradients(model)
    _, after = one_step(model, clips, 4)
    for name in (
        "mom.router.R.3.weight",
        "brain_model.regression.contract.weight",
        "brain_model.to_f_c.weight",
    ):
        assert before[name].abs().max() < 1e-6 < after[name].abs().max() / 10, name  # 1e-6: of Eq. 3 at 1e6
    assert before["mom.integration.Z_fMRI.weight"].abs().max() > 1e-5


def test_without_mom_eq_9_teaches_the_decoder_alone(world, clips):
    """f_fuse has no gradient there: Brain Model and its gradients are those of Eq. 3 alone."""
    model = make_model(world, clips, mom=TopTextMemory(L))
    for name, p in model.decoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    logged, grads = one_step(model, clips, 2)
    assert {name.split(".")[0] for name in grads} == {"brain_model", "decoder"}
    assert "z_f/z_t" not in logged and (logged["w_txt"], logged["w_img"]) == (1, 0)
    batch = clips.batch(STEP)
    stage1_loss(model.heads, model.brain_model(batch.x)[0], batch, **WEIGHTS).loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-7)
    assert any(grads[name].abs().max() > 0 for name in grads if "lora_A" in name)


def test_without_integration_the_plain_backward_is_the_same(world, clips):
    torch.manual_seed(3)
    model = make_model(world, clips, mom=DirectProjection(WIDTH, D_TXT))
    loss, plain = plain_step(model, clips)
    logged, grads = one_step(model, clips, 2)
    assert not logged.keys() & {"alike", "w_txt", "z_f/z_t"} and grads["mom.project.weight"].abs().max() > 0
    assert_gradients(grads, plain)
    torch.testing.assert_close(logged["loss"], loss)


def test_the_mean_over_processes_is_the_step_of_one(world, clips):
    """Eq. 9, its share of f.grad and the logged loss, of two processes one after the other. Eq. 3 is left
    out: its processes must meet (test_heads.py)."""
    model = make_model(world, clips)
    model.tau, model.lambda_1, model.lambda_2 = 1e6, 0.0, 0.0
    logged, grads = one_step(model, clips, 4)
    (first, a), (second, b) = (one_step(model, clips, 3, clips.batch(STEP, rank, 2)) for rank in (0, 1))
    torch.testing.assert_close((first["diffusion"] + second["diffusion"]) / 2, logged["diffusion"])
    assert_gradients({name: (a[name] + b[name]) / 2 for name in a}, grads)


def test_hidden_voxels_belong_to_seed_step_and_clip(world):
    all_voxels, some = (clips_of(world, batch_size=48, voxel_dropout=share) for share in (0, 0.25))
    x, hidden = all_voxels.batch(STEP).x, some.batch(STEP).x
    torch.testing.assert_close(hidden, torch.where(hidden == 0, 0, x / 0.75))
    assert abs((hidden == 0).float().mean() - 0.25) < 0.04
    assert torch.equal(some.batch(STEP, 1, 2).x, hidden[24:])
    torch.testing.assert_close(some.clips_of_step(0), np.random.default_rng([0, 0]).permutation(48))
    assert (
        (some.batch(0).x[some.clips_of_step(0).argsort()] == 0)
        .ne(hidden[some.clips_of_step(STEP).argsort()] == 0)
        .any()
    )


def test_four_clips_are_learnt_by_heart_until_the_videos_match():
    """With toy/wan, random fMRI and only memories of other clips: what is reconstructed is what was watched,
    and no other of the four."""
    torch.manual_seed(0)
    rng, kinds = np.random.default_rng(0), combinations()[0]
    films = [random_clip(kinds[i], rng) for i in rng.permutation(len(kinds))[:14]]
    decoder = load_decoder(REPO / "toy" / "wan", transformer=True, vae=True, text_encoder=True)
    video = torch.from_numpy(np.stack([render(film) for film in films[:4]]))  # (4, 17, 64, 64, 3)
    captions, (empty,) = decoder.encode_text([film.caption for film in films[4:]]), decoder.encode_text([""])

    def unit(*shape: int) -> Tensor:
        return normalize(torch.randn(*shape), dim=-1)

    model = assemble(
        BrainModel(50, 1, 16, 128, 2, 4, 64),
        Stage1Heads(64, 8, 5),
        MixtureOfMemories(16, 128, 64, 64, 5, 4, text_rms=torch.cat(captions).square().mean().sqrt().item()),
        MemoryPool(unit(10, 3, 64), captions),
        decoder,
        pad(empty, (0, 0, 0, 16 - len(empty))),
        (17, 64, 64),
    )
    y = decoder.encode_latents(video)
    batch = Batch(
        torch.arange(4),
        torch.randn(4, 1, 50),
        unit(4, 8, 64),
        unit(4, 64),
        unit(4, 64),
        torch.zeros(4, 5),
        y=y,
    )
    lora = [p for p in decoder.parameters() if p.requires_grad]
    groups = [(model.brain_model.parameters(), 3e-3), (model.mom.parameters(), 3e-3), (lora, 1e-3)]
    optimiser = torch.optim.AdamW([{"params": [*parameters], "lr": lr} for parameters, lr in groups])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [lr for _, lr in groups], total_steps=400)
    for step in range(400):
        generator = noise_generator(0, step)
        noise, u = torch.randn(y.shape, generator=generator), torch.rand(4, generator=generator)
        dropped = (torch.rand(4, generator=generator) < 0.1)[:, None, None]
        train_step(
            model, batch._replace(noise=noise, u=u, dropped=dropped), Config(micro_batch=4, precision="fp32")
        )
        torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step(), optimiser.zero_grad(), schedule.step()
    with torch.inference_mode():
        f_fuse = model(batch.x)[1].f_fuse
        generators = [noise_generator(0, i) for i in range(4)]
        shown = decoder.generate(f_fuse, model.empty, model.size, generators, 16, 3.0)
    error = ((shown[:, None].float() - video.float()) / 255).square().mean((2, 3, 4, 5))
    psnr = -10 * error.log10()  # (4 shown, 4 watched)
    others = (psnr - 99 * torch.eye(4)).max(1).values
    assert psnr.diag().min() > 18 and (psnr.diag() - others).min() > 2, psnr


# -- the script ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(world) -> Path:
    done = stage2(world, *SAMPLES)
    assert done.returncode == 0, done.stderr
    assert not chatter(done)
    counts = re.search(r"48 clips and memories; a clip may retrieve (\d+) to (\d+)", done.stdout).groups()
    few, many = map(int, counts)
    assert 5 <= few < many <= 32  # 48 clips less the own segment, and for some the planted copies
    return folder_of(world, "full")


def test_a_run_logs_what_it_learns_and_starts_from_stage_1(world, trained):
    rows = log(trained)
    assert [row["step"] for row in rows] == list(range(12))  # 2 epochs of 48 clips, 8 a step
    assert rows[0]["z_f/z_t"] == 0 < rows[-1]["z_f/z_t"]
    for row in rows:
        parts = sum(row[name] for name in ("diffusion", "image", "text", "action", "category"))
        assert row["loss"] == pytest.approx(parts, abs=1e-4)
    config = json.loads((trained / "config.json").read_text())
    assert config["K"] == 5 and config["step"] == config["steps_in_all"] == 12
    assert config["stage1_config"]["tau"] == 0.07 and config["stage1_config"]["step"] == 9
    assert (trained / "losses.png").stat().st_size > 5000
    stage1 = trained.parent / "stage1"
    start, end = (BrainModel.from_pretrained(at / "brain_model").state_dict() for at in (stage1, trained))
    assert all(not torch.equal(start[name], end[name]) for name in start)
    assert sha256(stage1 / "heads/model.safetensors") == sha256(trained / "heads/model.safetensors")
    mom = MixtureOfMemories.from_pretrained(trained / "mixture_of_memories")
    assert mom.integration.Z_fMRI.weight.abs().max() > 0
    pipe = WanPipeline.from_pretrained(world / "models" / "wan")
    pipe.load_lora_weights(trained / "lora")
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in pipe.transformer.named_parameters())
    assert not list(trained.rglob("*.part*")), "left over"


def test_samples_show_the_stimulus_beside_the_reconstruction(trained):
    with Image.open(trained / "samples" / "step-000012.gif") as gif:
        assert gif.n_frames == 9
        frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(gif)]
    height, width = frames[0].shape[:2]  # two columns of pictures 128 high, two rows of them
    assert 2 * 128 < height < 420 and 2 * 128 < width < 320
    moves = abs(frames[0] - frames[4]).max(2)  # the stimulus moves: its bar, in the left column
    assert moves[:, : width // 2].max() > 60


def test_a_finished_run_is_a_shared_folder(world, trained, tmp_path, monkeypatch):
    """Copied, it makes the same f_fuse and videos where there is no data/."""
    shutil.copytree(trained, tmp_path / "shared")
    (tmp_path / "models").symlink_to(world / "models")
    clips, x = clips_of(world), clips_of(world, split="test").averaged()[:2]
    monkeypatch.chdir(world)
    run = CineNeuron.from_pretrained(trained.parent)
    monkeypatch.chdir(tmp_path)
    shared = CineNeuron.from_pretrained("shared")
    assert torch.equal(run.remember(x).f_fuse, shared.remember(x).f_fuse)
    videos = shared.reconstruct(x, steps=2)
    assert videos.shape == (2, *SIZE, 3) and np.array_equal(run.reconstruct(x, steps=2), videos)
    assert shared.lines == clips.lines and np.array_equal(shared.voxels["roi"], clips.roi)
    e, captions = memories(clips, shared.heads.phi_v)
    assert torch.equal(shared.pool.e, e) and torch.equal(shared.empty, torch.tensor(clips.empty))
    assert all(torch.equal(*pair) for pair in zip(shared.pool.captions, captions, strict=True))
    assert (shared.tau, shared.lambda_1, shared.size) == (0.07, 1.0, SIZE)


SAVED = ["brain_model/model", "mixture_of_memories/model", "lora/pytorch_lora_weights", "memories"]


def assert_bit_equal(a: Path, b: Path) -> None:
    """Two runs' weights; not the bytes, since safetensors writes its metadata in any order."""
    for name in SAVED:
        one, other = load_file(a / f"{name}.safetensors"), load_file(b / f"{name}.safetensors")
        assert one.keys() == other.keys(), name
        assert all(torch.equal(one[key], other[key]) for key in one), name


def started(world: Path, run: str, lines: int, number: int) -> subprocess.CompletedProcess:
    """The script, sent a signal once log.jsonl of the run has so many lines."""
    options = [*RUN, "--decoder", "models/wan", "--run", run]
    return signalled("train_stage2.py", options, world, folder_of(world, run) / "log.jsonl", lines, number)


def test_a_killed_run_goes_on_bit_equal(world, trained):
    """Killed at some moment after the first checkpoint; twice, the second time while it goes on."""
    out = folder_of(world, "killed")
    write_stage1(world, "killed-s0")
    for until in (3, 8):
        assert started(world, "killed", until, signal.SIGKILL).returncode == -signal.SIGKILL
        for file in out.rglob("*.safetensors"):
            if ".part" not in str(file):
                load_file(file)
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # as a kill may leave it
    step = torch.load(out / "state" / "state.pt", weights_only=True)["step"]
    assert 2 <= step < 12
    done = stage2(world, "--run", "killed", *SAMPLES)
    assert done.returncode == 1 and "sampling_steps" in done.stderr, "other settings"
    done = stage2(world, "--run", "killed")
    assert done.returncode == 0, done.stderr
    assert_bit_equal(out, trained)  # which, besides, has shown samples
    assert [row["loss"] for row in log(out)] == [row["loss"] for row in log(trained)]


def test_sigterm_saves_the_step_and_the_same_command_goes_on(world, trained):
    write_stage1(world, "stopped-s0")
    out = folder_of(world, "stopped")
    done = started(world, "stopped", 3, signal.SIGTERM)
    step = json.loads((out / "config.json").read_text())["step"]
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"saved after step {step} of 12; the same command goes on"
    assert stage2(world, "--run", "stopped").returncode == 0
    assert_bit_equal(out, trained)
    again = stage2(world, "--run", "stopped", "--micro_batch", 2)
    assert again.returncode == 0 and "stage2 is finished" in again.stdout


def test_two_processes_train_as_one_does(world, here):
    """Dropout included; and they share the rows of the samples."""
    samples = ["--stage1", "full", "--sample_every", "6", "--samples", "3", "--sampling_steps", "2"]
    here("--run", "one", *samples)
    options = [*RUN, "--decoder", "models/wan", "--run", "two", *samples, "--micro_batch", "3"]
    script = f"import train_stage2\ntrain_stage2.main(train_stage2.parse({options!r}))\n"
    (world / "two.py").write_text(script)  # torch's launcher would take --run for its own
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "two.py",
    ]
    done = subprocess.run(launch, cwd=world, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: python evaluate.py") == 1  # they are one run of two, not two runs
    runs = [folder_of(world, name) for name in ("two", "one")]
    two, one = (Image.open(run / "samples" / "step-000006.gif").convert("RGB") for run in runs)
    assert two.size == one.size
    assert abs(np.asarray(two, np.float32) - np.asarray(one, np.float32)).mean() < 2  # of 255
    two, one = map(log, runs)
    assert len(two) == len(one) == 12
    for a, b in zip(two, one, strict=True):
        ratio = a.pop("z_f/z_t"), b.pop("z_f/z_t")  # of norms: no mean over clips
        assert ratio[0] == pytest.approx(ratio[1], rel=0.2, abs=1e-5)
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    assert two[0] == pytest.approx(one[0], rel=1e-5, abs=1e-6)  # the gradient's norm, too


def test_a_batch_that_processes_cannot_share_evenly_is_an_error(here, monkeypatch):
    monkeypatch.setattr(train_stage2.training, "start", lambda: SimpleNamespace(num_processes=3))
    with pytest.raises(ValueError, match="--batch_size 8: wanted a multiple of the 3 processes"):
        here()


@pytest.mark.parametrize("ablation", ["no-mom", "no-integration"])
def test_an_ablation_shows_what_its_table_says(world, here, ablation):
    """Without MoM the top-1 text alone conditions the video, without integration a projection of f_e does."""
    here(f"--{ablation}", "--epochs", 1, "--sample_every", 6, "--sampling_steps", 1, "--samples", 1)
    out = folder_of(world, f"full-{ablation}")
    model, x = CineNeuron.from_pretrained(out), clips_of(world, split="test").averaged()
    recalled = model.remember(x)
    with torch.inference_mode():
        f_c, f_e = model.brain_model(x)
    row = log(out)[-1]
    if ablation == "no-mom":
        cosines = normalize(f_c, dim=-1) @ model.pool.e[:, 0].T
        best = recalled.indices[:, 0]
        torch.testing.assert_close(cosines[torch.arange(len(x)), best], cosines.max(1).values)
        assert len(best.unique()) > 1 and torch.equal(recalled.f_fuse, model.pool.text(best, L))
        assert row["w_txt"] == 1 and "z_f/z_t" not in row
    else:
        projected = f_e @ model.mom.project.weight.T + model.mom.project.bias
        torch.testing.assert_close(recalled.f_fuse, projected)
        assert "w_txt" not in row and "alike" not in row
    assert (out / "samples" / "step-000006.gif").is_file()


def test_cogvideox_with_a_segment_held_out_learns_and_samples_change_nothing(world, here, capsys):
    """The same script with a decoder of the other family; the LoRA that it leaves lowers Eq. 9 on its
    clips."""
    write_stage1(world, "held-s0", val_segments="seg2")
    options = "--stage1 held --epochs 6 --K 3 --decoder models/cogvideox --lr_lora 3e-3".split()
    here("--run", "held", *options)
    assert "32 clips and memories" in capsys.readouterr().out
    here("--run", "shown", *options, "--sample_every", 4, "--sampling_steps", 2, "--samples", 1)
    held, shown = folder_of(world, "held"), folder_of(world, "shown")
    assert_bit_equal(held, shown)
    assert len(list((shown / "samples").glob("*.gif"))) == 6
    clips = clips_of(world, "cogvideox")
    f_fuse = CineNeuron.from_pretrained(held).remember(clips.averaged()[:8]).f_fuse  # of seg1, trained on
    y, generator = torch.from_numpy(np.array(clips.latents[:8])), noise_generator(9)
    noise, u = torch.randn(y.shape, generator=generator), torch.rand(8, generator=generator)
    decoder, losses = load_decoder(world / "models" / "cogvideox", 16, transformer=True), []
    for _ in range(2):
        with torch.no_grad():
            losses.append(decoder.diffusion_loss(y, f_fuse, noise, u).mean())
        load_lora(decoder, held / "lora")
    assert losses[1] < 0.99 * losses[0], losses


@pytest.mark.parametrize("options, expected", [([], 1.0), (["--noise_shift", 2.5], 2.5)])
def test_the_decoder_trains_at_the_noise_that_is_asked_for(here, monkeypatch, options, expected):
    seen = []
    monkeypatch.setattr(train_stage2, "learn", lambda c, a, run, model, *rest: seen.append(model.decoder))
    here("--run", f"noise-{expected}", "--stage1", "full", *options)
    assert [decoder.noise_shift for decoder in seen] == [expected]


@pytest.mark.parametrize("option", ["--checkpointing", "--no-checkpointing"])
def test_brain_model_and_dit_recompute_their_blocks_where_they_are_asked_to(here, monkeypatch, option):
    seen = []
    monkeypatch.setattr(train_stage2, "learn", lambda c, a, run, model, *rest: seen.append(model))
    here("--run", f"blocks{option}", "--stage1", "full", option)
    (model,) = seen
    recomputes = model.brain_model.gradient_checkpointing, model.decoder.transformer.is_gradient_checkpointing
    assert recomputes == (option == "--checkpointing",) * 2


@pytest.mark.parametrize("ablation", ["full", "no-mom", "no-integration"])
def test_each_part_learns_at_the_rate_that_is_asked_for(here, monkeypatch, ablation):
    class Enough(Exception):
        pass

    models, groups, learn = [], [], train_stage2.learn

    def learn_and_keep(config, accelerator, run, model, *clips):
        models.append(model)
        learn(config, accelerator, run, model, *clips)

    def keep_groups(given, *rest):
        groups.extend(([*parameters], lr) for parameters, lr in given)
        raise Enough

    monkeypatch.setattr(train_stage2, "learn", learn_and_keep)
    monkeypatch.setattr(train_stage2.training, "adamw_onecycle", keep_groups)
    switch = [] if ablation == "full" else [f"--{ablation}"]
    rates = ["--lr", 1e-5, "--lr_fusion", 1e-3, "--lr_lora", 1e-2]
    with pytest.raises(Enough):
        here("--run", f"rates-{ablation}", "--stage1", "full", *switch, *rates)
    (model,) = models
    rate = {p: lr for parameters, lr in groups for p in parameters}
    assert groups[0][0] == list(model.brain_model.parameters())  # the group that 8 bits are for
    assert {rate.pop(p) for p in model.brain_model.parameters()} == {1e-5}
    assert {rate.pop(p) for p in model.decoder.parameters() if p.requires_grad} == {1e-2}
    of_mom = {name: rate.pop(p) for name, p in model.mom.named_parameters()}
    assert not rate and len(of_mom) == len(list(model.mom.parameters()))
    if ablation == "full":
        assert {lr for name, lr in of_mom.items() if name.startswith("router.")} == {1e-5}
        assert {lr for name, lr in of_mom.items() if not name.startswith("router.")} == {1e-3}
    else:
        assert set(of_mom.values()) == ({1e-3} if ablation == "no-integration" else set())


def test_training_stops_before_nan_reaches_a_checkpoint(world, here):
    write_stage1(world, "diverges-s0")
    with pytest.raises(ValueError, match=r"step \d+: .*lower --lr"):
        here("--run", "diverges", "--lr", 1e30, "--save_every", 1, "--max_norm", 1e30)
    for file in folder_of(world, "diverges").rglob("*.safetensors"):
        assert all(x.isfinite().all() for x in load_file(file).values() if x.is_floating_point()), file


def test_names_of_runs():
    names = {
        "": ("full", "full"),
        "--no-mom": ("full-no-mom", "full"),
        "--run a": ("a", "a"),
        "--stage1 full-no-cls": ("full-no-cls", "full-no-cls"),
        "--run b --stage1 a": ("b", "a"),
        "--stage1 runs/toy/sub1/x-s0 --no-integration": ("x-no-integration", "runs/toy/sub1/x-s0"),
    }
    for options, (run, stage1) in names.items():
        config = parse(options.split())
        assert (config.run, config.stage1) == (run, stage1), options
    assert parse(["--data", "cc2017"]).lr_fusion == 1e-6
    assert parse(["--data", "cc2017", "--lr-fusion", "1e-4"]).lr_fusion == 1e-4
    assert parse(["--data", "cinebrain"]) == Config(
        data="cinebrain", run="full", stage1="full", frames=33, height=480, width=720, lr_fusion=1e-6
    )


# -- what does not fit ---------------------------------------------------------------------------------------------


AGAIN = r"python train_stage1.py --data cc2017 --subject 1 --seed 0 --run"
MISFITS = {
    "--run never": rf"never-s0/stage1/config.json is not there: {AGAIN} never",
    "--run voxels": r"'voxels': 41.*data/ has .*'voxels': 40",
    "--run tokens": r"10 tokens, wanted the decoder's 12: train_stage1.py --tokens 12",
    "--run subject": r"'subject': 2.*wanted .*'subject': 1",
    "--run unfinished": rf"'step': 3.*wanted .*'step': 9.*finished run: {AGAIN} unfinished",
    "--run old": rf"no step, wanted step as int: {AGAIN} old",
    "--frames 13": r"latents.npy was made with frames = 9, but frames = 13",
    "--K 40 --run many --stage1 full": r"--K 40: a clip may retrieve \d+ of 48 memories: a lower --K",
    "--batch_size 64": r"a batch of 64 clips, but only 48",
    "--lr_lora 1e-4": r"lr_lora 0.001 \(now 0.0001\)",
    "--guidance 7": r"guidance 5.0 \(now 7.0\)",
    "--attention_heads 5 --run five --stage1 full": "--attention_heads 5: wanted a divisor of 24",
    "--no-mom --no-integration": "two ablations",
}


@pytest.fixture(scope="module")
def misfits(world, trained) -> Path:
    """Runs of stage 1 that do not fit."""
    write_stage1(world, "voxels-s0", voxels=41)
    write_stage1(world, "tokens-s0", tokens=10)
    write_stage1(world, "subject-s0", subject=2)
    write_stage1(world, "unfinished-s0", step=3)
    write_stage1(world, "old-s0")
    config = world / "runs/cc2017/sub1/old-s0/stage1/config.json"
    config.write_text(config.read_text().replace('"step": 9, ', ""))
    return world / "runs"


@pytest.mark.parametrize("options", MISFITS)
def test_what_does_not_fit_is_an_error_and_changes_nothing(misfits, here, options):
    def times() -> dict[Path, float]:
        return {path: path.stat().st_mtime for path in misfits.rglob("*") if path.is_file()}

    before = times()
    with pytest.raises((ValueError, FileNotFoundError), match=MISFITS[options]):
        here(*options.split())
    assert times() == before


def test_a_misfit_is_one_line_of_the_script(world, misfits):
    done = stage2(world, "--run", "tokens")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_stage_1_trained_again_is_noticed(world, here, trained):
    config = trained.parent / "stage1" / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"tau": 0.07', '"tau": 0.08'))
    try:
        with pytest.raises(ValueError, match="stage1_config"):
            here(*SAMPLES)
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
