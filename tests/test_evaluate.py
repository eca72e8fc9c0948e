"""Evaluation of a tiny run: the parts of the model, reconstruction, resumption and shares, pictures, one recording."""

import json
import shutil
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from test_metrics import upper, write_classifier
from tiny import COLOURS, SETTINGS, SHAPES, SIZE, Films, L, N
from watch import EVALUATE, watch_evaluation

import evaluate
import train_stage2
from brain_model import BrainModel
from data import Clips, memories, noise_generator
from evaluate import CineNeuron, load_decoder, main
from heads import Stage1Heads
from metrics import card, held_out
from metrics.attributes import recognise, shares
from metrics.classes import Classifier
from metrics.options import Config, parse
from metrics.report import Evaluation
from mixture_of_memories import DirectProjection, MixtureOfMemories, TopTextMemory
from support import shared
from support.files import write_json
from support.videos import read_video, video_frames

CLIPS = [0, 5, 10, 15, 20, 25]  # six spread over the 26 of the test set
OPTIONS = dict(data="cc2017", clips=6, batch_size=4, fps=4.5, metrics="ssim,psnr", size="native")
EVAL = "eval-6-clips-ssim-psnr"  # the folder of such an evaluation
RUN = Path("runs/cc2017/sub1/full-s0")


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory) -> Path:
    """The tiny world with runs of its own, full, no-mom and no-integration; the working directory."""
    root = tmp_path_factory.mktemp("evaluate")
    for name in ("data", "models"):
        (root / name).symlink_to(tiny / name, target_is_directory=True)
    shutil.copytree(tiny / "runs", root / "runs")
    return root


@pytest.fixture(autouse=True)
def in_world(world, monkeypatch):
    monkeypatch.chdir(world)


@pytest.fixture(scope="module")
def model(world) -> CineNeuron:
    return CineNeuron.from_pretrained(world / RUN)


@pytest.fixture(scope="module")
def out(world) -> Path:
    """The folder of an evaluation of six clips, as the command leaves it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        assert run_evaluation() == 0
    return world / RUN / EVAL


@pytest.fixture(scope="module")
def x(world) -> torch.Tensor:
    return Clips("cc2017", 1, "test", root=world / "data").averaged()


def run_evaluation(**changes) -> int:
    return main(Config(**(OPTIONS | changes)))


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in open(file)]


def frames_of(file: Path) -> np.ndarray:
    return read_video(file).frames.astype(int)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("run", "changes", "kind"),
    [("full", {}, MixtureOfMemories), ("no-mom", {"mom": False}, TopTextMemory), ("no-integration", {"integration": False}, DirectProjection)],
)  # fmt: skip
def test_the_model_is_put_together_from_stage_1_and_from_the_run(tiny, run, changes, kind):
    """Each part is the file's; temperatures and weights are those that stage 1 was trained with."""
    stage1, stage2 = tiny / RUN / "stage1", tiny / RUN.with_name(f"{run}-s0") / "stage2"
    settings = shared.read_settings(stage2)
    train = Clips("cc2017", 1, "train", None, settings["decoder"], SIZE)
    fresh = CineNeuron.from_stage1(stage1, settings | {"K": 2, "alpha": 0.7}, train)
    trained = CineNeuron.from_pretrained(stage2.parent)
    e, captions = memories(train, Stage1Heads.from_pretrained(stage1 / "heads").phi_v)
    for model, folder in ((fresh, stage1), (trained, stage2)):
        assert same(model.brain_model, BrainModel.from_pretrained(folder / "brain_model"))
        assert same(model.heads, Stage1Heads.from_pretrained(folder / "heads"))
        assert not any(p.requires_grad for p in model.heads.parameters())
        assert type(model.mom) is kind and (model.tau, model.lambda_1, model.lambda_2) == (0.2, 0.7, 0.4)
        torch.testing.assert_close(model.pool.e, e)
        assert torch.equal(model.empty, torch.from_numpy(np.array(train.empty))) and model.size == SIZE
        assert model.lines == [train.lines[i] for i in train.trained]
        assert np.array_equal(model.voxels["index"], np.arange(N) * 7)
    assert same(trained.mom, kind.from_pretrained(stage2 / "mixture_of_memories"))
    lora = load_file(stage2 / "lora" / "pytorch_lora_weights.safetensors").values()
    loaded = [p for name, p in trained.decoder.named_parameters() if "lora_" in name]
    assert sorted(float(p.norm()) for p in loaded) == pytest.approx(sorted(float(p.norm()) for p in lora))
    assert (trained.folder, fresh.folder, trained.training) == (stage2, None, False)
    assert fresh.decoder.pipe.vae is None and trained.decoder.pipe.vae.dtype == torch.float32  # no samples
    assert not any(p.requires_grad for p in trained.parameters())
    assert all(p.requires_grad for p in fresh.brain_model.parameters())
    if run == "full":
        rms = torch.cat(captions).square().mean().sqrt().item()
        wanted = dict(K=2, alpha=0.7, tau=0.2, text_rms=pytest.approx(rms, abs=1e-4), attention_heads=4)
        config = fresh.mom._hub_mixin_config
        assert {name: config[name] for name in wanted} == wanted
        train = Clips("cc2017", 1, "train", None, settings["decoder"], SIZE, val_segments="seg2")
        fresh = CineNeuron.from_stage1(stage1, settings, train)
        assert {line["segment"] for line in fresh.lines} == {"seg1", "seg3"} and len(fresh.pool.e) == 30


def test_noise_steps_and_guidance_are_those_asked_for_or_the_runs(model, x):
    video = model.reconstruct(x[:1])
    assert video.shape == (1, *SIZE, 3) and video.dtype == np.uint8
    assert np.array_equal(video, model.reconstruct(x[:1], [(0, 0)], steps=2, guidance=2.0))
    assert np.array_equal(model.reconstruct(x[:2])[1:], model.reconstruct(x[:2], [(0, 0), (0, 1)])[1:])
    for changes in ({"keys": [(1, 0)]}, {"keys": [(0, 1)]}, {"steps": 3}, {"guidance": 0.0}):
        assert abs(video.astype(int) - model.reconstruct(x[:1], **changes)).mean() > 0.5, changes


def test_a_shared_folder_is_whole_or_has_no_config(model, tmp_path, monkeypatch):
    new, no = tmp_path / "new", {"chance": None, "shuffled": None}
    ssim = {"mean": 0.25, "ci95": [0.2, 0.3], "chance": 0.0625, "shuffled": 0.125, "n": 24}
    entries = {"ssim": ssim, "dtc": no | {"mean": 0.5, "n": 9}, "ms": {"mean": None}}
    write_json(RUN / "eval" / "metrics.json", {"metrics": entries})
    model.save_pretrained(new)
    shutil.rmtree(RUN / "eval")
    page = card.ModelCard.load(new / "README.md")
    head, _, *rows = page.text.split("| metric ")[1].split("\n\n")[0].split("\n")
    assert head == "| mean | 95 % interval | chance | shuffled | clips |"
    assert rows[0] == "| `ssim` | 0.250 | [0.200, 0.300] | 0.062 | 0.125 | 24 |"
    assert rows[1:] == ["| `dtc` | 0.500 |  |  |  | 9 |"]
    assert (page.data.license, page.data.base_model) == ("other", None)
    with monkeypatch.context() as patch:
        patch.setitem(model.settings, "data", "toy")
        assert card.model_card(model, "x", None).data.license == "mit"
    again = CineNeuron.from_pretrained(new)
    assert same(again, model) and (again.settings, again.folder) == (model.settings, new)
    assert (new / "eval/metrics.json").is_file()
    model.save_pretrained(new)  # not evaluated now
    assert not (new / "eval/metrics.json").exists()
    monkeypatch.setattr("metrics.card.write_memories", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(new)
    assert not (new / "config.json").exists()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="found 2 other files, wanted a new or an empty folder"):
        model.save_pretrained(tmp_path)


def test_videos_and_memories_are_those_of_the_class(out, model, x, tmp_path):
    for kind, i in product(("gt", "recon"), CLIPS):
        video = read_video(out / kind / f"{i:04d}.mp4")
        assert (video.frames.shape, video.fps) == ((*SIZE, 3), 4.5)
    for i in (5, 20):  # clips 5 and 7 of their segments
        stimulus = video_frames([*Films(Path()).read_clips(f"test{i // 13 + 1}")][i % 13], *SIZE)
        assert abs(frames_of(out / "gt" / f"{i:04d}.mp4") - stimulus).mean() < 3
    origin = json.loads((out / "metrics.json").read_text())["provenance"]
    named = {"data": "cc2017", "subject": 1, "run": "full", "seed": 0, "shuffle": False}
    assert named.items() <= origin.items() and origin["method"] == "reconstruction"
    videos = model.reconstruct(x[CLIPS[:4]], [(0, i) for i in CLIPS[:4]])  # one batch of four, as the command
    for i, video in zip(CLIPS, videos, strict=False):
        written = frames_of(out / "recon" / f"{i:04d}.mp4")
        assert abs(written - video).mean() < 3 < abs(written - 128).mean()
    test, recalled = Clips("cc2017", 1, "test"), model.remember(x)
    top_1 = held_out.write_retrieved(model, x, dict(enumerate(test.lines)), tmp_path / "all.jsonl")
    every = lines_of(tmp_path / "all.jsonl")
    assert top_1.tolist() == recalled.indices[:, 0].tolist() and len({*top_1}) > 2
    for rows, clips in ((lines_of(out / "retrieved.jsonl"), CLIPS), (every, range(26))):
        assert [(row["clip"], row["id"]) for row in rows] == [(i, test.lines[i]["id"]) for i in clips]
        for row in rows:
            assert row["retrieved"] == recalled.S[row["clip"]].topk(3).indices.tolist()
            assert row["W_r"] == pytest.approx(recalled.W_r[row["clip"]].tolist(), abs=1e-4)


def test_pictures_show_stimulus_memory_and_reconstruction(out, model):
    stimuli = held_out.Films(Config(data="cc2017"), SIZE, model.lines)
    rows = {row["clip"]: row for row in lines_of(out / "retrieved.jsonl")}
    with Image.open(out / "sheet.png") as sheet, Image.open(out / "grid.gif") as grid:
        for row, clip in enumerate(CLIPS):
            memory, file = stimuli.frames(model.lines[rows[clip]["retrieved"][0]]), f"{clip:04d}.mp4"
            videos = [frames_of(out / "gt" / file), memory, frames_of(out / "recon" / file)]
            for column, video in enumerate(videos):
                mean = video[[0, len(video) // 2, -1]].mean((0, 1, 2))
                assert abs(upper(sheet, row, column, 6, 3) - mean).max() < 8, (row, column)
        assert grid.n_frames == SIZE[0] and grid.info["duration"] == pytest.approx(2000 / SIZE[0], abs=10)


def test_copies_of_the_process_make_the_same_videos_and_values(tmp_path):
    for processes in (1, 2):
        run_evaluation(steps=1, processes=processes)
        (RUN / EVAL.replace("clips-", "clips-steps1-")).rename(tmp_path / str(processes))
    files = sorted(file.relative_to(tmp_path / "1") for file in (tmp_path / "1").glob("*/*.mp4"))
    assert len(files) == 3 * len(CLIPS)  # gt, memory and recon
    for file in (*files, "metrics.json", "retrieved.jsonl"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file
    assert len([*(tmp_path / "2" / "values").iterdir()]) == 2


def test_videos_made_otherwise_are_not_mixed(out, world):
    with pytest.raises(ValueError, match=rf"fps 4.5 \(now 9.0\).*rm -r {RUN}/{EVAL}"):
        run_evaluation(fps=9.0)
    for part in ("heads/model.safetensors", "lora/pytorch_lora_weights.safetensors"):
        weights = world / RUN / "stage2" / part
        content = weights.read_bytes()
        weights.write_bytes(content[:-4] + bytes(4))
        with pytest.raises(ValueError, match=r"was made with weights '\w{16}' \(now"):
            run_evaluation()
        weights.write_bytes(content)


def test_a_smaller_evaluation_has_a_folder_of_its_own():
    every = sorted("ssim psnr epe dtc ms".split())

    def folder(complete: bool = True, metrics: list[str] = every, **options) -> str:
        config = Config(data="cc2017", **options)
        return held_out.evaluation_folder(RUN, config, SETTINGS, complete, metrics, every).name

    assert folder() == folder(steps=2, guidance=2.0) == folder(clips=26) == "eval"
    assert folder(metrics=["ms_flow", *every], shuffle=True) == "eval-shuffled"
    assert folder(False, clips=4) == "eval-4-clips"
    assert folder(steps=10) == "eval-steps10"
    assert folder(guidance=0.0, metrics=["ssim"]) == "eval-guidance0-ssim"
    four = folder(metrics=["ssim", "psnr", "epe", "dtc"])
    assert four.startswith("eval-4-metrics-") and four != folder(metrics=["ssim", "psnr", "epe", "ms"])


@pytest.mark.parametrize("name", ["no-mom", "no-integration"])
def test_ablations_are_evaluated_alike_and_without_weights_the_status_is_3(name, world, capsys):
    """The last one's training has not ended."""
    file = world / RUN.with_name(f"{name}-s0") / "stage2" / "config.json"
    write_json(file, json.loads(file.read_text()) | {"step": 3})
    assert run_evaluation(run=name, clips=2, metrics="ssim,ms", amt="no.pth") == 3
    assert f"{name}-s0: stage 2 is at step 3 of 6:" in capsys.readouterr().out
    write_json(file, json.loads(file.read_text()) | {"step": 6})
    retrieved = RUN.with_name(f"{name}-s0") / "eval-2-clips-ms-ssim" / "retrieved.jsonl"
    assert retrieved.is_file() == (name == "no-mom")  # else nothing is sought
    assert name != "no-mom" or all(row["W_r"] == [1, 0, 0] for row in lines_of(retrieved))


def test_shuffled_reconstructions_come_from_the_other_clip(model, x, monkeypatch):
    run_evaluation(clips=2, shuffle=True)
    shuffled = RUN / "eval-shuffled-2-clips-ssim-psnr"
    assert [path.name for path in sorted((shuffled / "recon").iterdir())] == ["0000.mp4", "0025.mp4"]
    W_r = np.array([row["W_r"] for row in lines_of(shuffled / "retrieved.jsonl")])
    np.testing.assert_allclose(W_r, model.remember(x[[13, 12]]).W_r, atol=1e-4)
    videos = model.reconstruct(x[[13, 12]], [(0, 0), (0, 25)])
    for clip, video in zip((0, 25), videos, strict=True):
        assert abs(frames_of(shuffled / "recon" / f"{clip:04d}.mp4") - video).mean() < 3
    assert json.loads((shuffled / "metrics.json").read_text())["provenance"]["method"] == "from shuffled fMRI"
    monkeypatch.setattr(held_out, "far_apart", lambda segments: np.zeros((26, 26), bool))
    monkeypatch.setattr(evaluate, "load_run", None)  # not reached
    with pytest.raises(ValueError, match="--shuffle: 26 clips cannot be paired"):
        run_evaluation(shuffle=True)


def test_the_control_of_a_clip_is_another_scene(tmp_path):
    lines = {clip: line for clip, line in enumerate(Clips("cc2017", 1, "test").lines) if clip % 13 < 4}
    names = [f"{clip:04d}.mp4" for clip in lines]
    for pair, name in zip(held_out.pairs_of(tmp_path, lines, "ours")["ours"], names, strict=True):
        assert [pair.pred.path, pair.gt.path] == [tmp_path / "recon" / name, tmp_path / "gt" / name]
        control = pair.control.path
        assert control.parent == tmp_path / "gt" and (int(control.stem) < 13) != (int(pair.name) < 13)
    few = held_out.pairs_of(tmp_path, {clip: lines[clip] for clip in range(4)}, "ours")["ours"]
    assert [pair.control for pair in few] == [None] * 4


def test_no_stage_2_draws_the_best_memorys_caption(world, x, capsys, monkeypatch):
    """Of stage 1 alone and with --no-stage2 the same videos: f_fuse is e_mem_txt, W_r even, the decoder the file's."""
    names = "K attention_heads frames height width sampling_steps guidance".split()
    preset = {name: SETTINGS[name] for name in names}
    monkeypatch.setitem(train_stage2.PRESETS, "cc2017", preset | {"decoder": str(world / "models" / "wan")})
    shutil.copytree(RUN / "stage1", RUN.with_name("alone-s0") / "stage1")
    name = EVAL.replace("eval-6", "eval-no-stage2-2")
    assert run_evaluation(clips=2, stage2=False) == run_evaluation(clips=2, run="alone") == 0
    folders = [run / name for run in (RUN, RUN.with_name("alone-s0"))]
    assert "alone-s0: no stage 2" in capsys.readouterr().out
    for file in ("recon/0025.mp4", "config.json", "retrieved.jsonl"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file
    origin = json.loads((folders[0] / "config.json").read_text())
    assert origin["size"] == [*SIZE]  # stage 1's weights do not tell a stage 2 of another size
    assert all(row["W_r"] == [0.3333] * 3 for row in lines_of(folders[0] / "retrieved.jsonl"))
    model, _ = evaluate.load_run(Config(data="cc2017", run="alone"), Accelerator(cpu=True))
    recalled, decoder = model.remember(x), load_decoder(model.settings, True, torch.float32)
    e_mem_txt = model.pool.text(recalled.indices[:, 0], L)
    assert torch.equal(recalled.f_fuse, e_mem_txt)
    video = decoder.generate(e_mem_txt[:1], model.empty, SIZE, [noise_generator(0, 0)], 2, 2.0).numpy()
    assert np.array_equal(model.reconstruct(x[:1]), video)
    for changes in ({"stage2": False}, {}):
        with pytest.raises(OSError, match=r"none-s0.*train_stage[12].py"):
            run_evaluation(run="none", **changes)
    shutil.rmtree(RUN.with_name("alone-s0"))


def test_one_recording_becomes_one_video(model, x, tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "x.npy", x[7].numpy().astype(">f8"))
    options = f"--data cc2017 --fmri {tmp_path}/x.npy --fps 10 --out"
    caption = model.lines[model.remember(x[7:8]).indices[0, 0]]["caption"]
    assert main(parse([*options.split(), f"{tmp_path}/y.mp4"], "")) == 0
    assert f"written: {tmp_path}/y.mp4; it recalls: {caption}\n" in capsys.readouterr().out
    video = read_video(tmp_path / "y.mp4")
    assert abs(video.frames - model.reconstruct(x[7:8])[0].astype(int)).mean() < 3
    assert video.fps == pytest.approx(10)
    shutil.copytree(RUN.with_name("no-integration-s0"), RUN.with_name("full-s2"))
    calls, video = [], np.zeros((1, *SIZE, 3), np.uint8)
    monkeypatch.setattr(CineNeuron, "reconstruct", lambda self, *words: calls.append(words) or video)
    assert main(Config(data="cc2017", fmri=f"{tmp_path}/x.npy", seed=2, steps=5, guidance=0.0)) == 0
    assert torch.equal(calls[0][0], x[7:8]) and calls[0][1:] == ([(2, 0)], 5, 0.0)
    assert capsys.readouterr().out == "written: out.mp4\n" and Path("out.mp4").is_file()
    shutil.rmtree(RUN.with_name("full-s2"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    names = [f"a {colour} {shape} moves" for colour, shape in product(COLOURS, SHAPES)]
    return str(write_classifier(tmp_path_factory.mktemp("judge") / "v", names, True))


def test_attributes_are_read_from_the_classes(out, judge, tmp_path, monkeypatch):
    given, call = [], Classifier.__call__
    judge_and_note = lambda self, frames: given.append(frames) or call(self, frames)  # noqa: E731
    monkeypatch.setattr(Classifier, "__call__", judge_and_note)
    image = write_classifier(tmp_path / "i", [f"x {n} y" for n in COLOURS], False)
    files = sorted((out / "gt").iterdir())
    values = {"shape": [*SHAPES], "colour": [*COLOURS], "action": ["jumps"]}
    seen, by_image = recognise(files, [judge], values), recognise(files, [str(image), judge], values)
    assert [*seen] == ["shape", "colour"] and by_image["shape"] == seen["shape"]
    for i, file in enumerate(files):
        frames = read_video(file).frames[[0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 8]]  # 16 spread over 9
        assert np.array_equal(given[i], frames)
        with torch.inference_mode():
            p, of_image = Classifier(judge)(frames)[0], Classifier(image)(frames).mean(0)
        assert seen["colour"][i] == COLOURS[int(p[2:].sum() > p[:2].sum())]
        assert seen["shape"][i] == SHAPES[int(p[1] + p[3] > p[0] + p[2])]
        assert by_image["colour"][i] == COLOURS[of_image.argmax()]


def test_the_best_memory_is_played_and_what_is_recognised_is_told(out, judge):
    test, train = Clips("cc2017", 1, "test"), Clips("cc2017", 1, "train")
    stimuli = held_out.Films(Config(data="cc2017"), SIZE, [])
    videos = [file.stat().st_mtime_ns for file in sorted(out.glob("*/*.mp4"))]
    run_evaluation(video_classifier=judge)
    assert videos == [file.stat().st_mtime_ns for file in sorted(out.glob("*/*.mp4"))]
    result = json.loads((out / "metrics.json").read_text())
    columns = json.loads((out / "recognised.json").read_text())["shares"]
    memory, less = result["memory"], result["less_memory"]
    assert memory["metrics"]["ssim"]["shuffled"] is None and memory["metrics"]["ssim"]["n"] == len(CLIPS)
    for name in ("ssim", "psnr", "all_attributes"):
        values = [[row[name] for row in rows] for rows in (result["clips"], memory["clips"])]
        for entry in (less["metrics"][name], less["groups"]["shown in training"][name]):
            assert entry["mean"] == pytest.approx(np.mean(values[0]) - np.mean(values[1]))
    assert [*columns] == ["reconstruction", "stimulus", "top-1 memory", "chance"]
    of_all = {"all of them": 0.25, "all of them, shown in training": 0.25}  # every pair is shown
    assert columns["chance"] == {"shape": 0.5, "colour": 0.5} | of_all
    expected = pytest.approx(columns["reconstruction"]["all of them"])
    assert [*result["groups"]] == ["shown in training"]
    assert result["groups"]["shown in training"]["all_attributes"]["mean"] == expected
    for kind, column, rows in (("memory", "top-1 memory", memory["clips"]), ("gt", "stimulus", None)):
        seen = recognise(sorted((out / kind).iterdir()), [judge], {"colour": [*COLOURS], "shape": [*SHAPES]})
        right = np.array([[seen[n][k] == test.lines[i][n] for n in seen] for k, i in enumerate(CLIPS)])
        assert [columns[column][name] for name in seen] == right.mean(0).tolist()
        assert rows is None or [row["all_attributes"] for row in rows] == right.all(1).tolist()
    for row in lines_of(out / "retrieved.jsonl"):
        film = stimuli.frames(train.lines[train.trained[row["retrieved"][0]]])
        assert abs(frames_of(out / "memory" / f"{row['clip']:04d}.mp4") - film).mean() < 3


def test_shares_of_the_attributes():
    clips = [{"shape": "circle", "colour": "red"}, {"shape": "square", "colour": "red"}]
    seen = {"shape": ["circle", "circle"], "colour": ["red", "blue"]}
    expected = {"shape": 0.5, "colour": 0.5, "all of them": 0.5, "all of them, new": 1}
    assert shares(seen, clips, {"new": np.array([True, False])}) == expected


def test_clips_whose_like_was_seen_are_told_apart(model, tmp_path):
    test, near_copy = Clips("cc2017", 1, "test"), np.array([True, False, False, True])
    lines, top_1 = {clip: test.lines[clip] for clip in (0, 5, 7, 20)}, np.array([7, 3, 9, 2])
    films = SimpleNamespace(frames=lambda line: line["id"])

    def described(lines: dict, memories: list[dict], near_copy: np.ndarray, top_1=None) -> tuple:
        evaluation = Evaluation({}, tmp_path, Config(data="cc2017"), {}, {})
        more = held_out.describe(evaluation, lines, memories, top_1, near_copy, films)
        return more, {name: members.tolist() for name, members in more.groups.items()}

    # blue and circle are clips 1, 5, 9 ... of either split
    trained = [line for line in model.lines if (line["colour"], line["shape"]) != ("blue", "circle")]
    recalled, groups = described(lines, trained, near_copy, top_1)
    assert groups == {"shown in training": [1, 0, 1, 1], "never shown": [0, 1, 0, 0]}
    captions = [line["caption"] for line in lines.values()]
    assert recalled.texts == [[c, trained[k]["caption"], ""] for c, k in zip(captions, top_1, strict=True)]
    assert [recalled.memories(i) for i in range(4)] == [trained[k]["id"] for k in top_1]
    bare = {clip: {"caption": caption} for clip, caption in zip(lines, captions, strict=True)}
    by_copies, groups = described(bare, [*bare.values()], near_copy)
    assert groups == {"with a near-copy": [1, 0, 0, 1], "without a near-copy": [0, 1, 1, 0]}
    assert by_copies.texts == [[caption, ""] for caption in captions]


def test_a_shared_folder_in_the_place_of_a_run_is_evaluated_there(tiny_copy):
    runs = Path("runs/cc2017/sub1")
    shutil.copytree(runs / "full-s0" / "stage2", runs / "given-s0")
    seen = watch_evaluation([*EVALUATE, "--clips", 2, "--run", "given"])
    assert seen.out.parent == runs / "given-s0" and not (runs / "eval-2-clips-ssim").exists()
