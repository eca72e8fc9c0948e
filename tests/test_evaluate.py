"""Evaluation on a tiny hand-made run: reconstruction, its resumption and its split, pictures, one recording, n-way accuracy."""

import json
import math
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import av
import diffusers
import numpy as np
import pytest
import torch
from conftest import REPO, environment, run_script, write_prepared
from PIL import Image
from test_train_stage2 import D_TXT, WIDTH, Films, L
from test_video_decoder import wan_pipeline
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEImageProcessor, ViTConfig, ViTForImageClassification
from transformers import ViTImageProcessor as ImageProcessor

import evaluate
from brain_model import BrainModel
from data import ClipDataset, prepare_decoder
from evaluate import Config, load_run, main, n_way_top_k, other_scenes, read_recording, read_video, recognise, reconstruct, shares
from heads import Stage1Heads
from mixture_of_memories import DirectProjection, MixtureOfMemories, TopTextMemory
from video_decoder import VideoDecoder

diffusers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)

SIZE, D, CLIPS = (9, 32, 32), 16, 6  # frames x height x width, CLIP's width, clips reconstructed
COLOURS, SHAPES = ("red", "blue"), ("circle", "square")
OPTIONS = {"data": "cc2017", "clips": CLIPS, "batch_size": 4, "fps": 4.5, "metrics": "ssim,psnr", "size": "native"}


def write_stage2(root: Path, name: str, module: torch.nn.Module, **changes) -> Path:
    """What train_stage2.py leaves, with a LoRA and zero-convs that are away from zero."""
    out = root / "runs" / "cc2017" / "sub1" / name / "stage2"
    BrainModel(40, 1, L, WIDTH, 1, 4, D).save_pretrained(out / "brain_model")
    Stage1Heads(D, 3, 4).save_pretrained(out / "heads")
    for key, p in module.named_parameters():
        if ".Z_" in key:
            torch.nn.init.normal_(p, std=0.3)
    module.save_pretrained(out / "mixture_of_memories")
    decoder = VideoDecoder.from_pretrained(root / "models" / "wan", 4, 8)
    for key, p in decoder.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.3)
    decoder.save_lora(out / "lora")
    config = {"data": "cc2017", "subject": 1, "decoder": str(root / "models" / "wan"), "mom": True, "integration": True}
    config |= dict(zip(("frames", "height", "width"), SIZE, strict=True)) | {"sampling_steps": 2, "guidance": 2.0}
    (out / "config.json").write_text(json.dumps(config | {"stage1_config": {"rois": None}} | changes))
    return out.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """data/cc2017 with the stimuli's videos, and runs full, no-mom and no-integration; the working directory of these tests."""
    root = tmp_path_factory.mktemp("evaluate")
    folder, films = write_prepared(root / "data"), Films(root)
    (folder / "raw" / "stimuli").mkdir(parents=True)
    for split, names in films.splits.items():
        file = folder / "stimuli" / split / "clips.jsonl"
        rows = [json.loads(line) for line in open(file)]
        for i, row in enumerate(rows):
            row |= {"colour": COLOURS[i % 2], "shape": SHAPES[i // 2 % 2]}
            row["caption"] = f"a {row['colour']} {row['shape']} moves"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in names:
            evaluate.write_video(folder / "raw" / "stimuli" / f"{name}.mp4", np.concatenate(list(films.read_clips(split, name))), 10)
    torch.manual_seed(0)
    pipe = wan_pipeline()
    for p in pipe.transformer.parameters():  # the output layer starts at zero, where nothing can be seen
        p.data += 0.05 * torch.randn_like(p)
    pipe.save_pretrained(root / "models" / "wan")
    prepare_decoder("cc2017", films, root / "data", str(root / "models" / "wan"), *SIZE)
    write_stage2(root, "full-s0", MixtureOfMemories(L, WIDTH, D, D_TXT, 3, 4))
    write_stage2(root, "no-mom-s0", TopTextMemory(L, 3), mom=False)
    write_stage2(root, "no-integration-s0", DirectProjection(WIDTH, D_TXT), integration=False)
    return root


@pytest.fixture(autouse=True)
def here(world, monkeypatch):
    monkeypatch.chdir(world)


@pytest.fixture(scope="module")
def run(world) -> evaluate.Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        return load_run(Path("runs/cc2017/sub1/full-s0"))


@pytest.fixture(scope="module")
def out(world) -> Path:
    """eval/ of the run, as the command leaves it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        main(Config(**OPTIONS))
    return world / "runs" / "cc2017" / "sub1" / "full-s0" / "eval"


# -- reconstruction ------------------------------------------------------------------------------------------------


def test_videos_have_the_frames_size_and_rate_asked_for(out):
    names = [f"{i:04d}.mp4" for i in np.linspace(0, 23, CLIPS).round().astype(int)]
    for kind in ("gt", "recon"):
        assert sorted(path.name for path in (out / kind).iterdir()) == names
        for name in names:
            with av.open(str(out / kind / name)) as video:
                stream = video.streams.video[0]
                assert (stream.frames, stream.height, stream.width, stream.average_rate) == (*SIZE, 4.5)
    films, test = Films(Path()), ClipDataset("cc2017", 1, "test")
    shown = evaluate.video_frames([*films.read_clips("test", "test1")][5], *SIZE)
    assert test.clips[5]["id"] == "test1-005" and abs(read_video(out / "gt" / names[1]).astype(int) - shown).mean() < 3
    assert read_video(out / "recon" / names[0]).std() > 1


def test_what_was_retrieved_is_what_the_model_retrieves(out, run):
    test = ClipDataset("cc2017", 1, "test")
    lines = [json.loads(line) for line in open(out / "retrieved.jsonl")]
    assert [line["clip"] for line in lines] == np.linspace(0, 23, CLIPS).round().astype(int).tolist()
    with torch.inference_mode():
        found = evaluate.remember(run, test.averaged())
    for line in lines:
        i = line["clip"]
        assert line["id"] == test.clips[i]["id"] and line["retrieved"] == found.S[i].topk(3).indices.tolist()
        assert sum(line["W_r"]) == pytest.approx(1, abs=1e-3)


def test_pictures_show_something(out):
    with Image.open(out / "sheet.png") as sheet, Image.open(out / "grid.gif") as grid:
        assert np.asarray(sheet.convert("L")).std() > 20 and sheet.width > 3 * 3 * 100
        assert grid.n_frames == SIZE[0] and grid.info["duration"] == pytest.approx(1000 / 4.5, abs=10)


def test_resumes_and_makes_the_same_video_again(out):
    first, second, *others = sorted((out / "recon").iterdir())
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (first, second, *others)}
    second.unlink()
    main(Config(**OPTIONS))
    assert second.read_bytes() == before[second][0]
    assert all(path.stat().st_mtime_ns == before[path][1] for path in (first, *others))


def test_split_over_processes_changes_nothing(out, run, tmp_path):
    test = ClipDataset("cc2017", 1, "test")
    config = Config(**OPTIONS, steps=2, guidance=2.0)
    clips = np.linspace(0, 23, CLIPS).round().astype(int)
    with torch.inference_mode():
        for rank in (1, 0):
            reconstruct(run, test.averaged(), clips, tmp_path, config, rank, 2)
            assert len(list(tmp_path.iterdir())) == {1: 2, 0: 6}[rank]  # batches of 4 and 2
    assert all((tmp_path / path.name).read_bytes() == path.read_bytes() for path in (out / "recon").iterdir())


def test_two_real_processes_leave_what_one_leaves(world, out):
    """By torchrun: `accelerate launch --cpu` may start one process whatever it is asked for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, str(REPO / "evaluate.py")]
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    kept = out.rename(out.with_name("eval-one-process"))
    done = subprocess.run(
        [*launch, *options], cwd=world, env=environment() | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "reconstructing: 100%|██████████| 1/1" in done.stderr and done.stdout.count("written:") == 1  # of the two batches
    for path in [path for path in kept.rglob("*.*") if path.suffix != ".gif" and path.parent.name != "values"]:
        assert (out / path.relative_to(kept)).read_bytes() == path.read_bytes()


def test_a_clip_has_noise_of_its_own_whatever_the_batch(out, run, tmp_path):
    test = ClipDataset("cc2017", 1, "test")
    with torch.inference_mode():
        reconstruct(run, test.averaged(), np.array([5]), tmp_path, Config(**OPTIONS, steps=2, guidance=2.0))
        reconstruct(run, test.averaged(), np.array([5]), tmp_path / "1", Config(**OPTIONS, steps=2, guidance=2.0, seed=1))
    alone, seed_1 = (read_video(folder / "0005.mp4").astype(int) for folder in (tmp_path, tmp_path / "1"))
    assert abs(alone - read_video(out / "recon" / "0005.mp4")).mean() < 0.1  # rounding differs with the size of the batch
    assert abs(alone - seed_1).mean() > 1


def test_videos_made_otherwise_are_not_mixed(out, world):
    with pytest.raises(ValueError, match=r"guidance': \(2.0, 3.0\).*rm -r runs/cc2017/sub1/full-s0/eval"):
        main(Config(**OPTIONS, guidance=3.0))
    weights = world / "runs" / "cc2017" / "sub1" / "full-s0" / "stage2" / "heads" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + bytes(4))
    with pytest.raises(ValueError, match="weights"):
        main(Config(**OPTIONS))
    weights.write_bytes(kept)


@pytest.mark.parametrize("name", ["no-mom", "no-integration"])
def test_ablations_are_evaluated_alike(world, name):
    main(Config(**OPTIONS | {"clips": 2}, run=name))
    out = world / "runs" / "cc2017" / "sub1" / f"{name}-s0" / "eval"
    assert len(list((out / "recon").iterdir())) == 2 and (out / "sheet.png").is_file()
    assert (out / "retrieved.jsonl").is_file() == (name == "no-mom")  # without integration nothing is sought
    if name == "no-mom":
        assert json.loads(open(out / "retrieved.jsonl").readline())["W_r"] == [1, 0, 0]


def test_the_lora_of_the_run_is_in_its_decoder(world, run):
    decoder = VideoDecoder.from_pretrained(world / "models" / "wan", 4, 8)
    y, f_fuse, t = torch.randn(1, 4, 3, 4, 4), torch.randn(1, L, D_TXT), torch.tensor([500.0])
    with torch.inference_mode():
        without = decoder.predict(y, f_fuse, t)
        decoder.load_lora(world / "runs" / "cc2017" / "sub1" / "full-s0" / "stage2" / "lora")
        torch.testing.assert_close(run.decoder.predict(y, f_fuse, t), decoder.predict(y, f_fuse, t), atol=1e-5, rtol=1e-5)
        assert (run.decoder.predict(y, f_fuse, t) - without).abs().mean() > 1e-3


def test_missing_run_and_stimuli_are_named(world):
    with pytest.raises(FileNotFoundError, match="python train_stage2.py.*trained here: full-s0, no-integration-s0, no-mom-s0"):
        main(Config(data="cc2017", run="other"))
    with pytest.raises(FileNotFoundError, match="nowhere/seg1.mp4 is not there .5 stimuli.*--stimuli"):
        main(Config(**OPTIONS, stimuli="nowhere"))


# -- the control: shuffled fMRI -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(80, 80), (240,) * 5, (40,), (12, 12), (31, 20, 3)])
def test_every_clip_gets_the_fmri_of_another_scene(lengths):
    segments = [f"test{s}" for s, n in enumerate(lengths) for _ in range(n)]
    order = other_scenes(segments)
    assert sorted(order) == list(range(len(segments)))
    assert all(segments[i] != segments[j] or abs(i - j) > 15 for i, j in enumerate(order))


def test_too_few_clips_to_shuffle():
    with pytest.raises(ValueError, match="20 clips of 1 segments"):
        other_scenes(["test1"] * 20)


def test_shuffled_reconstructions_come_from_the_other_clip(world, run, out):
    main(Config(**OPTIONS | {"clips": 2}, shuffle=True))
    shuffled = out.with_name("eval-shuffled")
    assert [path.name for path in sorted((shuffled / "recon").iterdir())] == ["0000.mp4", "0023.mp4"]
    with torch.inference_mode():
        found = evaluate.remember(run, ClipDataset("cc2017", 1, "test").averaged()[[12, 11]]).indices.tolist()
    assert [json.loads(line)["retrieved"] for line in open(shuffled / "retrieved.jsonl")] == found


# -- one recording --------------------------------------------------------------------------------------------------


def test_one_recording_becomes_one_video(world, run, tmp_path):
    x = ClipDataset("cc2017", 1, "test").averaged()
    np.save(tmp_path / "x.npy", x[7, 0].numpy())
    assert torch.equal(read_recording(tmp_path / "x.npy", run), x[7:8])
    np.save(tmp_path / "x.npy", x[7].double().numpy())
    assert torch.equal(read_recording(tmp_path / "x.npy", run), x[7:8])
    done = run_script(
        "evaluate.py", "--data", "cc2017", "--fmri", tmp_path / "x.npy", "--run", "full", "--out", tmp_path / "y.mp4", cwd=world
    )
    assert done.returncode == 0, done.stderr
    assert read_video(tmp_path / "y.mp4").shape == (*SIZE, 3) and "it recalls: a " in done.stdout


@pytest.mark.parametrize(
    "made, message",
    [
        (np.full(40, np.nan), r"x.npy: nan at volume 0, voxel 0; 40 such values in all, wanted none"),
        (np.zeros(41), r"x.npy has the shape \(41,\), wanted \(1, 40\) or \(40,\)"),
        (np.zeros((2, 40)), r"x.npy has the shape \(2, 40\), wanted \(1, 40\) or \(40,\)"),
        (np.zeros((1, 1, 40)), r"x.npy has the shape \(1, 1, 40\), wanted \(1, 40\) or \(40,\)"),
        (np.float32(1), r"x.npy has the shape \(\), wanted"),
        (np.linspace(9000, 11000, 40), "x.npy has values of 1e.04 ± 592.*wanted z-scores"),
        (np.array(["a"] * 40), "x.npy holds <U1, wanted one array of numbers"),
        (np.array([None] * 40), "x.npy is no array of numbers"),
        (b"0.1, 0.2", "x.npy is no array of numbers"),
        (b"", "x.npy is no array of numbers"),
    ],
)
def test_recordings_that_do_not_fit(run, tmp_path, made, message):
    file = tmp_path / "x.npy"
    file.write_bytes(made) if isinstance(made, bytes) else np.save(file, made)
    with pytest.raises(ValueError, match=message):
        read_recording(file, run)


def test_recording_that_is_not_there(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="x.npy is not there"):
        read_recording(tmp_path / "x.npy", run)


# -- classes --------------------------------------------------------------------------------------------------------


def test_n_way_is_the_limit_of_the_trials():
    """Against the peers' loop: hit if any GT class is in the top k of itself and n-1 classes drawn of those that are no GT class."""
    rng = np.random.default_rng(0)
    probs, trials = rng.dirichlet(np.ones(30), 6), 4000
    gt = np.stack([rng.permutation(30)[:3] for _ in probs])
    for n, k in ((2, 1), (10, 1), (10, 3), (27, 2)):
        hits = np.zeros(len(probs))
        for i, (p, classes) in enumerate(zip(probs, gt, strict=True)):
            others = np.setdiff1d(np.arange(30), classes)
            for _ in range(trials):
                drawn = p[rng.choice(others, n - 1, replace=False)]
                hits[i] += any((drawn >= p[c]).sum() < k for c in classes)
        exact = n_way_top_k(probs, gt, n, k)
        np.testing.assert_allclose(hits / trials, exact, atol=4 * (0.25 / trials) ** 0.5)


def test_n_way_by_hand():
    probs = torch.tensor([[0.4, 0.1, 0.3, 0.15, 0.05]] * 2)
    gt = torch.tensor([[2, 1], [0, 4]])  # 0.3 and 0.1; 0.4 and 0.05
    np.testing.assert_allclose(n_way_top_k(probs, gt, 2), [2 / 3, 1])
    np.testing.assert_allclose(n_way_top_k(probs, gt, 3), [math.comb(2, 2) / math.comb(3, 2), 1])
    np.testing.assert_allclose(n_way_top_k(probs, gt, 3, k=2), [1, 1])
    np.testing.assert_allclose(n_way_top_k(torch.ones(1, 5) / 5, gt[:1], 2), [0])  # what cannot be told apart is no hit
    with pytest.raises(ValueError, match="only 3 classes beside those of the GT, wanted 4"):
        n_way_top_k(probs, gt, 5)


@pytest.mark.parametrize("n", [2, 50])
def test_n_way_chance_is_three_of_n_plus_two(n):
    rng = np.random.default_rng(1)
    gt = np.stack([rng.permutation(400)[:3] for _ in range(4000)])
    assert n_way_top_k(rng.random((4000, 400)), gt, n).mean() == pytest.approx(3 / (n + 2), abs=0.01)


def write_classifier(folder: Path, names: list[str], video: bool) -> Path:
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    size = {
        "image_size": 32,
        "patch_size": 16,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    torch.manual_seed(0)
    if video:
        model = VideoMAEForVideoClassification(VideoMAEConfig(**size, **labels, initializer_range=0.5))
        VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        model = ViTForImageClassification(ViTConfig(**size, **labels, initializer_range=0.5))
        ImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    model.half().save_pretrained(folder)
    return folder


def test_attributes_are_read_from_the_classes(out, tmp_path):
    names = [f"a {colour} {shape} moves" for colour, shape in product(COLOURS, SHAPES)]
    video, image = write_classifier(tmp_path / "v", names, True), write_classifier(tmp_path / "i", [f"x {n} y" for n in COLOURS], False)
    files = sorted((out / "gt").iterdir())
    p, found = evaluate.class_probabilities([read_video(files[0])], video)
    assert found == names and p.shape == (1, 4) and p.sum() == pytest.approx(1, abs=1e-5)
    values = {"shape": list(SHAPES), "colour": list(COLOURS), "action": ["jumps"]}
    seen = recognise(files, [str(video)], values)
    assert seen["colour"][0] == COLOURS[int(p[0, 2:].sum() > 0.5)] and seen["shape"][0] == SHAPES[int(p[0, [1, 3]].sum() > 0.5)]
    assert list(seen) == ["shape", "colour"] and set(map(len, seen.values())) == {CLIPS}
    p, _ = evaluate.class_probabilities([read_video(files[0])], image)
    assert recognise(files, [str(image), str(video)], values)["colour"][0] == COLOURS[p[0].argmax()]


def test_shares_of_the_attributes():
    shown = [{"shape": "circle", "colour": "red"}, {"shape": "square", "colour": "red"}]
    found = shares({"shape": ["circle", "circle"], "colour": ["red", "blue"]}, shown)
    assert found == {"shape": 0.5, "colour": 0.5, "all of them": 0.5}


def test_table_of_recognised_attributes(out, world, tmp_path, capsys):
    names = [f"a {colour} {shape} moves" for colour, shape in product(COLOURS, SHAPES)]
    folder = write_classifier(tmp_path / "v", names, True)
    main(Config(**OPTIONS, video_classifier=str(folder)))
    columns = json.loads((out / "recognised.json").read_text())["shares"]
    assert list(columns) == ["reconstruction", "stimulus", "top-1 memory", "chance"]
    assert columns["chance"] == {"shape": 0.5, "colour": 0.5, "all of them": 0.25}
    test, train = (ClipDataset("cc2017", 1, split).clips for split in ("test", "train"))
    lines = [json.loads(line) for line in open(out / "retrieved.jsonl")]
    assert columns["top-1 memory"]["shape"] == np.mean([train[r["retrieved"][0]]["shape"] == test[r["clip"]]["shape"] for r in lines])
    capsys.readouterr()
    main(Config(**OPTIONS | {"clips": 2}, shuffle=True, video_classifier=str(folder)))
    header = next(line for line in capsys.readouterr().out.split("\n") if "held-out clips" in line)
    assert header.index("reconstruction") < header.index("shuffled fMRI") < header.index("chance")
