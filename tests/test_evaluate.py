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
from conftest import REPO, chatter, environment, run_script
from PIL import Image
from test_metrics import write_classifier
from tiny import wan_pipeline, write_prepared

from brain_model import BrainModel
from data import Clips
from evaluate import CineNeuron, load_decoder, main
from heads import Stage1Heads
from metrics.attributes import class_probabilities, recognise, shares
from metrics.held_out import Films as Stimuli, describe, evaluation_folder, reconstruct
from metrics.options import Config
from metrics.pairs import other_scenes
from metrics.report import Evaluation
from prepare.copies import far_apart, has_near_copy, mean_frames, prepare_copies
from prepare.decoder import prepare_decoder
from support import shared
from support.files import write_json
from support.pipelines import load_lora
from support.videos import read_video, video_frames, write_video

diffusers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)

L, WIDTH, D_TXT = 12, 24, 16  # text tokens, D', the text's width
SIZE, D, CLIPS = (9, 32, 32), 16, 6  # frames x height x width, CLIP's width, clips reconstructed
COLOURS, SHAPES = ("red", "blue"), ("circle", "square")
OPTIONS = dict(data="cc2017", clips=CLIPS, batch_size=4, fps=4.5, metrics="ssim,psnr", size="native")
EVAL = f"eval-{CLIPS}-clips-ssim-psnr"  # the folder of such an evaluation
RUN = Path("runs/cc2017/sub1/full-s0")
SETTINGS = dict(
    data="cc2017", subject=1, seed=0, mom=True, integration=True, K=3, alpha=1.0,
    attention_heads=4, frames=SIZE[0], height=SIZE[1], width=SIZE[2], lora_rank=4, lora_alpha=8,
    noise_shift=1.0, checkpointing=False, precision="fp32", sampling_steps=2, guidance=2.0, sample_every=0, step=6, steps_in_all=6,
)  # fmt: skip


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

    def write(self, folder: Path) -> None:
        """seg1.mp4 ...: 20 frames in the 2 s of a clip."""
        for segment in self.splits["train"] + self.splits["test"]:
            write_video(folder / f"{segment}.mp4", np.concatenate([*self.read_clips(segment)]), 10)


def write_world(root: Path, describe_clip, noise: float = 0.0, copies: int = 0) -> Films:
    """data/cc2017, its films in films/, and models/wan. describe_clip(i) -> keys of a line of clips.jsonl. noise: of
    the DiT's weights, since its output layer starts at zero, where nothing can be seen."""
    stimuli, films = write_prepared(root / "data", copies=copies) / "stimuli", Films(root)
    for split in films.splits:
        file = stimuli / split / "clips.jsonl"
        lines = [json.loads(line) for line in open(file)]
        file.write_text("".join(json.dumps(line | describe_clip(i)) + "\n" for i, line in enumerate(lines)))
    prepare_copies(stimuli)  # the captions are others
    films.write(root / "films")
    torch.manual_seed(0)
    pipe = wan_pipeline()
    for p in pipe.transformer.parameters():
        p.data += noise * torch.randn_like(p)
    pipe.save_pretrained(root / "models" / "wan")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        prepare_decoder(films, Path("data/cc2017/stimuli"), "models/wan", SIZE)
    return films


def write_run(run: Path, **changes) -> None:
    """What both stages leave in the working directory, with a LoRA and zero-convolutions that are away from zero."""
    decoder = str(Path("models/wan").absolute())
    train = Clips("cc2017", 1, "train", None, decoder, SIZE)
    stage1 = dict(rois=None, sizes=train.sizes, tau=0.07, lambda_1=1.0, lambda_2=1.0)
    settings = SETTINGS | {"decoder": decoder, "stage1_config": stage1} | changes
    torch.manual_seed(0)
    BrainModel(40, 1, L, WIDTH, 1, 4, D).save_pretrained(run / "stage1" / "brain_model")
    Stage1Heads(D, 3, 4).save_pretrained(run / "stage1" / "heads")
    model = CineNeuron.from_stage1(run / "stage1", settings, train)
    for name, p in model.named_parameters():
        if ".Z_" in name or "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    for name, write in shared.writers(model).items():
        write(run / "stage2" / name)
    shared.write_memories(run / "stage2", model)
    write_json(run / "stage2" / "config.json", settings)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """data/cc2017 with the stimuli's films, and runs full, no-mom and no-integration; the working directory."""

    def describe_clip(i: int) -> dict:
        colour, shape = COLOURS[i % 2], SHAPES[i // 2 % 2]
        return {"colour": colour, "shape": shape, "caption": f"a {colour} {shape} moves"}

    root = tmp_path_factory.mktemp("evaluate")
    write_world(root, describe_clip, noise=0.05)
    (root / "data/cc2017/raw").mkdir()
    (root / "films").rename(root / "data/cc2017/raw/stimuli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_run(RUN)
        write_run(RUN.with_name("no-mom-s0"), mom=False)
        write_run(RUN.with_name("no-integration-s0"), integration=False)
    return root


@pytest.fixture(autouse=True)
def in_world(world, monkeypatch):
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
        assert run_evaluation() == 0
    return world / RUN / EVAL


def run_evaluation(**changes) -> int:
    return main(Config(**(OPTIONS | changes)))


def held_out() -> Clips:
    return Clips("cc2017", 1, "test")


def chosen() -> np.ndarray:
    return np.linspace(0, 23, CLIPS).round().astype(int)


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in open(file)]


def frames_of(file: Path) -> np.ndarray:
    return read_video(file).frames.astype(int)


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# -- reconstruction ---------------------------------------------------------------------------------------


def test_videos_have_the_frames_size_and_rate_asked_for(out):
    names = [f"{i:04d}.mp4" for i in chosen()]
    for kind in ("gt", "recon"):
        assert sorted(path.name for path in (out / kind).iterdir()) == names
        for name in names:
            with av.open(str(out / kind / name)) as video:
                stream = video.streams.video[0]
                assert (stream.frames, stream.height, stream.width, stream.average_rate) == (*SIZE, 4.5)
    stimulus = video_frames([*Films(Path()).read_clips("test1")][5], *SIZE)
    assert held_out().lines[5]["id"] == "test1-005"
    assert abs(frames_of(out / "gt" / names[1]) - stimulus).mean() < 3


def test_class_and_command_make_the_same_video(out, model):
    """The example of CineNeuron's docstring; in one batch of four, as the command."""
    clips = chosen()[:4]
    videos = model.reconstruct(held_out().averaged()[clips], [(0, int(i)) for i in clips])
    assert videos.shape == (4, *SIZE, 3) and videos.dtype == np.uint8
    for i, video in zip(clips, videos, strict=True):
        written = frames_of(out / "recon" / f"{i:04d}.mp4")
        assert abs(written - video).mean() < 3 < abs(written - 128).mean()


def test_noise_and_sampling_of_the_class(model):
    x = held_out().averaged()[:1]
    video = model.reconstruct(x)
    of_run = model.reconstruct(x, [(0, 0)], steps=2, guidance=2.0)  # by default
    assert np.array_equal(video, of_run)
    for other in ({"keys": [(1, 0)]}, {"keys": [(0, 1)]}, {"steps": 3}, {"guidance": 0.0}):
        assert abs(video.astype(int) - model.reconstruct(x, **other)).mean() > 0.5, other


SAME = {
    "numpy": lambda x: x.numpy(),
    "float64": lambda x: x.double(),
    "numpy float64": lambda x: x.numpy().astype(float),
    "(B, N)": lambda x: x[:, 0],
    "numpy (B, N)": lambda x: x[:, 0].numpy(),
    "a list": lambda x: x.tolist(),
    "not contiguous": lambda x: x.mT.contiguous().mT,
}
REFUSED = {
    "NaN": lambda x: x.where(x < x.max(), torch.nan),
    "infinity": lambda x: x.where(x < x.max(), torch.inf),
    "raw BOLD": lambda x: 10_000 + 500 * x,
    "one clip raw": lambda x: torch.cat([x[:1], 10_000 + 500 * x[1:]]),
    "zeros": torch.zeros_like,
    "whole zeros": lambda x: torch.zeros(x.shape, dtype=int),
    "booleans": lambda x: x > 0,
    "complex": lambda x: x + 1j,
    "a voxel less": lambda x: x[..., 1:],
    "a voxel more": lambda x: torch.cat([x, x[..., :1]], -1),
    "two volumes": lambda x: x.expand(-1, 2, -1),
    "no clip": lambda x: x[:0],
    "one voxel axis": lambda x: x[0, 0],
    "four axes": lambda x: x[None],
    "a number": lambda x: 1.0,
}


@pytest.mark.parametrize("kind", SAME)
def test_fmri_in_another_form_makes_the_same_video(model, kind):
    x = held_out().averaged()[:2]
    assert np.array_equal(model.reconstruct(SAME[kind](x)), model.reconstruct(x))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_fmri_of_this_brain_is_one_error(model, kind):
    x = REFUSED[kind](held_out().averaged()[:2])
    for method in (model.reconstruct, model.remember):
        with pytest.raises(ValueError, match="^x: found .*, wanted "):
            method(x)


def test_what_was_retrieved_is_what_the_model_retrieves(out, model):
    test, rows = held_out(), lines_of(out / "retrieved.jsonl")
    assert [row["clip"] for row in rows] == chosen().tolist()
    recalled = model.remember(test.averaged())
    for row in rows:
        i = row["clip"]
        assert row["id"] == test.lines[i]["id"]
        assert row["retrieved"] == recalled.S[i].topk(3).indices.tolist() == recalled.indices[i].tolist()
        assert row["W_r"] == pytest.approx(recalled.W_r[i].tolist(), abs=1e-4)


def cell(picture: Image.Image, row: int, column: int, rows: int, columns: int) -> np.ndarray:
    """The upper part of one cell of a page, without its title and label."""
    W, H = picture.width / columns, picture.height / rows
    box = (column * W + 12, row * H + 40, (column + 1) * W - 12, row * H + H * 0.6)
    return np.asarray(picture.convert("RGB").crop([int(x) for x in box]), int)


def test_sheet_shows_stimulus_memory_and_reconstruction(out, model):
    """Every column has the colours of the video that it should show, and not of another clip's."""
    stimuli = Stimuli(Config(data="cc2017"), SIZE, model.lines)
    with Image.open(out / "sheet.png") as sheet:
        for row, line in enumerate(lines_of(out / "retrieved.jsonl")):
            name = f"{line['clip']:04d}.mp4"
            memory = stimuli.frames(model.lines[line["retrieved"][0]])
            videos = [frames_of(out / "gt" / name), memory, frames_of(out / "recon" / name)]
            for column, video in enumerate(videos):
                mean = video[[0, len(video) // 2, -1]].mean((0, 1, 2))
                assert abs(cell(sheet, row, column, CLIPS, 3).mean((0, 1)) - mean).max() < 25, (row, column)


def test_gif_moves_as_the_videos_do(out):
    with Image.open(out / "grid.gif") as grid:
        assert grid.n_frames == SIZE[0]
        assert grid.info["duration"] == pytest.approx(2000 / SIZE[0], abs=10)
        first = cell(grid, 0, 0, CLIPS, 3)
        grid.seek(4)
        assert abs(cell(grid, 0, 0, CLIPS, 3) - first).max() > 100  # the bar of the stimulus is elsewhere


def test_resumes_and_makes_the_same_video_again(out):
    first, second, *others = sorted((out / "recon").iterdir())
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (first, second, *others)}
    second.unlink()
    run_evaluation()
    assert second.read_bytes() == before[second][0]
    assert all(path.stat().st_mtime_ns == before[path][1] for path in (first, *others))


def test_split_over_processes_changes_nothing(out, model, tmp_path):
    for rank in (1, 0):
        reconstruct(model, held_out().averaged(), chosen(), tmp_path, Config(**OPTIONS), rank, 2)
        assert len([*tmp_path.iterdir()]) == {1: 2, 0: 6}[rank]  # batches of 4 and 2
    for path in (out / "recon").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_two_real_processes_leave_what_one_leaves(world, out):
    """By torchrun: `accelerate launch --cpu` may start one process whatever it is asked for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    command = [*launch, str(REPO / "evaluate.py"), *[f"--{name}={value}" for name, value in OPTIONS.items()]]
    one = out.rename(out.with_name("one-process"))
    env = environment() | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=world, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "reconstructing: 100%|██████████| 1/1" in done.stderr  # of the two batches
    assert done.stdout.count("written:") == 1
    same = [path for path in one.rglob("*.*") if path.suffix != ".gif" and path.parent.name != "values"]
    assert len(same) > 2 * CLIPS
    for path in same:
        assert (out / path.relative_to(one)).read_bytes() == path.read_bytes(), path


def test_a_clip_has_noise_of_its_own_whatever_the_batch(out, model, tmp_path):
    x = held_out().averaged()
    for seed in (0, 1):
        config = Config(**OPTIONS, seed=seed)
        reconstruct(model, x, np.array([5]), tmp_path / str(seed), config, 0, 1)
    alone, seed_1 = frames_of(tmp_path / "0/0005.mp4"), frames_of(tmp_path / "1/0005.mp4")
    assert (
        abs(alone - frames_of(out / "recon/0005.mp4")).mean() < 0.1
    )  # rounding differs with the batch's size
    assert abs(alone - seed_1).mean() > 1


def test_videos_made_otherwise_are_not_mixed(out, world):
    with pytest.raises(ValueError, match=rf"fps 4.5 \(now 9.0\).*rm -r {RUN}/{EVAL}"):
        run_evaluation(fps=9.0)
    weights = world / RUN / "stage2" / "heads" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + bytes(4))
    with pytest.raises(ValueError, match="weights"):
        run_evaluation()
    weights.write_bytes(whole)


def test_a_smaller_evaluation_has_a_folder_of_its_own(world, out):
    """So that the results of all clips, of the run's sampling and of all metrics stay."""
    every = sorted("ssim psnr epe dtc ms".split())

    def folder(complete: bool = True, metrics: list[str] = every, **options) -> str:
        config = Config(data="cc2017", **options)
        return evaluation_folder(RUN, config, SETTINGS, complete, metrics, every).name

    assert folder() == folder(steps=2, guidance=2.0) == "eval"
    assert folder(metrics=["ms_flow", *every], shuffle=True) == "eval-shuffled"
    assert folder(False, clips=4) == "eval-4-clips"
    assert folder(steps=10) == "eval-steps10"
    assert folder(guidance=0.0, metrics=["ssim"]) == "eval-guidance0-ssim"
    some = folder(metrics=["ssim", "psnr", "epe", "dtc"])
    assert some.startswith("eval-4-metrics-") and some != folder(metrics=["ssim", "psnr", "epe", "ms"])
    before = contents(out)
    run_evaluation(clips=2)
    assert (world / RUN / "eval-2-clips-ssim-psnr" / "metrics.json").is_file()
    assert contents(out) == before


@pytest.mark.parametrize("name", ["no-mom", "no-integration"])
def test_ablations_are_evaluated_alike(world, out, name):
    assert run_evaluation(run=name) == 0
    other = RUN.with_name(f"{name}-s0") / EVAL
    full, ablated = frames_of(out / "recon/0005.mp4"), frames_of(other / "recon/0005.mp4")
    assert full.shape == ablated.shape and abs(full - ablated).mean() > 0.5
    assert json.loads((other / "metrics.json").read_text())["metrics"]["ssim"]["n"] == CLIPS
    assert (other / "retrieved.jsonl").is_file() == (name == "no-mom")  # else nothing is sought
    if name == "no-mom":
        assert all(row["W_r"] == [1, 0, 0] for row in lines_of(other / "retrieved.jsonl"))


def test_the_lora_of_the_run_is_in_its_decoder(world, model):
    decoder = load_decoder(model.settings, False, torch.float32)
    y, f_fuse, t = torch.randn(1, 4, 3, 4, 4), torch.randn(1, L, D_TXT), torch.tensor([500.0])
    with torch.inference_mode():
        without = decoder.predict(y, f_fuse, t)
        load_lora(decoder, world / RUN / "stage2" / "lora")
        own = model.decoder.predict(y, f_fuse, t)
        torch.testing.assert_close(own, decoder.predict(y, f_fuse, t), atol=1e-5, rtol=1e-5)
        assert (own - without).abs().mean() > 1e-3


def test_missing_run_and_stimuli_are_named(world):
    trained = "full-s0, no-integration-s0, no-mom-s0"
    with pytest.raises(
        FileNotFoundError, match=f"train_stage2.py --data cc2017 --subject 1 .*here: {trained}"
    ):
        main(Config(data="cc2017", run="other"))
    with pytest.raises(FileNotFoundError, match="nowhere/seg1.mp4 is not there .5 stimuli.*--stimuli"):
        run_evaluation(stimuli="nowhere")


def test_an_unfinished_run_is_evaluated_and_says_so(world, capsys):
    file = world / RUN / "stage2" / "config.json"
    write_json(file, json.loads(file.read_text()) | {"step": 3})
    run_evaluation(clips=2)
    assert "full-s0: stage 2 is at step 3 of 6:" in capsys.readouterr().out
    write_json(file, json.loads(file.read_text()) | {"step": 6})


# -- the control: shuffled fMRI ---------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(80, 80), (240,) * 5, (40,), (12, 12), (31, 20, 3)])
def test_every_clip_gets_the_fmri_of_another_scene(lengths):
    segments = [f"test{s}" for s, n in enumerate(lengths) for _ in range(n)]
    order = other_scenes(far_apart(segments))
    assert sorted(order) == [*range(len(segments))]
    assert all(segments[i] != segments[j] or abs(i - j) > 15 for i, j in enumerate(order))


def test_too_few_clips_to_shuffle():
    with pytest.raises(ValueError, match="--shuffle: 20 clips cannot"):
        other_scenes(far_apart(["test1"] * 20))


def test_shuffled_reconstructions_come_from_the_other_clip(world, model):
    run_evaluation(clips=2, shuffle=True)
    shuffled = RUN / "eval-shuffled-2-clips-ssim-psnr"
    assert [path.name for path in sorted((shuffled / "recon").iterdir())] == ["0000.mp4", "0023.mp4"]
    recalled = model.remember(held_out().averaged()[[12, 11]]).indices.tolist()
    assert [row["retrieved"] for row in lines_of(shuffled / "retrieved.jsonl")] == recalled


# -- one recording ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_one_recording_becomes_one_video(world, model, tmp_path, suffix):
    x, video = held_out().averaged(), tmp_path / f"y.{suffix}"
    np.save(tmp_path / "x.npy", x[7, 0].numpy())
    options = f"--data cc2017 --fmri {tmp_path}/x.npy --fps 10 --out {video}"
    done = run_script("evaluate.py", *options.split(), cwd=world)
    assert done.returncode == 0, done.stderr
    assert not chatter(done)
    assert model.lines[model.remember(x[7:8]).indices[0, 0]]["caption"] in done.stdout
    assert abs(frames_of(video) - model.reconstruct(x[7:8])[0]).mean() < {"mp4": 3, "gif": 12}[suffix]


@pytest.mark.parametrize("kind", ["<f4", "<f8", ">f4", ">f8"])
def test_recordings_of_any_kind_of_numbers(model, tmp_path, kind):
    x = held_out().averaged()
    for shape in ((40,), (1, 40)):
        np.save(tmp_path / "x.npy", x[7].numpy().reshape(shape).astype(kind))
        assert torch.equal(shared.read_fmri(tmp_path / "x.npy", model), x[7:8])


@pytest.mark.parametrize(
    "content, message",
    [
        (np.zeros(40), "found 0 ± 0.*wanted z-scores"),
        (np.zeros(41), r"found float64 of shape \(1, 41\), wanted .*\(1, 40\)"),
        (np.zeros((2, 40)), r"found float64 of shape \(2, 40\), wanted .*\(1, 40\)"),
        (np.zeros((1, 1, 40)), r"found float64 of shape \(1, 1, 40\), wanted .*\(1, 40\)"),
        (np.float32(1), r"found float32 of shape \(\), wanted"),
        (np.linspace(9000, 11000, 40), "found 1e.04 ± 599.*wanted z-scores"),
    ],
)
def test_recordings_that_do_not_fit(model, tmp_path, content, message):
    file = tmp_path / "x.npy"
    np.save(file, content)
    with pytest.raises(ValueError, match=f"x.npy: {message}"):
        shared.read_fmri(file, model)


def test_recording_that_is_not_there(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="x.npy is not there"):
        shared.read_fmri(tmp_path / "x.npy", model)


# -- toy world: what is recognised ------------------------------------------------------------------------


def test_attributes_are_read_from_the_classes(out, tmp_path):
    names = [f"a {colour} {shape} moves" for colour, shape in product(COLOURS, SHAPES)]
    video = write_classifier(tmp_path / "v", names, True)
    image = write_classifier(tmp_path / "i", [f"x {n} y" for n in COLOURS], False)
    files = sorted((out / "gt").iterdir())
    frames = read_video(files[0]).frames
    (p, classes), (of_image, _) = (class_probabilities([frames], judge) for judge in (video, image))
    assert classes == names and p.shape == (1, 4) and p.sum() == pytest.approx(1, abs=1e-5)
    values = {"shape": [*SHAPES], "colour": [*COLOURS], "action": ["jumps"]}
    seen = recognise(files, [str(video)], values)
    assert seen["colour"][0] == COLOURS[int(p[0, 2:].sum() > 0.5)]
    assert seen["shape"][0] == SHAPES[int(p[0, [1, 3]].sum() > 0.5)]
    assert [*seen] == ["shape", "colour"] and set(map(len, seen.values())) == {CLIPS}
    assert recognise(files, [str(image), str(video)], values)["colour"][0] == COLOURS[of_image[0].argmax()]


def test_copies_of_the_process_make_the_same_videos_and_values(world, tmp_path):
    folders = []
    for processes in (1, 2):
        run_evaluation(steps=1, processes=processes)
        folders.append((RUN / EVAL.replace("clips-", "clips-steps1-")).rename(tmp_path / str(processes)))
    one, two = folders
    files = sorted(file.relative_to(one) for file in one.glob("*/*.mp4"))
    assert len(files) == 2 * CLIPS
    for file in (*files, "metrics.json", "retrieved.jsonl"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    assert [file.name for file in sorted((two / "values").iterdir())] == ["0.jsonl", "1.jsonl"]


def test_shares_of_the_attributes():
    clips = [{"shape": "circle", "colour": "red"}, {"shape": "square", "colour": "red"}]
    recognised = {"shape": ["circle", "circle"], "colour": ["red", "blue"]}
    assert shares(recognised, clips) == {"shape": 0.5, "colour": 0.5, "all of them": 0.5}


def test_clips_whose_like_was_seen_are_told_apart(model, tmp_path):
    """By attributes where the clips have such, else by their near-copies."""
    test, near_copy = held_out(), np.array([True, False, False, True])
    lines = {clip: test.lines[clip] for clip in (0, 5, 7, 20)}
    evaluation = Evaluation({}, tmp_path, Config(data="cc2017"), {}, {})

    def groups(lines: dict[int, dict], memories: list[dict], near_copy: np.ndarray) -> dict:
        described, _ = describe(evaluation, lines, memories, None, near_copy, None)
        return {name: members.tolist() for name, members in described.groups.items()}

    # blue and circle are clips 1, 5, 9 ... of either split
    trained = [line for line in model.lines if (line["colour"], line["shape"]) != ("blue", "circle")]
    by_attributes = {"shown in training": [1, 0, 1, 1], "never shown": [0, 1, 0, 0]}
    assert groups(lines, trained, near_copy) == by_attributes
    bare = {clip: {"caption": line["caption"]} for clip, line in lines.items()}
    by_copies = {"with a near-copy": [1, 0, 0, 1], "without a near-copy": [0, 1, 1, 0]}
    assert groups(bare, [*bare.values()], near_copy) == by_copies
    assert [*groups(bare, [*bare.values()], np.zeros(4, bool))] == ["without a near-copy"]


def test_near_copies_of_the_test_clips_are_those_above_the_threshold(tmp_path):
    stimuli = write_prepared(tmp_path) / "stimuli"
    train, test = (np.load(stimuli / split / "e_img.npy") for split in ("train", "test"))
    train[[3, 40]] = test[[5, 20]]  # two test clips are copies ...
    train[:32:2] = train[32:]  # ... and training is full of them
    np.save(stimuli / "train" / "e_img.npy", train)
    prepare_copies(stimuli)
    near_copy = has_near_copy(stimuli / "test", np.arange(24))
    threshold = json.loads((stimuli / "train" / "near_copies.json").read_text())["threshold"]
    assert near_copy.tolist() == ((mean_frames(test) @ mean_frames(train).T).max(1) > threshold).tolist()
    assert near_copy[[5, 20]].all() and not near_copy.all()


def test_table_of_recognised_attributes(out, model, tmp_path, capsys):
    names = [f"a {colour} {shape} moves" for colour, shape in product(COLOURS, SHAPES)]
    folder = write_classifier(tmp_path / "v", names, True)
    run_evaluation(video_classifier=str(folder))
    columns = json.loads((out / "recognised.json").read_text())["shares"]
    assert [*columns] == ["reconstruction", "stimulus", "top-1 memory", "chance"]
    of_all = {"all of them": 0.25, "all of them, shown in training": 0.25}  # every pair is shown
    assert columns["chance"] == {"shape": 0.5, "colour": 0.5} | of_all
    result = json.loads((out / "metrics.json").read_text())
    assert [*result["groups"]] == ["shown in training"]
    group = result["groups"]["shown in training"]
    assert group["clips"] == [row["clip"] for row in result["clips"]]
    assert group["all_attributes"]["mean"] == pytest.approx(columns["reconstruction"]["all of them"])
    test, right = held_out(), []
    for row in lines_of(out / "retrieved.jsonl"):
        right.append(model.lines[row["retrieved"][0]]["shape"] == test.lines[row["clip"]]["shape"])
    assert columns["top-1 memory"]["shape"] == np.mean(right)
    capsys.readouterr()
    run_evaluation(shuffle=True, video_classifier=str(folder))
    header = next(line for line in capsys.readouterr().out.split("\n") if "held-out clips" in line)
    assert header.index("reconstruction") < header.index("shuffled fMRI") < header.index("chance")
