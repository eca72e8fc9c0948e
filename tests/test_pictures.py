"""support/pictures.py: where each picture stands, in which order a GIF shows its frames, and what curves show."""

import numpy as np
import pytest
from PIL import Image, ImageSequence

from support import pictures

COLOURS = np.array([[(250, 0, 0), (0, 250, 0)], [(0, 0, 250), (250, 250, 0)]], np.uint8)  # of a page's cells
H, W, HEIGHT = 20, 30, 40  # of a picture, and how high it is shown; it is shown 60 wide


def cells(page: np.ndarray, lines: int) -> np.ndarray:
    """The middle of each cell, (2, 2, 3), of a page whose longest label has so many lines."""
    tops = [32 + HEIGHT // 2 + i * (HEIGHT + 16 * lines + 8) for i in range(2)]
    return page[tops][:, [8 + 30, 8 + 68 + 30]]


def test_a_page_has_its_pictures_in_rows_and_columns_titles_above_and_labels_below():
    cases = np.repeat(np.repeat(COLOURS[:, :, None, None], H, 2), W, 3)  # (2, 2, H, W, 3)
    labels = [["one", "two words that need the room of two lines"], ["three", ""]]
    page = np.array(pictures.page(cases, labels, ["first", ""], HEIGHT))
    lines = 1 + 3 - 1  # 12 letters a line: three lines, of which the last ends in " ..."
    assert page.shape == (2 * (HEIGHT + 16 * lines + 8) + 16 + 16, 2 * 68 + 8, 3)
    assert np.array_equal(cells(page, lines), COLOURS)
    assert (page == COLOURS[1, 1]).all(-1).sum() == HEIGHT * 60  # each picture whole
    dark = page.max(-1) < 120
    assert dark[8:24, 8:68].any() and not dark[8:24, 76:136].any()  # a title, and none
    labelled = [dark[top : top + 16 * lines, left : left + 68].any() for top in (72, 168) for left in (8, 76)]
    assert labelled == [True, True, True, False]


def test_a_strip_is_the_first_the_middle_and_the_last_frame_each_between_white_columns():
    video = np.zeros((5, 4, 6, 3), np.uint8) + 10 * np.arange(5, dtype=np.uint8)[:, None, None, None]
    row = pictures.strip(video)[2, :, 0]
    assert row.tolist() == [255, *[0] * 6, 255, 255, *[20] * 6, 255, 255, *[40] * 6, 255]


def test_a_sheet_and_a_gif_show_the_videos_as_they_pass(tmp_path):
    """Of two lengths, which both take all of the GIF's two seconds."""
    long = np.zeros((8, H, W, 3), np.uint8) + np.arange(40, 240, 25, np.uint8)[:, None, None, None]
    short = long[::2]
    videos, labels = [[long, short], [short, long]], [["", ""]] * 2
    pictures.grid_gif(tmp_path / "a.gif", videos, labels, ["", ""], seconds=2, height=HEIGHT)
    with Image.open(tmp_path / "a.gif") as gif:
        pages = [np.array(page.convert("RGB")) for page in ImageSequence.Iterator(gif)]
        assert gif.info["duration"] == 250
    seen = np.stack([cells(page, 1)[..., 0] for page in pages])  # (8, 2, 2)
    levels = [long[:, 0, 0, 0], short[:, 0, 0, 0].repeat(2)]
    for i, j in np.ndindex(2, 2):
        assert np.abs(seen[:, i, j].astype(int) - levels[i != j]).max() <= 3
    pictures.contact_sheet(tmp_path / "a.png", videos, labels, ["", ""], height=HEIGHT)
    strips = [[pictures.strip(video) for video in row] for row in videos]
    expected = pictures.page(strips, labels, ["", ""], HEIGHT)
    assert np.array_equal(np.array(Image.open(tmp_path / "a.png")), np.array(expected))


def test_curves_of_what_was_logged(tmp_path, monkeypatch):
    drawn, axes = [], "matplotlib.axes.Axes."
    plot = lambda axis, x, y, label, marker: drawn.append((axis, x, y, label)) or []  # noqa: E731
    monkeypatch.setattr(axes + "plot", plot)
    monkeypatch.setattr(axes + "legend", lambda axis: None)
    log = [{"step": 2, "loss": 5.0, "val": 7.0}, {"step": 4, "loss": 3.0}]
    names = {"loss": "training", "val": "validation", "absent": "nothing"}
    pictures.loss_curves(tmp_path / "a.png", log, names, "a title")
    assert [row[1:] for row in drawn] == [([2, 4], [5.0, 3.0], "training"), ([2], [7.0], "validation")]
    axis = drawn[0][0]
    assert (axis.get_title(), axis.get_yscale()) == ("a title", "log")
    log = [{"step": k, "diffusion": 2 * (k % 2), "w_txt": 0.2} for k in range(101)]
    pictures.loss_curves(tmp_path / "c.png", log, {"diffusion": "loss", "w_txt": "W_r"}, "a title")
    (axis, _, y, _), (below, *_, label) = drawn[-2:]  # the shares stand on an axis of their own
    assert axis is not below and label == "W_r"
    assert max(abs(np.array(y) - 1)) <= 0.5 and (axis.get_yscale(), below.get_ylabel()) == ("linear", "share")
    pictures.near_copies(tmp_path / "b.png", 0.91239, [0, 50, 100], {"train": [0.1, 0.5, 0.9]})
    axis, x, y, label = drawn[-1]
    assert (x, y, label) == ([0.1, 0.5, 0.9], [0, 50, 100], "train") and "cosine > 0.9124" in axis.get_title()
    assert all(Image.open(tmp_path / name).size == (840, 480) for name in ("a.png", "b.png"))


@pytest.mark.parametrize(("clips", "n", "groups", "chosen"), [
    (range(10), 4, None, [1, 3, 6, 8]),
    (range(10), 3, {"a": [0, 2, 4, 6, 8], "b": [1, 3, 5, 7, 9]}, [2, 6, 5]),
    ([4, 5, 6], 4, {"a": [0, 1, 4], "b": [5, 6]}, [4, 5, 6]),  # a group has fewer than its share
    ([4, 5, 6], 2, {"a": [0]}, [4, 6]),  # none of a group can be shown
])  # fmt: skip
def test_pictures_choose_clips_by_one_rule(clips, n, groups, chosen):
    masks = groups and {name: np.isin(np.arange(10), inside) for name, inside in groups.items()}
    assert pictures.spread(clips, n, masks) == chosen
