"""Stage 2 on a tiny prepared dataset with tiny random decoders: Eq. 10 in the one-step form, the script, resuming, what does not fit."""

import json
import os
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
from conftest import REPO, environment, run_script, sha256, write_prepared
from diffusers import WanPipeline
from safetensors.torch import load_file
from test_video_decoder import cogvideox_pipeline, wan_pipeline

from brain_model import BrainModel
from data import ClipDataset, DecoderData, memories, prepare_decoder, video_frames
from heads import Stage1Heads, stage1_loss
from mixture_of_memories import DirectProjection, MemoryPool, MixtureOfMemories, TopTextMemory
from toy.world import combinations, random_clip, render
from train_stage2 import Config, Parts, hide_voxels, losses_and_gradients, main, parse
from video_decoder import VideoDecoder, clip_generator, condition_dropout, draw

diffusers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)

WORDS = "red blue a circle square grows moves".split()
L, D, D_TXT, WIDTH, SIZE = 12, 16, 16, 24, (9, 32, 32)  # text tokens, CLIP's width, the text's, D', frames x height x width
WEIGHTS = {"tau": 0.07, "lambda_1": 1.0, "lambda_2": 0.5}
RUN = ["--data", "cc2017", "--frames", 9, "--height", 32, "--width", 32, "--epochs", 2, "--batch_size", 8, "--micro_batch", 4]
RUN += ["--heads", 4, "--lora_rank", 4, "--sample_every", 0, "--save_every", 2, "--log_every", 1, "--lr", 1e-3, "--lr_lora", 1e-3]


class Films:
    """A source of moving bars, one a clip, for the prepared clips of write_prepared."""

    splits = {"train": ["seg1", "seg2", "seg3"], "test": ["test1", "test2"]}

    def __init__(self, root: Path):
        self.root, self.clips = root, {"train": 16, "test": 12}

    def stimulus(self, segment: str) -> Path:
        path = self.root / f"{segment}.mp4"
        path.write_text(segment)
        return path

    def read_clips(self, split: str, segment: str) -> Iterator[np.ndarray]:
        for k in range(self.clips[split]):
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
        rows = [json.loads(line) | {"caption": " ".join(rng.choice(WORDS, rng.integers(1, 9)))} for line in open(file)]
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
    (out / "config.json").write_text(json.dumps(config | {"tau": 0.07, "lambda_1": 1.0, "lambda_2": 1.0} | changes))


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
    return ClipDataset("cc2017", 1, "train", root=at), DecoderData("cc2017", str(world / "models" / "wan"), "train", at, SIZE)


def make_parts(world: Path, data, mom=None, model: str = "wan") -> Parts:
    """Parts whose LoRA and zero-convs are away from zero where `mom` is not given."""
    torch.manual_seed(2)
    train, _ = data
    videos = DecoderData("cc2017", str(world / "models" / model), "train", world / "data", SIZE)
    stage1 = world / "runs" / "cc2017" / "sub1" / "full-s0" / "stage1"
    brain_model = BrainModel.from_pretrained(stage1 / "brain_model").train()
    brain_model.dropout = torch.nn.Identity()
    heads = Stage1Heads.from_pretrained(stage1 / "heads").requires_grad_(False).eval()
    torch.nn.init.normal_(heads.phi_a.mlp[3].weight, std=0.3)
    pool = MemoryPool(**memories(train, videos, heads.phi_v, np.arange(48)))
    decoder = VideoDecoder.from_pretrained(world / "models" / model, 4, 4)
    if mom is None:
        mom = MixtureOfMemories(L, WIDTH, D, D_TXT, 5, 4, text_rms=pool.text_rms())
        for p in [p for n, p in mom.named_parameters() if ".Z_" in n] + [p for n, p in decoder.named_parameters() if "lora_B" in n]:
            torch.nn.init.normal_(p, std=0.2)
    return Parts(brain_model, heads, mom, decoder, pool, torch.from_numpy(np.array(videos.empty)))


STEP, CLIPS = 5, np.array([3, 40, 17, 25])


def batch_of(data, clips: np.ndarray = CLIPS, step: int = STEP) -> dict[str, torch.Tensor]:
    train, videos = data
    batch = train.batch(clips, 0, step)
    return batch | {"x": hide_voxels(batch["x"], 0.1, 0, step, clips), "y": torch.from_numpy(videos.latents[clips])}


def gradients(parts: Parts) -> dict[str, torch.Tensor]:
    modules = {"brain_model": parts.brain_model, "heads": parts.heads, "mom": parts.mom, "decoder": parts.decoder}
    found = {f"{a}.{b}": p for a, module in modules.items() for b, p in module.named_parameters()}
    grads = {name: p.grad.clone() for name, p in found.items() if p.grad is not None}
    for p in found.values():
        p.grad = None
    return grads


def one_step(parts: Parts, data, micro_batch: int, weights=WEIGHTS, dropout: float = 0.3) -> tuple[dict, dict]:
    """What is logged, and the gradients by name."""
    memory = torch.from_numpy(CLIPS)
    logged = losses_and_gradients(parts, batch_of(data), CLIPS, memory, weights, 0, STEP, micro_batch, dropout, nullcontext)
    return logged, gradients(parts)


def plain_step(parts: Parts, data, dropout: float = 0.3) -> tuple[torch.Tensor, dict]:
    """Eq. 10 as one graph and one backward."""
    batch, (brain_model, heads, mom, decoder, pool, empty) = batch_of(data), parts
    f_c, f_e = brain_model(batch["x"])
    stage1 = stage1_loss(heads, f_c, batch["e_img"], batch["e_txt"], batch["e_act"], batch["categories"], 0.07, 1.0, 0.5)
    f_fuse = mom(f_e, torch.stack([f_c, f_c, heads.phi_a(f_c)], 1), pool, torch.from_numpy(CLIPS)).f_fuse
    noise, u, dropped = draw(0, STEP, CLIPS, batch["y"].shape[1:], dropout)
    loss = stage1.loss + decoder(batch["y"], condition_dropout(f_fuse, empty, dropped), noise, u).mean()
    loss.backward()
    return loss.detach(), gradients(parts)


# -- preparation ---------------------------------------------------------------------------------------------------


def test_prepared_latents_and_text_are_the_decoders_own(world):
    for model in ("wan", "cogvideox"):
        name = str(world / "models" / model)
        videos = DecoderData("cc2017", name, "test", world / "data", SIZE)
        decoder = VideoDecoder.from_pretrained(name, load_transformer=False, load_vae=True, load_text_encoder=True)
        assert videos.latents.dtype == np.float16 and videos.latents.shape == (24, 4, 3, 4, 4)
        shown = [clip for segment in Films.splits["test"] for clip in Films(world).read_clips("test", segment)]
        for i in (0, 7, 23):
            y = decoder.encode_latents(torch.from_numpy(video_frames(shown[i], *SIZE))[None])[0]
            torch.testing.assert_close(torch.tensor(videos.latents[i]).float(), y, rtol=2e-3, atol=2e-3)
            caption = json.loads((world / "data/cc2017/stimuli/test/clips.jsonl").read_text().splitlines()[i])["caption"]
            tokens = videos.text_tokens[videos.text_offsets[i] : videos.text_offsets[i + 1]]
            assert len(tokens) == (L if model == "cogvideox" else len(caption.split()) + 1)
            torch.testing.assert_close(torch.tensor(tokens).float(), decoder.encode_text([caption])[0], rtol=2e-3, atol=2e-3)
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
    with pytest.raises(ValueError, match="6 frames, wanted 57.*--raw"):
        video_frames(clip[:6], 57, 4, 4)


def test_files_of_another_size_vae_or_text_encoder_are_refused(world, tmp_path):
    model = tmp_path / "wan"
    shutil.copytree(world / "models" / "wan", model)
    with pytest.raises(ValueError, match=r"latents.npy was made with frames = 9, but frames = 17.*python data.py cc2017"):
        DecoderData("cc2017", str(model), "train", world / "data", (17, 32, 32))
    for part, file in (("vae", "latents.npy"), ("text_encoder", "text_tokens.npy")):
        weights = next((model / part).glob("*.safetensors"))
        before = weights.read_bytes()
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{file} was made with {part} = '[0-9a-f]+', but {part} = .*--decoder"):
            DecoderData("cc2017", str(model), "train", world / "data", SIZE)
        weights.write_bytes(before)
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="latents and text tokens for .*other are not there"):
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
    assert {name.split(".")[0] for name in plain} == {"brain_model", "mom", "decoder"}  # and none of the frozen heads
    assert all("lora_" in name for name in plain if name.startswith("decoder"))
    assert all(plain[name].abs().sum() > 0 for name in plain if "R.3.weight" in name or "W_Q" in name or "lora_A" in name)
    for micro_batch in (4, 2, 1, 3):
        logged, grads = one_step(parts, data, micro_batch)
        assert grads.keys() == plain.keys()
        torch.testing.assert_close(grads, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logged["loss"], loss)
    terms = logged["diffusion"] + logged["image"] + logged["text"] + logged["action"] + 0.5 * logged["category"]
    torch.testing.assert_close(logged["loss"], terms)
    assert abs(sum(logged[w] for w in ("w_txt", "w_img", "w_act")) - 1) < 1e-6


def test_f_fuse_starts_as_the_text_and_eq_9_teaches_router_and_brain_model_after_one_step(world, data):
    parts = make_parts(world, data, mom=MixtureOfMemories(L, WIDTH, D, D_TXT, 5, 4))
    nothing = {"tau": 1e6, "lambda_1": 0.0, "lambda_2": 0.0}  # Eq. 3 leaves no gradient
    f_c, f_e = parts.brain_model(batch_of(data)["x"])
    found = parts.mom(f_e, torch.stack([f_c, f_c, f_c], 1), parts.pool, torch.from_numpy(CLIPS))
    assert torch.equal(found.f_fuse, parts.pool.text(found.indices[:, 0], L))
    optimiser = torch.optim.AdamW([*parts.brain_model.parameters(), *parts.mom.parameters()], 1e-3)
    taught = ("mom.router.R.3.weight", "brain_model.regression.contract.weight", "brain_model.to_f_c.weight")
    for step in (0, 1):
        batch = batch_of(data)
        losses_and_gradients(parts, batch, CLIPS, torch.from_numpy(CLIPS), nothing, 0, STEP, 4, 0.0, nullcontext)
        if step == 0:
            optimiser.step()
            before = gradients(parts)
    after = gradients(parts)
    for name in taught:
        assert before[name].abs().max() < 1e-6 < after[name].abs().max() / 10, name  # 1e-6: what is left of Eq. 3 at tau = 1e6
    assert before["mom.integration.Z_fMRI.weight"].abs().max() > 1e-5


def test_ablations_give_gradients_where_they_have_weights(world, data):
    parts = make_parts(world, data, mom=TopTextMemory(L))
    torch.manual_seed(3)
    logged, grads = one_step(parts, data, 2)
    assert "z_f/z_t" not in logged and logged["w_txt"] == 1 and {n.split(".")[0] for n in grads} == {"brain_model", "decoder"}
    parts = make_parts(world, data, mom=DirectProjection(WIDTH, D_TXT))
    logged, grads = one_step(parts, data, 2)
    assert "alike" not in logged and grads["mom.project.weight"].abs().max() > 0


def test_hidden_voxels_belong_to_seed_step_and_clip():
    x, clips = torch.ones(4, 1, 4000), np.arange(4)
    hidden = hide_voxels(x, 0.25, 0, 7, clips)
    assert set(hidden.unique().tolist()) == {0, np.float32(1 / 0.75)} and abs((hidden == 0).float().mean() - 0.25) < 0.02
    assert torch.equal(hide_voxels(x[2:], 0.25, 0, 7, clips[2:]), hidden[2:])
    assert not torch.equal(hide_voxels(x, 0.25, 0, 8, clips), hidden) and hide_voxels(x, 0, 0, 7, clips) is x


def test_four_clips_are_learnt_by_heart_until_the_videos_match():
    """With toy/wan, random fMRI and only memories of other clips: what is reconstructed is what was watched, and no other of the four."""
    torch.manual_seed(0)
    rng, unit = np.random.default_rng(0), lambda *shape: torch.nn.functional.normalize(torch.randn(*shape), dim=-1)
    pool_of = combinations()[0]
    clips = [random_clip(pool_of[i], rng) for i in rng.permutation(len(pool_of))[:14]]
    decoder = VideoDecoder.from_pretrained(REPO / "toy" / "wan", load_vae=True, load_text_encoder=True)
    video = torch.from_numpy(np.stack([render(clip) for clip in clips[:4]]))  # (4, 17, 64, 64, 3)
    text, (empty,) = decoder.encode_text([clip.caption for clip in clips[4:]]), decoder.encode_text([""])
    offsets = torch.tensor([0, *np.cumsum([len(tokens) for tokens in text])])
    pool = MemoryPool(unit(10, 3, 64), torch.cat(text), offsets, torch.arange(10), torch.zeros(10, dtype=torch.long), unit(10, 64))
    brain_model, heads = BrainModel(50, 1, 16, 128, 2, 4, 64), Stage1Heads(64, 8, 5).requires_grad_(False)
    mom = MixtureOfMemories(16, 128, 64, 64, 5, 4, text_rms=pool.text_rms())
    parts = Parts(brain_model, heads, mom, decoder, pool, torch.nn.functional.pad(empty, (0, 0, 0, 16 - len(empty))))
    batch = {"x": torch.randn(4, 1, 50), "y": decoder.encode_latents(video), "categories": torch.zeros(4, 5)}
    batch |= {"e_img": unit(4, 8, 64), "e_txt": unit(4, 64), "e_act": unit(4, 64)}
    groups = [(brain_model.parameters(), 3e-3), (mom.parameters(), 3e-3), ([p for p in decoder.parameters() if p.requires_grad], 1e-3)]
    optimiser = torch.optim.AdamW([{"params": [*parameters], "lr": lr} for parameters, lr in groups])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [lr for _, lr in groups], total_steps=400)
    for step in range(400):
        losses_and_gradients(parts, batch, np.arange(4), torch.arange(4), WEIGHTS, 0, step, 4, 0.1, nullcontext)
        torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step(), optimiser.zero_grad(), schedule.step()
    with torch.inference_mode():
        f_c, f_e = brain_model(batch["x"])
        found = mom(f_e, torch.stack([f_c, f_c, heads.phi_a(f_c)], 1), pool)
        shown = decoder.generate(found.f_fuse, parts.empty, 17, 64, 64, [clip_generator(0, i) for i in range(4)], 16, 3.0)
    psnr = -10 * ((shown[:, None].float() - video.float()) / 255).square().mean((2, 3, 4, 5)).log10()  # (4 shown, 4 watched)
    assert psnr.diag().min() > 18 and (psnr.diag() - (psnr - 99 * torch.eye(4)).max(1).values).min() > 2, psnr


# -- the script ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(world) -> Path:
    done = stage2(world, "--sample_every", 12, "--sampling_steps", 2, "--samples", 2)
    assert done.returncode == 0, done.stderr
    few, many = map(int, re.search(r"may retrieve (\d+) to (\d+) of them", done.stdout).groups())
    assert 5 <= few < many <= 32  # 48 clips less the own segment, and for some the planted copies
    return world / "runs/cc2017/sub1/full-s0/stage2"


def test_a_run_holds_all_that_is_needed_to_use_it(world, trained):
    steps = 2 * (48 // 8)
    rows = [json.loads(line) for line in open(trained / "log.jsonl")]
    assert [row["step"] for row in rows] == list(range(steps)) and rows[0]["z_f/z_t"] == 0 < rows[-1]["z_f/z_t"]
    assert all(abs(row["loss"] - row["diffusion"] - row["image"] - row["text"] - row["action"] - row["category"]) < 1e-4 for row in rows)
    near = json.loads((trained / "near_copies.json").read_text())
    assert set(near["best_match"]) == {"held out", "training, all", "training, left"}
    config = json.loads((trained / "config.json").read_text())
    assert config["K"] == 5 and config["stage1_config"]["tau"] == 0.07
    for picture in ("losses.png", "near_copies.png"):
        assert (trained / picture).stat().st_size > 5000
    from PIL import Image

    with Image.open(trained / "samples" / "step-000012.gif") as gif:
        assert gif.size == (64, 64) and gif.n_frames == 9  # two clips, stimulus beside reconstruction
    start, end = (BrainModel.from_pretrained(at / "brain_model").state_dict() for at in (trained.parent / "stage1", trained))
    assert all(not torch.equal(start[name], end[name]) for name in start)
    assert BrainModel.from_pretrained(trained / "brain_model").dropout.p == 0.1
    before, after = (sha256(at / "heads" / "model.safetensors") for at in (trained.parent / "stage1", trained))
    assert before == after
    mom = MixtureOfMemories.from_pretrained(trained / "mixture_of_memories")
    assert mom.integration.Z_fMRI.weight.abs().max() > 0
    pipe = WanPipeline.from_pretrained(world / "models" / "wan")
    pipe.load_lora_weights(trained / "lora")
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in pipe.transformer.named_parameters())
    assert not list(trained.rglob("*.part*")), "left over"


def test_a_killed_run_resumes_bit_equal(world, trained):
    """Killed at some moment after the first checkpoint; twice, the second time while it resumes."""
    out = world / "runs/cc2017/sub1/killed-s0/stage2"
    write_stage1(world, "killed-s0")
    command = [sys.executable, str(REPO / "train_stage2.py"), *map(str, RUN), "--decoder", "models/wan", "--run", "killed"]
    for resume, until in (([], 3), (["--resume"], 8)):
        process = subprocess.Popen([*command, *resume], cwd=world, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 200
        log = out / "log.jsonl"
        while not (log.is_file() and log.read_text().count("\n") >= until) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert process.poll() is None, "ended before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for file in out.rglob("*.safetensors"):
            if ".part" not in str(file):
                load_file(file)
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 9, "lo')  # as a kill may leave it
    step = torch.load(out / "state" / "state.pt", weights_only=True)["step"]
    assert 2 <= step < 12
    done = stage2(world, "--run", "killed", "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("brain_model/model.safetensors", "mixture_of_memories/model.safetensors", "lora/pytorch_lora_weights.safetensors"):
        a, b = load_file(out / name), load_file(trained / name)  # not the bytes: safetensors writes its metadata in any order
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    losses = [[json.loads(line)["loss"] for line in open(run / "log.jsonl")] for run in (out, trained)]
    assert losses[0] == losses[1]


def test_two_processes_train_as_one_does(world, trained):
    options = [*map(str, RUN), "--decoder", "models/wan", "--run", "two", "--stage1", "full", "--micro_batch", "3"]
    code = f"import train_stage2\ntrain_stage2.main(train_stage2.parse({options!r}))\n"
    (world / "two.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "two.py"]
    done = subprocess.run(launch, cwd=world, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: python evaluate.py") == 1  # they are one run of two, not two runs
    two, one = ([json.loads(line) for line in open(run / "log.jsonl")] for run in (world / "runs/cc2017/sub1/two-s0/stage2", trained))
    assert len(two) == len(one) == 12
    for a, b in zip(two, one, strict=True):
        assert a.pop("z_f/z_t") == pytest.approx(b.pop("z_f/z_t"), rel=0.05, abs=1e-6)  # a ratio of norms: the mean of two is another
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    assert two[0] == pytest.approx(one[0], rel=1e-5, abs=1e-6)  # the gradient's norm, too


@pytest.mark.parametrize("ablation", ["no-mom", "no-integration"])
def test_ablations_run(world, here, ablation):
    here(f"--{ablation}", "--epochs", 1, "--sample_every", 6, "--sampling_steps", 1, "--samples", 1)
    out = world / f"runs/cc2017/sub1/full-{ablation}-s0/stage2"
    kind = {"no-mom": TopTextMemory, "no-integration": DirectProjection}[ablation]
    assert isinstance(kind.from_pretrained(out / "mixture_of_memories"), kind) and (out / "samples" / "step-000006.gif").is_file()


def test_cogvideox_and_a_segment_held_out_run_through_the_same_script(world, here, capsys):
    write_stage1(world, "held-s0", val_segments="seg2")
    options = ["--epochs", 1, "--K", 3, "--sample_every", 4, "--sampling_steps", 2, "--samples", 1]
    last = here("--run", "held", *options, "--decoder", "models/cogvideox")
    assert last["step"] == 3 and "32 clips and memories" in capsys.readouterr().out


def test_names_of_runs():
    names = [([], ("full", "full")), (["--no-mom"], ("full-no-mom", "full")), (["--run", "a"], ("a", "a"))]
    names += [(["--stage1", "full-no-cls"], ("full-no-cls", "full-no-cls")), (["--run", "b", "--stage1", "a"], ("b", "a"))]
    names += [(["--stage1", "runs/toy/sub1/x-s0", "--no_integration"], ("x-no-integration", "runs/toy/sub1/x-s0"))]
    for argv, (run, stage1) in names:
        config = parse(argv)
        assert (config.run, config.stage1) == (run, stage1), argv
    assert parse(["--data", "cc2017"]).lr_fusion == 1e-6 and parse(["--data", "cc2017", "--lr-fusion", "1e-4"]).lr_fusion == 1e-4
    assert isinstance(parse([]), Config)


# -- what does not fit ---------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_in_a_line(world, here, trained):
    write_stage1(world, "voxels-s0", voxels=41)
    write_stage1(world, "tokens-s0", tokens=10)
    write_stage1(world, "subject-s0", subject=2)
    cases = [
        (["--run", "never"], r"brain_model is not there: python train_stage1.py --data cc2017 --subject 1 --seed 0 --run never"),
        (["--run", "voxels"], r"'voxels': \(41, 40\)"),
        (["--run", "tokens"], r"has 10 tokens, the text of models/wan 12"),
        (["--run", "subject"], r"is of cc2017, subject 2; wanted cc2017, subject 1"),
        (["--frames", 13], r"latents.npy was made with frames = 9, but frames = 13.*python data.py"),
        (["--K", 40], r"leave a clip \d+; wanted K = 40"),
        (["--batch_size", 64], r"a batch of 64 clips, but only 48"),
        (["--run", "none", "--stage1", "full", "--resume"], r"there is no checkpoint to resume"),
        (["--resume", "--lr_lora", 1e-4], r"'lr_lora': \(0.001, 0.0001\)"),
    ]
    for args, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            here(*args)
    done = stage2(world, "--run", "voxels")
    assert done.returncode != 0 and "error: " in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(SystemExit):
        parse(["--no-mom", "--no-integration"])
