"""extras/figures.py, show.py and judge.py: pictures, tables and pages show what weights, memories and videos say."""

import base64
import json
import re
import shutil
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZE

from data import Clips, noise_generator
from evaluate import CineNeuron
from extras import figures, judge, maps, show
from support.videos import read_video, write_video

CLIPS, MEMORIES = 5, 45
FULL, SECOND = "full-s0", "no-mom-s0"


def colour_of(kind: str, clip: int, run: str = FULL) -> np.ndarray:
    """Of a training clip's film, a stimulus, or what a run made of it: one of 64 colours, no two alike."""
    n = clip + {"film": 0, "gt": MEMORIES, "recon": MEMORIES + CLIPS + CLIPS * (run == SECOND)}[kind]
    return np.array([20, 30, 10]) + 70 * np.array([n // 16, n // 4 % 4, n % 4])


def plain(colours: list[np.ndarray], frames: int) -> np.ndarray:
    """Each colour for so many frames."""
    video = np.repeat(np.array(colours, np.uint8), frames, 0)[:, None, None]
    return np.broadcast_to(video, (len(video), *SIZE[1:], 3))


def scale(folder: Path, name: str, factor) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {name: state[name] * factor}, folder / "model.safetensors")


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory) -> Path:
    """The tiny runs, their stimuli, reconstructions and films in colours that tell whose they are."""
    root = tmp_path_factory.mktemp("figures")
    for name in ("data", "models"):
        (root / name).symlink_to(tiny / name, target_is_directory=True)
    runs = Path(shutil.copytree(tiny / "runs", root / "runs")) / "cc2017" / "sub1"
    for k in range(3):
        film = plain([colour_of("film", 15 * k + clip) for clip in range(15)], 20)
        write_video(root / "films" / f"seg{k + 1}.mp4", film, 10)
    shutil.copytree(runs / FULL / "stage1", runs / SECOND / "stage1")
    scale(runs / SECOND / "stage1" / "brain_model", "regression.contract.weight", torch.linspace(0.5, 2, 40))
    memory = runs / FULL / "stage2" / "mixture_of_memories"
    scale(memory, "router.R.3.weight", 30)  # W_r differs by clip
    scale(memory, "integration.W_Q.weight", 0)  # the attention of Eq. 6 is that of the scores alone
    for name, kind, i in product((FULL, SECOND), ("gt", "recon"), range(CLIPS)):
        video = plain([colour_of(kind, i, name)], SIZE[0])
        write_video(runs / name / "eval" / kind / f"{i:04d}.mp4", video, 4.5)
    return root


@pytest.fixture
def run(world, monkeypatch) -> Path:
    monkeypatch.chdir(world)
    return Path("runs/cc2017/sub1") / FULL


def recall(run: Path) -> tuple:
    """The model, and what it remembers of each held-out clip."""
    model = CineNeuron.from_pretrained(run)
    return model, model.remember(Clips("cc2017", 1, "test").averaged())


def draw(command: str, out: Path) -> Path:
    figures.main([*command.split(), "--out", str(out)])
    return out


def page_of(command: str, out: Path) -> dict:
    """What the page shows."""
    return json.loads(re.search(r"const RUN = (\{.*\});", draw(command, out).read_text())[1])


def colour_in(uri: str, folder: Path) -> np.ndarray:
    (folder / "film.mp4").write_bytes(base64.b64decode(uri.removeprefix("data:video/mp4;base64,")))
    return read_video(folder / "film.mp4").frames.mean((0, 1, 2))


def test_compare_shows_each_clip_and_run_in_its_place(run, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(figures, "contact_sheet", lambda *args, **options: sheets.append(args))
    draw(f"compare {run} {run.with_name(SECOND)} --clips 3,0", tmp_path / "picture.png")
    ((_, videos, *_),) = sheets
    for row, i in zip(videos, (3, 0), strict=True):
        colours = [colour_of("gt", i), colour_of("recon", i), colour_of("recon", i, SECOND)]
        np.testing.assert_allclose([video.mean((0, 1, 2)) for video in row], colours, atol=9)


def test_weights_are_on_one_scale_for_all_runs(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "draw_areas", lambda ax, areas, *labels: seen.extend(areas))
    runs = [run, run.with_name(SECOND)]
    assert draw("weights {} {}".format(*runs), tmp_path / "picture.png").stat().st_size > 5000
    states = [load_file(folder / "stage1/brain_model/model.safetensors") for folder in runs]
    norms = np.array([state["regression.contract.weight"].norm(dim=0) for state in states])
    scaled = (norms - norms.min()) / np.ptp(norms)  # (runs, N)
    assert [area.name for area in seen] == ["V1", "MST", "FFC", "hippocampus_left", "4"]
    means = [scaled[:, k::5].mean(1) for k in (0, 2, 1, 3, 4)]  # the world's voxels, in turn
    np.testing.assert_allclose([area.weights[:, 0] for area in seen], means, atol=1e-5)


def test_the_map_shows_the_streams_of_every_held_out_clip(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(maps, "draw_norms", lambda ax, norms: seen.append(norms))
    draw(f"map {run}", tmp_path / "map.png")
    model, recalled = recall(run)
    z_f = model.mom.integration.alpha * recalled.z_f
    streams = torch.stack([recalled.z_t.norm(dim=-1), z_f.norm(dim=-1)], 1)  # (clips, 2, L)
    np.testing.assert_allclose(seen[0], streams, rtol=1e-4, atol=1e-5)


def test_memories_are_shown_with_their_scores_and_films(run, tmp_path):
    page = page_of(f"memories {run} --html --stimuli films", tmp_path / "page.html")
    model, recalled = recall(run)
    for clip in page["clips"]:
        number = clip["clip"]
        retrieved, W_r = recalled.indices[number], recalled.W_r[number].numpy()
        assert clip["retrieved"] == retrieved.tolist()
        S = recalled.S[number, retrieved]
        attention = (S / model.mom.tau).softmax(-1)  # of image and action: (K, 2)
        np.testing.assert_allclose(np.array(clip["cosines"]) @ W_r, S, atol=1e-5)
        np.testing.assert_allclose(clip["attention"], np.stack([attention, attention], 1), atol=1e-5)
        video = page["memories"][str(clip["retrieved"][0])]["video"]
        assert abs(colour_in(video, tmp_path) - colour_of("film", clip["retrieved"][0])).max() < 9
    picture = draw(f"memories {run} --clips 3,2 --stimuli films", tmp_path / "picture.png")
    assert picture.stat().st_size > 5000


def test_terms_are_shown_clip_by_clip_by_each_run(run, tmp_path):
    second = run.with_name(SECOND)
    recognised = {"videos": ["0004.mp4", "0002.mp4"], "seen": {"id": ["test1-004", "x"]}}
    (second / "eval/recognised.json").write_text(json.dumps(recognised))
    page = page_of(f"terms {run} {second} --clips 2,4 --stimuli films", tmp_path / "page.html")
    best = recall(run)[1].indices[:, 0].tolist()
    assert page["columns"] == ["stimulus", "best memory", "full", "no-mom"]
    for row in page["clips"]:
        i = row["clip"]
        kinds = (("gt", i, FULL), ("film", best[i], FULL), ("recon", i, FULL), ("recon", i, SECOND))
        for cell, wanted in zip(row["cells"], kinds, strict=True):
            assert abs(colour_in(cell["film"], tmp_path) - colour_of(*wanted)).max() < 9
    assert [row["cells"][-1]["words"] for row in page["clips"]] == [[["x", False]], [["test1-004", True]]]


def test_a_clips_response_is_the_mean_of_its_volumes_by_showing(tiny):
    splits = {split: Clips("cc2017", 1, split, root=tiny / "data") for split in ("train", "test")}
    fmri = np.load(tiny / "data/cc2017/sub1/train/fmri.npy")
    response = show.response_to(splits, "seg3-004")  # clip 34, whose second showing was not recorded
    assert response.line["id"] == "seg3-004" and response.showings == [0]
    np.testing.assert_allclose(response.voxels, fmri[34, :1].mean(1))


def test_the_judges_see_the_videos_of_each_clip(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny)
    known = {"action": "moves", "background": "grey"}
    lines, seeds = [line | known for line in Clips("cc2017", 1, "test").lines], []

    def generate(captions, empty, size, noise, steps, guidance):
        seeds.extend(generator.initial_seed() for generator in noise)
        return captions.byte()[..., None, None, None].expand(-1, *size, 3)

    def recognise(files, judges, values):
        clips = [dict(lines[i]) for i in (0, 12, 25)]  # the first, the middle and the last
        if files[0].parent.name == "VAE":
            clips[0]["shape"] = "none"
        return {attribute: [clip[attribute] for clip in clips] for attribute in values}

    pipe = SimpleNamespace(encode_prompt=lambda texts, **_: (torch.tensor([[len(x)] for x in texts]), None))
    vae = {"encode_latents": lambda video: 255 - video, "decode_latents": lambda y: y}
    for name, stand_in in {
        "load_pipeline": lambda *_, **__: (pipe, 12, {}),
        "VideoDecoder": lambda *_, **__: SimpleNamespace(generate=generate, **vae),
        "raw_folder": lambda *_: tiny / "data/cc2017/raw",
        "read_json_lines": lambda *_: lines,
        "prepare_toy": dict,
        "write_videos": partial(judge.write_videos, batch=2),
        "recognise": recognise,
    }.items():
        monkeypatch.setattr(judge, name, stand_in)
    judge.main(judge.Config(clips=3, out=str(tmp_path / "judges.json")))
    assert seeds == [noise_generator(0, i).initial_seed() for i in (0, 1, 0, 1, 2, 2)]
    shares = json.loads((tmp_path / "judges.json").read_text())["right"]
    assert shares["stimulus"]["shape"] == 1 and shares["VAE"]["shape"] == pytest.approx(2 / 3)
