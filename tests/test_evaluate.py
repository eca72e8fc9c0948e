"""Evaluation on a tiny hand-made run: reconstruction, its resumption and its split, pictures, one recording."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import av
import diffusers
import numpy as np
import pytest
import torch
from conftest import REPO, chatter, environment, run_script, write_prepared
from metrics.run import read_recording
from PIL import Image
from safetensors.torch import load_file, save_file
from test_metrics import write_classifier
from test_video_decoder import wan_pipeline

import evaluate
from brain_model import BrainModel
from data import ClipDataset, far_apart, held_out_clips, mean_frames
from evaluate import CineNeuron, Config, main, parse, reconstruct
from heads import Stage1Heads
from metrics.attributes import class_probabilities, recognise, shares
from metrics.pairs import other_scenes
from mixture_of_memories import DirectProjection, MixtureOfMemories, TopTextMemory
from prepare.decoder import prepare_decoder
from support.videos import read_video, video_frames, write_video
from video_decoder import VideoDecoder

diffusers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)

L, WIDTH, D_TXT = 12, 24, 16  # text tokens, D', the text's width
SIZE, D, CLIPS = (9, 32, 32), 16, 6  # frames x height x width, CLIP's width, clips reconstructed
COLOURS, SHAPES = ("red", "blue"), ("circle", "square")
OPTIONS = {
    "data": "cc2017",
    "clips": CLIPS,
    "batch_size": 4,
    "fps": 4.5,
    "metrics": "ssim,psnr",
    "size": "native",
}
EVAL = f"eval-{CLIPS}-clips-ssim-psnr"  # the folder of such an evaluation
RUN = Path("runs/cc2017/sub1/full-s0")


class Films:
    """A release of moving bars, one a clip, for the prepared clips of write_prepared."""

    splits = {"train": ["seg1", "seg2", "seg3"], "test": ["test1", "test2"]}

    def __init__(self, root: Path):
        self.root = root

    def stimulus(self, segment: str) -> list[Path]:
        path = self.root / f"{segment}.mp4"
        path.write_text(segment)
        return [path]

    def read_clips(self, segment: str) -> Iterator[np.ndarray]:
        for k in range(12 if segment.startswith("test") else 16):
            clip = np.full((20, 40, 48, 3), 40, np.uint8)
            for t, frame in enumerate(clip):
                frame[:, (t + 3 * k) % 40 :][:, :8, k % 3] = 230
            yield clip


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
    config = {
        "data": "cc2017",
        "subject": 1,
        "decoder": str(root / "models" / "wan"),
        "mom": True,
        "integration": True,
    }
    config |= dict(zip(("frames", "height", "width"), SIZE, strict=True)) | {
        "sampling_steps": 2,
        "guidance": 2.0,
    }
    config |= {"lora_rank": 4, "lora_alpha": 8, "step": 6, "steps_in_all": 6}
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
            bars = np.concatenate(list(films.read_clips(name)))
            write_video(folder / "raw" / "stimuli" / f"{name}.mp4", bars, 10)
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
def model(world) -> CineNeuron:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        return CineNeuron.from_pretrained(RUN)


@pytest.fixture(scope="module")
def out(world) -> Path:
    """The folder of an evaluation of six clips, as the command leaves it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        assert main(Config(**OPTIONS)) == 0
    return world / RUN / EVAL


def held_out() -> ClipDataset:
    return ClipDataset("cc2017", 1, "test")


def chosen() -> np.ndarray:
    return np.linspace(0, 23, CLIPS).round().astype(int)


# -- reconstruction ---------------------------------------------------------------------------------------


def test_videos_have_the_frames_size_and_rate_asked_for(out):
    names = [f"{i:04d}.mp4" for i in chosen()]
    for kind in ("gt", "recon"):
        assert sorted(path.name for path in (out / kind).iterdir()) == names
        for name in names:
            with av.open(str(out / kind / name)) as video:
                stream = video.streams.video[0]
                assert (stream.frames, stream.height, stream.width, stream.average_rate) == (*SIZE, 4.5)
    shown = video_frames([*Films(Path()).read_clips("test1")][5], *SIZE)
    assert held_out().clips[5]["id"] == "test1-005"
    assert abs(read_video(out / "gt" / names[1]).frames.astype(int) - shown).mean() < 3


def test_class_and_command_make_the_same_video(out, model):
    """The example of CineNeuron's docstring; in one batch of four, as the command."""
    clips = chosen()[:4]
    videos = model.reconstruct(held_out().averaged()[clips], [(0, int(i)) for i in clips])
    assert videos.shape == (4, *SIZE, 3) and videos.dtype == np.uint8
    for i, video in zip(clips, videos, strict=True):
        written = read_video(out / "recon" / f"{i:04d}.mp4").frames
        assert abs(written.astype(int) - video).mean() < 3 < abs(written.astype(int) - 128).mean()


def test_noise_and_sampling_of_the_class(model):
    x = held_out().averaged()[:1]
    video = model.reconstruct(x)
    assert np.array_equal(
        video, model.reconstruct(x, [(0, 0)], steps=2, guidance=2.0)
    )  # the run's, by default
    for other in ({"seeds": [(1, 0)]}, {"seeds": [(0, 1)]}, {"steps": 3}, {"guidance": 0.0}):
        assert abs(video.astype(int) - model.reconstruct(x, **other)).mean() > 0.5, other


def test_what_was_retrieved_is_what_the_model_retrieves(out, model):
    test, lines = held_out(), [json.loads(line) for line in open(out / "retrieved.jsonl")]
    assert [line["clip"] for line in lines] == chosen().tolist()
    found = model.remember(test.averaged())
    for line in lines:
        i = line["clip"]
        assert line["id"] == test.clips[i]["id"]
        assert line["retrieved"] == found.S[i].topk(3).indices.tolist()
        assert line["W_r"] == pytest.approx(found.W_r[i].tolist(), abs=1e-4)


def cell(picture: Image.Image, row: int, column: int, rows: int, columns: int) -> np.ndarray:
    """The upper part of one cell of a page, without its title and label."""
    W, H = picture.width / columns, picture.height / rows
    box = (column * W + 12, row * H + 40, (column + 1) * W - 12, row * H + H * 0.6)
    return np.asarray(picture.convert("RGB").crop([int(x) for x in box]), int)


def test_sheet_shows_stimulus_memory_and_reconstruction(out, model):
    """Every column has the colours of the video that it should show, and not of another clip's."""
    lines = [json.loads(line) for line in open(out / "retrieved.jsonl")]
    films = Path("data/cc2017/raw/stimuli")
    with Image.open(out / "sheet.png") as sheet:
        for row, line in enumerate(lines):
            name = f"{line['clip']:04d}.mp4"
            memory = model.train.clips[line["retrieved"][0]]
            videos = [read_video(out / "gt" / name).frames]
            videos.append(evaluate.stimulus(memory, films, 2.0, model.settings))
            videos.append(read_video(out / "recon" / name).frames)
            for column, video in enumerate(videos):
                mean = video[[0, len(video) // 2, -1]].mean((0, 1, 2))
                assert abs(cell(sheet, row, column, CLIPS, 3).mean((0, 1)) - mean).max() < 25, (row, column)


def test_gif_moves_as_the_videos_do(out):
    with Image.open(out / "grid.gif") as grid:
        assert grid.n_frames == SIZE[0]
        assert grid.info["duration"] == pytest.approx(2000 / SIZE[0], abs=10)
        seen = []
        for frame in (0, 4):
            grid.seek(frame)
            seen.append(cell(grid, 0, 0, CLIPS, 3))
    assert abs(seen[0] - seen[1]).max() > 100  # the bar of the stimulus is elsewhere


def test_resumes_and_makes_the_same_video_again(out):
    first, second, *others = sorted((out / "recon").iterdir())
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (first, second, *others)}
    second.unlink()
    main(Config(**OPTIONS))
    assert second.read_bytes() == before[second][0]
    assert all(path.stat().st_mtime_ns == before[path][1] for path in (first, *others))


def test_split_over_processes_changes_nothing(out, model, tmp_path):
    for rank in (1, 0):
        reconstruct(model, held_out().averaged(), chosen(), tmp_path, Config(**OPTIONS), rank, 2)
        assert len(list(tmp_path.iterdir())) == {1: 2, 0: 6}[rank]  # batches of 4 and 2
    for path in (out / "recon").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_two_real_processes_leave_what_one_leaves(world, out):
    """By torchrun: `accelerate launch --cpu` may start one process whatever it is asked for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    kept = out.rename(out.with_name("one-process"))
    done = subprocess.run(
        [*launch, str(REPO / "evaluate.py"), *options],
        cwd=world,
        env=environment() | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "reconstructing: 100%|██████████| 1/1" in done.stderr  # of the two batches
    assert done.stdout.count("written:") == 1
    same = [path for path in kept.rglob("*.*") if path.suffix != ".gif" and path.parent.name != "values"]
    assert len(same) > 2 * CLIPS
    for path in same:
        assert (out / path.relative_to(kept)).read_bytes() == path.read_bytes(), path


def test_a_clip_has_noise_of_its_own_whatever_the_batch(out, model, tmp_path):
    x = held_out().averaged()
    for seed in (0, 1):
        reconstruct(model, x, np.array([5]), tmp_path / str(seed), Config(**OPTIONS, seed=seed))
    alone, seed_1 = (read_video(tmp_path / seed / "0005.mp4").frames.astype(int) for seed in "01")
    together = read_video(out / "recon" / "0005.mp4").frames
    assert abs(alone - together).mean() < 0.1  # rounding differs with the size of the batch
    assert abs(alone - seed_1).mean() > 1


def test_videos_made_otherwise_are_not_mixed(out, world):
    with pytest.raises(ValueError, match=rf"fps': \(4.5, 9.0\).*rm -r {RUN}/{EVAL}"):
        main(Config(**OPTIONS | {"fps": 9.0}))
    weights = world / RUN / "stage2" / "heads" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + bytes(4))
    with pytest.raises(ValueError, match="weights"):
        main(Config(**OPTIONS))
    weights.write_bytes(kept)


def test_a_smaller_evaluation_has_a_folder_of_its_own(world, out):
    """So that the results of all clips, of the run's sampling and of all metrics stay."""
    settings, every = {"sampling_steps": 2, "guidance": 2.0}, Config().metrics

    def folder(whole: bool = True, **options) -> str:
        config = Config(data="cc2017", **options)
        return evaluate.reading.evaluation_folder(RUN, config, settings, whole, every).name

    assert folder() == folder(steps=2, guidance=2.0) == "eval"
    assert folder(metrics=f"ms_flow,{every}", shuffle=True) == "eval-shuffled"
    assert folder(False, clips=4) == "eval-4-clips"
    assert folder(steps=10) == "eval-steps10"
    assert folder(guidance=0.0, metrics="ssim") == "eval-guidance0-ssim"
    some = folder(metrics="ssim,psnr,epe,dtc")
    assert some.startswith("eval-4-metrics-") and some == folder(metrics="dtc,epe,psnr,ssim")
    assert some != folder(metrics="ssim,psnr,epe,ms")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    main(Config(**OPTIONS | {"clips": 2}))
    assert (world / RUN / "eval-2-clips-ssim-psnr" / "metrics.json").is_file()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["no-mom", "no-integration"])
def test_ablations_are_evaluated_alike(world, out, name):
    assert main(Config(**OPTIONS, run=name)) == 0
    other = world / "runs" / "cc2017" / "sub1" / f"{name}-s0" / EVAL
    full, ablated = (read_video(folder / "recon" / "0005.mp4").frames.astype(int) for folder in (out, other))
    assert full.shape == ablated.shape and abs(full - ablated).mean() > 0.5
    assert json.loads((other / "metrics.json").read_text())["metrics"]["ssim"]["n"] == CLIPS
    assert (other / "retrieved.jsonl").is_file() == (name == "no-mom")  # else nothing is sought
    if name == "no-mom":
        assert json.loads(open(other / "retrieved.jsonl").readline())["W_r"] == [1, 0, 0]


def test_the_lora_of_the_run_is_in_its_decoder(world, model):
    decoder = VideoDecoder.from_pretrained(world / "models" / "wan", 4, 8)
    y, f_fuse, t = torch.randn(1, 4, 3, 4, 4), torch.randn(1, L, D_TXT), torch.tensor([500.0])
    with torch.inference_mode():
        without = decoder.predict(y, f_fuse, t)
        decoder.load_lora(world / RUN / "stage2" / "lora")
        own = model.decoder.predict(y, f_fuse, t)
        torch.testing.assert_close(own, decoder.predict(y, f_fuse, t), atol=1e-5, rtol=1e-5)
        assert (own - without).abs().mean() > 1e-3


def test_missing_run_and_stimuli_are_named(world):
    with pytest.raises(
        FileNotFoundError, match="train_stage2.py.*here: full-s0, no-integration-s0, no-mom-s0"
    ):
        main(Config(data="cc2017", run="other"))
    with pytest.raises(FileNotFoundError, match="nowhere/seg1.mp4 is not there .5 stimuli.*--stimuli"):
        main(Config(**OPTIONS, stimuli="nowhere"))


@pytest.fixture
def spoilt(world):
    """Change a file of the run for one test: spoilt(file, change), where change maps bytes to bytes."""
    kept = {}

    def change(file: str, to) -> Path:
        path = world / RUN / "stage2" / file
        kept.setdefault(path, path.read_bytes())
        path.write_bytes(to(path.read_bytes()))
        return path

    yield change
    for path, before in kept.items():
        path.write_bytes(before)


def altered(**changes):
    return lambda before: json.dumps(json.loads(before) | changes).encode()


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("config.json", lambda b: b"", "stage2/config.json: found"),
        ("config.json", lambda b: b"[]", "stage2/config.json: found list"),
        ("config.json", altered(decoder=None), "found decoder = 'None', wanted decoder as str"),
        ("config.json", altered(frames="nine"), "frames"),
        ("config.json", altered(lora_rank=8), "lora.*rank 4"),
        ("config.json", altered(subject=2), "found a run of cc2017 sub2, wanted one of cc2017 sub1"),
        ("config.json", altered(mom=False), "mixture_of_memories: found"),
        ("heads/config.json", lambda b: b"[]", "heads/config.json: found list"),
        ("heads/model.safetensors", lambda b: b[:-9], "stage2/heads: found"),
        ("lora/pytorch_lora_weights.safetensors", lambda b: b"garbage", "lora_weights.safetensors: found"),
    ],
)
def test_damaged_runs_are_refused(spoilt, file, change, message):
    spoilt(file, change)
    with pytest.raises(ValueError, match=message):
        CineNeuron.from_pretrained(RUN)


@pytest.mark.parametrize("part", ["brain_model/model", "lora/pytorch_lora_weights"])
def test_weights_that_are_not_finite_are_refused(spoilt, world, part):
    file = world / RUN / "stage2" / f"{part}.safetensors"
    spoilt(f"{part}.safetensors", lambda b: b)  # put back afterwards
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = np.nan
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{Path(part).name}.*NaN"):
        CineNeuron.from_pretrained(RUN)


def test_an_unfinished_run_is_evaluated_and_says_so(spoilt, capsys):
    spoilt("config.json", altered(step=3))
    main(Config(**OPTIONS | {"clips": 2}))
    assert "full-s0: stage 2 is at step 3 of 6:" in capsys.readouterr().out


# -- the control: shuffled fMRI ---------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(80, 80), (240,) * 5, (40,), (12, 12), (31, 20, 3)])
def test_every_clip_gets_the_fmri_of_another_scene(lengths):
    segments = [f"test{s}" for s, n in enumerate(lengths) for _ in range(n)]
    order = other_scenes(far_apart(segments))
    assert sorted(order) == list(range(len(segments)))
    assert all(segments[i] != segments[j] or abs(i - j) > 15 for i, j in enumerate(order))


def test_too_few_clips_to_shuffle():
    with pytest.raises(ValueError, match="--shuffle: 20 clips cannot"):
        other_scenes(far_apart(["test1"] * 20))


def test_shuffled_reconstructions_come_from_the_other_clip(world, model):
    main(Config(**OPTIONS | {"clips": 2}, shuffle=True))
    shuffled = world / RUN / "eval-shuffled-2-clips-ssim-psnr"
    assert [path.name for path in sorted((shuffled / "recon").iterdir())] == ["0000.mp4", "0023.mp4"]
    found = model.remember(held_out().averaged()[[12, 11]]).indices.tolist()
    assert [json.loads(line)["retrieved"] for line in open(shuffled / "retrieved.jsonl")] == found


# -- one recording ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_one_recording_becomes_one_video(world, model, tmp_path, suffix):
    x, video = held_out().averaged(), tmp_path / f"y.{suffix}"
    np.save(tmp_path / "x.npy", x[7, 0].numpy())
    done = run_script(
        "evaluate.py",
        "--data",
        "cc2017",
        "--fmri",
        tmp_path / "x.npy",
        "--fps",
        10,
        "--out",
        video,
        cwd=world,
    )
    assert done.returncode == 0, done.stderr
    assert not chatter(done)
    assert model.train.clips[model.remember(x[7:8]).indices[0, 0]]["caption"] in done.stdout
    frames = read_video(video).frames.astype(int)
    assert abs(frames - model.reconstruct(x[7:8])[0]).mean() < {"mp4": 3, "gif": 12}[suffix]


@pytest.mark.parametrize("kind", ["<f4", "<f8", ">f4", ">f8"])
def test_recordings_of_any_kind_of_numbers(model, tmp_path, kind):
    x = held_out().averaged()
    for shape in ((40,), (1, 40)):
        np.save(tmp_path / "x.npy", x[7].numpy().reshape(shape).astype(kind))
        assert torch.equal(read_recording(tmp_path / "x.npy", model), x[7:8])


@pytest.mark.parametrize(
    "made, message",
    [
        (np.full(40, np.nan), r"x.npy: found nan at volume 0, voxel 0, 40 such values in all, wanted finite"),
        (np.zeros(41), r"x.npy: found the shape \(41,\), wanted \(1, 40\) or \(40,\)"),
        (np.zeros((2, 40)), r"x.npy: found the shape \(2, 40\), wanted \(1, 40\) or \(40,\)"),
        (np.zeros((1, 1, 40)), r"x.npy: found the shape \(1, 1, 40\), wanted \(1, 40\) or \(40,\)"),
        (np.float32(1), r"x.npy: found the shape \(\), wanted"),
        (np.linspace(9000, 11000, 40), "x.npy: found 1e.04 ± 592.*wanted z-scores"),
        (np.array(["a"] * 40), "x.npy: found <U1 .*wanted real numbers.*--fmri"),
        (np.array([None] * 40), "x.npy: found .*--fmri"),
        (b"0.1, 0.2", "x.npy: found .*--fmri"),
        (b"", "x.npy: found .*--fmri"),
    ],
)
def test_recordings_that_do_not_fit(model, tmp_path, made, message):
    file = tmp_path / "x.npy"
    file.write_bytes(made) if isinstance(made, bytes) else np.save(file, made)
    with pytest.raises(ValueError, match=message):
        read_recording(file, model)


def test_recording_that_is_not_there(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="x.npy is not there"):
        read_recording(tmp_path / "x.npy", model)


# -- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, names",
    [
        ("--split", "--split without --pairs"),
        ("--skip-bad", "--skip_bad without --pairs"),
        ("--out x.gif", "--out without --fmri or --pairs"),
        ("--fmri x.npy --pairs y", "--fmri with --pairs"),
        ("--pairs y --compare full", "--pairs with --compare"),
        ("--shuffle --pairs y", "--shuffle with --pairs"),
        ("--clips 3 --fmri x.npy", "--clips with --fmri"),
        ("--guidance 0 --pairs y", "--guidance with --pairs"),
        ("--fmri x.npy --out y.avi", "y.avi: found the suffix .avi, wanted .mp4 or .gif"),
        ("--metrics ssim,lpips", "--metrics lpips: there are video_2way"),
        ("--run ../x", "--run ../x: wanted"),
    ],
)
def test_options_that_do_not_fit_together(options, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=names):
        main(parse(options.split()))
    assert not list(tmp_path.iterdir())


OUT_OF_RANGE = (
    "clips=0 batch_size=0 steps=-1 guidance=inf guidance=-1 fps=0 fps=1e9 seconds=nan seconds=0 trials=-1"
)


@pytest.mark.parametrize(
    "option", f"{OUT_OF_RANGE} subject=0 seed=-1 size=128 flow=tv-l1 classifier_frames=8".split()
)
def test_options_out_of_range(option, capsys):
    with pytest.raises(SystemExit) as end:
        parse([f"--{option}"])
    assert end.value.code == 2
    assert f"--{option.split('=')[0]} " in capsys.readouterr().err


# -- toy world: what is recognised ------------------------------------------------------------------------


def test_attributes_are_read_from_the_classes(out, tmp_path):
    names = [f"a {colour} {shape} moves" for colour, shape in product(COLOURS, SHAPES)]
    video, image = (
        write_classifier(tmp_path / "v", names, True),
        write_classifier(tmp_path / "i", [f"x {n} y" for n in COLOURS], False),
    )
    files = sorted((out / "gt").iterdir())
    ((p, found),) = class_probabilities([read_video(files[0]).frames], [video])
    assert found == names and p.shape == (1, 4) and p.sum() == pytest.approx(1, abs=1e-5)
    values = {"shape": list(SHAPES), "colour": list(COLOURS), "action": ["jumps"]}
    seen = recognise(files, [str(video)], values)
    assert (
        seen["colour"][0] == COLOURS[int(p[0, 2:].sum() > 0.5)]
        and seen["shape"][0] == SHAPES[int(p[0, [1, 3]].sum() > 0.5)]
    )
    assert list(seen) == ["shape", "colour"] and set(map(len, seen.values())) == {CLIPS}
    ((p, _),) = class_probabilities([read_video(files[0]).frames], [image])
    assert recognise(files, [str(image), str(video)], values)["colour"][0] == COLOURS[p[0].argmax()]


def test_copies_of_the_process_make_the_same_videos_and_values(world, tmp_path):
    folders = []
    for processes in (1, 2):
        main(Config(**OPTIONS, steps=1, processes=processes))
        folders.append((RUN / EVAL.replace("clips-", "clips-steps1-")).rename(tmp_path / str(processes)))
    one, two = folders
    files = sorted(file.relative_to(one) for file in one.glob("*/*.mp4"))
    assert len(files) == 2 * CLIPS
    for file in (*files, "metrics.json", "retrieved.jsonl"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    assert [file.name for file in sorted((two / "values").iterdir())] == ["0.jsonl", "1.jsonl"]


def test_shares_of_the_attributes():
    shown = [{"shape": "circle", "colour": "red"}, {"shape": "square", "colour": "red"}]
    found = shares({"shape": ["circle", "circle"], "colour": ["red", "blue"]}, shown)
    assert found == {"shape": 0.5, "colour": 0.5, "all of them": 0.5}


def test_clips_whose_like_was_seen_are_told_apart(world):
    """By attributes where the clips have such, else by their frames."""
    train, test = (ClipDataset("cc2017", 1, split) for split in ("train", "test"))
    clips = np.array([0, 5, 7, 20])
    train.clips = [clip for clip in train.clips if (clip["colour"], clip["shape"]) != ("blue", "circle")]
    groups = evaluate.groups_of(train, test, clips)  # blue and circle are clips 1, 5, 9 ... of either split
    assert {name: of.tolist() for name, of in groups.items()} == {
        "shown in training": [True, False, True, True],
        "never shown": [False, True, False, False],
    }
    for data in (train, test):
        whole = ClipDataset("cc2017", 1, data.split).clips
        data.clips = [{name: clip[name] for name in ("segment", "caption")} for clip in whole]
    assert list(evaluate.groups_of(train, test, clips)) == ["without a near-copy"]
    e_img = np.array(train.e_img)
    e_img[[3, 40]], test.e_img = test.e_img[[5, 20]], np.array(test.e_img)  # two test clips are copies ...
    e_img[:32:2] = e_img[32:]  # ... and training is full of them
    train.e_img = e_img
    groups = evaluate.groups_of(train, test, clips)
    threshold = held_out_clips(train, test, None).threshold
    alike = (mean_frames(test.e_img)[clips] @ mean_frames(train.e_img).T).max(1)
    assert groups["with a near-copy"].tolist() == (alike > threshold).tolist()
    assert groups["with a near-copy"][[1, 3]].all()


def test_table_of_recognised_attributes(out, world, tmp_path, capsys):
    names = [f"a {colour} {shape} moves" for colour, shape in product(COLOURS, SHAPES)]
    folder = write_classifier(tmp_path / "v", names, True)
    main(Config(**OPTIONS, video_classifier=str(folder)))
    columns = json.loads((out / "recognised.json").read_text())["shares"]
    assert list(columns) == ["reconstruction", "stimulus", "top-1 memory", "chance"]
    of_all = {"all of them": 0.25, "all of them, shown in training": 0.25}  # every pair is shown
    assert columns["chance"] == {"shape": 0.5, "colour": 0.5} | of_all
    result, seen = (json.loads((out / f"{name}.json").read_text()) for name in ("metrics", "recognised"))
    assert list(result["groups"]) == ["shown in training"]
    group = result["groups"]["shown in training"]
    assert group["clips"] == [row["clip"] for row in result["clips"]]
    assert group["all_attributes"]["mean"] == pytest.approx(seen["shares"]["reconstruction"]["all of them"])
    test, train = (ClipDataset("cc2017", 1, split).clips for split in ("test", "train"))
    lines = [json.loads(line) for line in open(out / "retrieved.jsonl")]
    assert columns["top-1 memory"]["shape"] == np.mean(
        [train[r["retrieved"][0]]["shape"] == test[r["clip"]]["shape"] for r in lines]
    )
    capsys.readouterr()
    main(Config(**OPTIONS, shuffle=True, video_classifier=str(folder)))
    header = next(line for line in capsys.readouterr().out.split("\n") if "held-out clips" in line)
    assert header.index("reconstruction") < header.index("shuffled fMRI") < header.index("chance")
