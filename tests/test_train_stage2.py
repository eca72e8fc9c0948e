"""train_stage2.py on the tiny world: Eq. 10, what a step gets, what a run leaves, goes on from, and refuses."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import environment, run_script
from diffusers import WanPipeline
from PIL import Image, ImageSequence
from safetensors.torch import load_file
from test_data import equal
from test_train_stage1 import log, signalled
from tiny import D_TXT, SIZE, STAGE1_CONFIG, D, L, new_stage2, write_stage1
from torch import Tensor
from torch.nn.functional import normalize
from watch import STAGE2, watch

import train_stage2
from data import Clips, memories, noise_generator
from evaluate import CineNeuron
from heads import Stage1Heads, stage1_loss
from support.options import without
from support.pipelines import load_pipeline
from support.training import compile_blocks
from train_stage2 import Config, main, measures, parse, train_step
from video_decoder import VideoDecoder, recompute

TAU, LAMBDA_1, LAMBDA_2 = (STAGE1_CONFIG[name] for name in ("tau", "lambda_1", "lambda_2"))
SAMPLES = "--sample_every 10 --sampling_steps 2 --samples 2".split()
RUNS = Path("runs/cc2017/sub1")
ABLATIONS = ["no-mom", "no-integration"]
STEP = 3  # some of its clips are dropped, and some are not


@pytest.fixture
def world(tiny, linked) -> Path:
    """The working directory: the tiny world's data and models, and its stage 1 as run full."""
    shutil.copytree(tiny / RUNS / "full-s0" / "stage1", linked / RUNS / "full-s0" / "stage1")
    return linked


def train(*more: object) -> None:
    main(parse([*STAGE2, *map(str, more)]))


def stage2(run: str = "full") -> Path:
    return RUNS / f"{run}-s0" / "stage2"


def total(row: dict):
    """Eq. 10 of the terms that are logged."""
    weighted = LAMBDA_1 * row["action"] + LAMBDA_2 * row["category"]
    return row["diffusion"] + row["image"] + row["text"] + weighted


def clips_of(tiny: Path, model: str = "wan", split: str = "train", **options) -> Clips:
    """The clips with what a decoder reads; a training step has 4 of them."""
    draws = {"batch_size": 4, "voxel_dropout": STAGE1_CONFIG["dropout"], "condition_dropout": 0.5} | options
    return Clips("cc2017", 1, split, None, str(tiny / "models" / model), SIZE, tiny / "data", **draws)


@pytest.fixture(scope="module")
def clips(tiny) -> Clips:
    return clips_of(tiny)


def gradients(model: CineNeuron) -> dict[str, Tensor]:
    """By name; they are None afterwards."""
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return named


def one_step(model: CineNeuron, clips: Clips, micro_batch: int, batch=None) -> tuple[dict, dict]:
    """What is logged, and the gradients by name."""
    batch = batch or clips.batch(STEP)
    losses, recalled = train_step(model, batch, Config(micro_batch=micro_batch, precision="fp32"))
    return losses | measures(model, recalled), gradients(model)


def plain_step(model: CineNeuron, clips: Clips) -> tuple[Tensor, dict]:
    """Eq. 10 as one graph and one backward."""
    batch, heads = clips.batch(STEP), model.heads
    assert 0 < batch.dropped.sum() < 4
    f_c, f_e = model.brain_model(batch.x)
    q = torch.stack([f_c, f_c, heads.phi_a(f_c)], 1)
    f_fuse = model.mom(f_e, q, model.pool, batch.excluded).f_fuse
    prompt = torch.where(batch.dropped, model.empty, f_fuse)
    diffusion = model.decoder.diffusion_loss(batch.y, prompt, batch.noise, batch.u).mean()
    loss = stage1_loss(heads, f_c, batch, TAU, LAMBDA_1, LAMBDA_2).loss + diffusion
    loss.backward()
    return loss.detach(), gradients(model)


def assert_gradients(found: dict, wanted: dict, rtol: float = 1e-4) -> None:
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("model", ["wan", "cogvideox"])
def test_the_empty_prompt_is_the_decoders_own(tiny, model):
    test, pipe = clips_of(tiny, model), load_pipeline(str(tiny / "models" / model), text_encoder=True)
    (empty,) = VideoDecoder(*pipe).encode_text([""])
    assert test.empty.shape == (L, D_TXT) and not test.empty[len(empty) :].any()
    torch.testing.assert_close(torch.tensor(test.empty[: len(empty)]), empty)


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_the_one_step_form_is_the_plain_backward_however_the_clips_are_split(tiny, family):
    clips, model = clips_of(tiny, family), new_stage2(tiny, decoder=family)
    loss, plain = plain_step(model, clips)
    assert {name.split(".")[0] for name in plain} == {"brain_model", "mom", "decoder"}  # the heads are frozen
    assert all("lora_" in name for name in plain if name.startswith("decoder"))
    taught = [name for name in plain if "R.3.weight" in name or "W_Q" in name or "lora_A" in name]
    assert all(plain[name].abs().sum() > 0 for name in taught)
    for micro_batch in (4, 1, 3):
        logged, grads = one_step(model, clips, micro_batch)
        assert_gradients(grads, plain)
        torch.testing.assert_close(logged["loss"], loss)
    model.brain_model.gradient_checkpointing = True  # the conditioning, too, is computed again
    assert_gradients(one_step(model, clips, 2)[1], plain)
    torch.testing.assert_close(logged["loss"], total(logged))


@pytest.mark.parametrize("part", ["mom", "integration"])
def test_an_ablations_step_is_the_plain_backward_too(tiny, clips, part):
    model = new_stage2(tiny, **{part: False})
    loss, plain = plain_step(model, clips)
    logged, grads = one_step(model, clips, 2)
    assert_gradients(grads, plain)
    torch.testing.assert_close(logged["loss"], loss)
    if part == "integration":
        assert not logged.keys() & {"w_txt", "z_f/z_t"}
        assert grads["mom.project.weight"].abs().max() > 0
        return
    assert "z_f/z_t" not in logged and (logged["w_txt"], logged["w_img"]) == (1, 0)
    batch = clips.batch(STEP)  # f_fuse has no gradient: the Brain Model learns from Eq. 3 alone
    f_c, _ = model.brain_model(batch.x)
    stage1_loss(model.heads, f_c, batch, TAU, LAMBDA_1, LAMBDA_2).loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-7)


def test_the_mean_over_processes_is_the_step_of_one(tiny, clips):
    """Of two processes one after the other. Without Eq. 3, whose processes must meet (test_heads.py)."""
    model = new_stage2(tiny)
    model.tau, model.lambda_1, model.lambda_2 = 1e6, 0.0, 0.0
    logged, grads = one_step(model, clips, 4)
    (first, a), (second, b) = (one_step(model, clips, 3, clips.batch(STEP, rank, 2)) for rank in (0, 1))
    torch.testing.assert_close((first["diffusion"] + second["diffusion"]) / 2, logged["diffusion"])
    assert_gradients({name: (a[name] + b[name]) / 2 for name in a}, grads)


def test_the_log_tells_the_router_and_what_the_fmri_adds(tiny, clips):
    model, batch = new_stage2(tiny, alpha=0.7), clips.batch(STEP)
    _, recalled = train_step(model, batch, Config(micro_batch=4, precision="fp32"))
    logged = measures(model, recalled)
    W_r = [logged[name].item() for name in ("w_txt", "w_img", "w_act")]
    assert W_r == pytest.approx(recalled.W_r.mean(0).tolist())
    torch.testing.assert_close(logged["z_f/z_t"], (0.7 * recalled.z_f.norm() / recalled.z_t.norm()).detach())


def test_a_step_gets_the_clips_that_the_files_hold(world):
    """And none retrieves itself, its scene or a copy of it: test_data.py."""
    run, train = watch(train_stage2, STAGE2, 6), clips_of(world, batch_size=8, condition_dropout=0.4)
    for step, (batch, recalled) in enumerate(zip(run.batches, run.recalled, strict=True)):
        assert equal(batch, train.batch(step)) and not batch.excluded.gather(1, recalled.indices).any()
        assert batch.excluded[np.arange(8), batch.clips].all()  # all 45 clips are memories
    assert 0 < sum(int(batch.dropped.sum()) for batch in run.batches) < 6 * 8


def test_the_voxels_are_those_of_stage_1(world):
    write_stage1(world, "visual-s0", voxels=24, rois="visual")
    run = watch(train_stage2, [*STAGE2, "--run", "visual", *SAMPLES, "--sample_every", 1], stop=2)
    assert run.batches[0].x.shape[2] == run.brain_model.voxels == 24 and len(run.samples) == 2
    assert set(run.models[0].voxels["roi"]) == {"L_V1", "R_FFC", "L_MST"}


def test_samples_are_of_clips_spread_over_the_test_set_each_with_its_own_noise(world, monkeypatch):
    drawn = []
    monkeypatch.setattr(train_stage2, "grid_gif", lambda file, *picture: drawn.append(picture))
    run = watch(train_stage2, [*STAGE2, *SAMPLES, "--sample_every", 1, "--samples", 3], stop=1)
    (rows, labels, *_), test, places = drawn[0], clips_of(world, split="test"), [0, 12, 25]
    for (stimulus, _), (caption, _), clip in zip(rows, labels, places, strict=True):
        assert caption == test.lines[clip]["caption"]
        decoded = run.models[0].decoder.decode_latents(torch.tensor(test.latents[clip])[None])[0]
        assert abs(stimulus.astype(int) - decoded.numpy()).max() <= 1
    seeds = [seed for row in run.samples for seed in row["noise"]]
    assert seeds == [noise_generator(0, i).initial_seed() for i in range(3)]
    f_fuse = run.models[0].remember(test.averaged()[places]).f_fuse
    torch.testing.assert_close(torch.cat([row["f_fuse"] for row in run.samples]), f_fuse)


def test_it_starts_from_stage_1_and_leaves_a_finished_model(world):
    run = watch(train_stage2, [*STAGE2, *SAMPLES], stop=99)
    (model,), out, stage1 = run.models, stage2(), stage2().with_name("stage1")
    for part in ("brain_model", "heads"):
        for name, p in load_file(stage1 / part / "model.safetensors").items():
            assert torch.equal(run.start[f"0.{part}.{name}"], p), "it does not start from stage 1"
            assert torch.equal(run.end[f"0.{part}.{name}"], p) == (part == "heads"), name
    assert (model.tau, model.lambda_1, model.lambda_2) == (TAU, LAMBDA_1, LAMBDA_2)
    clips = clips_of(world)
    e, captions = memories(clips, Stage1Heads.from_pretrained(stage1 / "heads").phi_v)
    assert torch.equal(run.start["0.pool.e"], e) and torch.equal(model.empty, torch.tensor(clips.empty))
    rows = log(out)
    assert [row["step"] for row in rows] == list(range(10))  # 2 epochs of 45 clips, 8 a step
    assert rows[0]["z_f/z_t"] == 0 < rows[-1]["z_f/z_t"] and rows[0]["diffusion"] > 0.1
    assert all(row["loss"] == pytest.approx(total(row), abs=1e-4) for row in rows)
    config = json.loads((out / "config.json").read_text())
    assert config["K"] == 5 and config["step"] == config["steps_in_all"] == 10
    assert config["stage1_config"] == json.loads((stage1 / "config.json").read_text())
    assert (out / "losses.png").stat().st_size > 5000 and not list(out.rglob("*.part*"))
    pipe = WanPipeline.from_pretrained("models/wan")
    pipe.load_lora_weights(out / "lora")
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in pipe.transformer.named_parameters())
    with Image.open(out / "samples" / "step-000010.gif") as gif:
        frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(gif)]
    width = frames[0].shape[1]  # two rows of pictures, stimulus and reconstruction
    assert len(frames) == SIZE[0] and abs(frames[0] - frames[4])[:, : width // 2].max() > 60  # the bar moves
    (world / "data").unlink()
    again = CineNeuron.from_pretrained(out.parent)
    assert again.lines == clips.lines and np.array_equal(again.voxels["roi"], clips.roi)
    assert all(torch.equal(*pair) for pair in zip(again.pool.captions, captions, strict=True))


SAVED = ["brain_model/model", "mixture_of_memories/model", "lora/pytorch_lora_weights", "memories"]


def assert_bit_equal(a: Path, b: Path) -> None:
    """Two runs' weights; not the bytes, since safetensors writes its metadata in any order."""
    for name in SAVED:
        one, other = load_file(a / f"{name}.safetensors"), load_file(b / f"{name}.safetensors")
        assert one.keys() == other.keys(), name
        assert all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.parametrize("stop", [3, 4])
def test_stopped_at_any_step_it_goes_on_bit_equal(world, stop):
    """Samples besides, which change nothing."""
    train("--run", "whole", "--stage1", "full")
    options = [*STAGE2, *SAMPLES, "--run", "stopped", "--stage1", "full", "--save_every", 2]
    before = watch(train_stage2, options, stop)
    step = json.loads((stage2("stopped") / "config.json").read_text())["step"]
    assert step == before.saved[-1] == stop // 2 * 2
    with open(stage2("stopped") / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # as a kill may leave it
    rest = watch(train_stage2, options, stop=99)
    assert len(rest.batches) == 10 - step
    assert_bit_equal(stage2("stopped"), stage2("whole"))
    assert [row["loss"] for row in log(stage2("stopped"))] == [row["loss"] for row in log(stage2("whole"))]
    times = {path: path.stat().st_mtime for path in stage2("whole").rglob("*")}
    train("--run", "whole", "--stage1", "full", "--micro_batch", 2)
    assert {path: path.stat().st_mtime for path in stage2("whole").rglob("*")} == times  # finished


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_an_ablation_shows_what_its_table_says(world, ablation):
    """Without MoM the top-1 text alone conditions the video, without integration a projection of f_e does."""
    words = f"--{ablation} --epochs 1 --sample_every 5 --sampling_steps 1 --samples 1".split()
    main(parse([*without(STAGE2, train_stage2.UNUSED), *words]))
    out, x = stage2(f"full-{ablation}"), clips_of(world, split="test").averaged()
    model = CineNeuron.from_pretrained(out)
    with torch.inference_mode():
        f_c, f_e = model.brain_model(x)
        expected = model.mom.project(f_e) if ablation == "no-integration" else None
    if ablation == "no-mom":
        best = (normalize(f_c, dim=-1) @ model.pool.e[:, 0].T).argmax(1)
        assert len(best.unique()) > 1
        expected = model.pool.text(best, L)
    torch.testing.assert_close(model.remember(x).f_fuse, expected)
    assert (out / "samples" / "step-000005.gif").is_file()


def test_cogvideox_with_a_segment_held_out(world, capsys):
    write_stage1(world, "held-s0", val_segments="seg2")
    run = watch(train_stage2, [*STAGE2, *"--run held --K 3 --decoder models/cogvideox".split()], 99)
    assert "30 clips and memories" in capsys.readouterr().out
    trained = torch.cat([batch.clips for batch in run.batches])
    assert not ((trained >= 15) & (trained < 30)).any() and run.batches[0].excluded.shape == (8, 30)
    assert CineNeuron.from_pretrained(stage2("held")).pool.e.shape == (30, 3, D)


@pytest.mark.parametrize("ablation", ["", *ABLATIONS])
def test_each_part_learns_at_the_rate_that_is_asked_for(world, ablation):
    words = [*([f"--{ablation}"] if ablation else []), *"--lr 1e-5 --lr_lora 1e-2".split()]
    words += ["--lr_fusion=1e-3"] * (ablation != "no-mom")
    run = watch(train_stage2, [*without(STAGE2, train_stage2.UNUSED if ablation else ()), *words], stop=1)
    (model,), groups = run.models, run.optimiser.param_groups
    rate = {p: group["max_lr"] for group in groups for p in group["params"]}
    assert groups[0]["params"] == list(model.brain_model.parameters())  # the group that 8 bits are for
    assert {rate.pop(p) for p in model.brain_model.parameters()} == {1e-5}
    assert {rate.pop(p) for p in model.decoder.parameters() if p.requires_grad} == {1e-2}
    of_mom = {name: rate.pop(p) for name, p in model.mom.named_parameters()}
    assert not rate
    wanted = {"": {1e-5, 1e-3}, "no-mom": set(), "no-integration": {1e-3}}
    assert {*of_mom.values()} == wanted[ablation]
    assert all((lr == 1e-5) == name.startswith("router.") for name, lr in of_mom.items())


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_what_an_ablation_does_not_use_is_refused(ablation):
    for name, value in {"K": 7, "own_captions": 0, "alpha": 0, "attention_heads": 8, "lr_fusion": 1}.items():
        words = ["--data", "cc2017", f"--{ablation}", f"--{name}={value}"]
        if ablation in train_stage2.UNUSED[name]:
            with pytest.raises(ValueError, match=f"--{name} with --{ablation}, which does not use it"):
                parse(words)
        else:
            assert getattr(parse(words), name) == value


NAMES = {  # options: run, stage1
    "": ("full", "full"),
    "--no-mom": ("full-no-mom", "full"),
    "--run a": ("a", "a"),
    "--stage1 full-no-cls": ("full-no-cls", "full-no-cls"),
    "--run b --stage1 a": ("b", "a"),
    "--stage1 runs/toy/sub1/x-s0 --no-integration": ("x-no-integration", "runs/toy/sub1/x-s0"),
}


def test_names_of_runs_and_the_papers_defaults():
    for options, names in NAMES.items():
        config = parse(options.split())
        assert (config.run, config.stage1) == names, options
    c = parse(["--data", "cc2017"])
    assert (c.lr, c.lr_fusion, c.epochs, c.batch_size, c.K) == (1e-6, 1e-6, 20, 32, 5)  # §4.1
    assert (c.frames, c.height, c.width) == (57, 624, 624)
    brain = dict(data="cinebrain", frames=33, height=480, width=720)
    assert parse(["--data", "cinebrain"]) == Config(**brain, run="full", stage1="full", lr_fusion=1e-6)


AGAIN = r"python train_stage1.py --data cc2017 --subject 1 --seed 0 --run"
MISFITS = {
    "--run voxels": r"'voxels': 41.*data/ has .*'voxels': 40",
    "--run tokens": r"10 tokens, wanted the decoder's 12: train_stage1.py --tokens 12",
    "--run unfinished": rf"'step': 3.*wanted .*'step': 9.*finished run: {AGAIN} unfinished",
    "--K 31 --run many --stage1 full": r"--K 31: a clip may retrieve \d+ of 45 memories: a lower --K",
    "--guidance 7": r"guidance 5.0 \(now 7.0\)",
    "--no-mom --no-integration": "two ablations",
    "--no-mom --run a": "--attention_heads with --no-mom, which does not use it: wanted one of the two",
    "--samples 3 --run a": "--samples 3 with --sample_every 0, which shows none",
}


def test_what_does_not_fit_is_an_error_and_changes_nothing(world, monkeypatch):
    """Beside runs of stage 1 that do not fit, and one of both stages."""
    runs = {"voxels": {"voxels": 41}, "tokens": {"tokens": 10}, "unfinished": {"step": 3}}
    for name, changes in runs.items():
        write_stage1(world, f"{name}-s0", **changes)
    watch(train_stage2, [*STAGE2, "--save_every", 1], stop=2)
    before = {path: path.stat().st_mtime for path in Path("runs").rglob("*.*")}
    for options, message in MISFITS.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(*options.split())
    assert {path: path.stat().st_mtime for path in Path("runs").rglob("*.*")} == before
    write_stage1(world, tau=0.21)  # trained again
    with pytest.raises(ValueError, match="stage1_config"):
        train("--save_every", 1)
    monkeypatch.setattr(train_stage2.training, "start", lambda device: SimpleNamespace(num_processes=3))
    with pytest.raises(ValueError, match="--batch_size 8: wanted a multiple of the 3 processes"):
        train()


@pytest.mark.slow
def test_killed_the_same_command_goes_on_bit_equal(world):
    train(*SAMPLES, "--save_every", 2, "--run", "whole", "--stage1", "full")
    command = [*STAGE2, *SAMPLES, "--save_every", "2"]
    done = signalled("train_stage2.py", command, world, stage2() / "log.jsonl", 5, signal.SIGKILL)
    assert done.returncode == -9 and 2 <= json.loads((stage2() / "config.json").read_text())["step"] < 10
    assert run_script("train_stage2.py", *command, cwd=world).returncode == 0
    assert_bit_equal(stage2(), stage2("whole"))


@pytest.mark.slow
def test_two_processes_train_as_one_does(world):
    """Dropout included; and they share the rows of the samples."""
    options = [*STAGE2, *"--stage1 full --sample_every 5 --samples 3 --sampling_steps 2".split()]
    main(parse([*options, "--run", "one"]))
    options += ["--run", "two", "--micro_batch", "3"]
    (world / "two.py").write_text(f"import train_stage2 as s; s.main(s.parse({options!r}))")
    launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2 two.py".split()]
    done = subprocess.run(launch, cwd=world, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: python evaluate.py") == 1  # they are one run of two, not two runs
    samples = [stage2(name) / "samples" / "step-000005.gif" for name in ("two", "one")]
    pixels = [np.asarray(Image.open(file).convert("RGB"), np.float32) for file in samples]
    assert abs(pixels[0] - pixels[1]).mean() < 2  # of 255
    two, one = log(stage2("two")), log(stage2("one"))
    assert len(two) == len(one) == 10
    for a, b in zip(two, one, strict=True):
        ratio = a.pop("z_f/z_t"), b.pop("z_f/z_t")
        assert ratio[0] == pytest.approx(ratio[1], rel=0.2, abs=1e-5)  # of norms: no mean over clips
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    assert two[0] == pytest.approx(one[0], rel=1e-5, abs=1e-6)  # the gradient's norm, too


@pytest.mark.slow
def test_compiled_blocks_have_the_same_gradients(tiny, clips):
    """--compile, with what the blocks of Brain Model and DiT recompute."""
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    logged, grads = one_step(new_stage2(tiny), clips, 2)
    model = new_stage2(tiny)
    model.brain_model.gradient_checkpointing = True
    model.decoder.transformer.enable_gradient_checkpointing(recompute)
    compile_blocks(model.brain_model.blocks, model.decoder.transformer)
    compiled, compiled_grads = one_step(model, clips, 2)
    torch.testing.assert_close(compiled["loss"], logged["loss"])
    assert_gradients(compiled_grads, grads, rtol=1e-3)
