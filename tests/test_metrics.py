"""Metrics against independent formulas and public code; scoring of videos, its cache, bad input, comparisons."""

import importlib
import json
import math
import re
import sys
import unicodedata
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import REPO
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.stats import ttest_1samp
from tiny import unit
from torch import nn
from torchvision.utils import make_grid
from transformers import (
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

import metrics.options
import metrics.report
import metrics.score
from evaluate import Config, main
from metrics import features, motion, pixels, retrieval
from metrics.classes import Classifier, n_way_top_k
from metrics.intervals import blocks_of, difference
from metrics.pairs import Source, Watched, find_pairs, other_scenes, watch
from metrics.report import Evaluation, report
from metrics.score import Judges, keys_of, known_value, known_values, score
from metrics.table import METRICS, NAMES
from prepare.copies import far_apart
from support.videos import uniform_frames, write_video
from toy.world import combinations as combinations_of_toy, random_clip, render

parse = partial(metrics.options.parse, doc="What it does.")
PIXELS = {"data": "cc2017", "metrics": "ssim,ssim_gray,psnr"}


def moving(F: int, H: int = 48, W: int = 64, speed: float = 0.0, seed: int = 0) -> np.ndarray:
    """A smooth texture that moves to the right, uint8 (F, H, W, 3)."""
    texture = gaussian_filter(np.random.default_rng(seed).random((H, W + 200, 3)), (3, 3, 0))
    texture = (255 * (texture - texture.min()) / np.ptp(texture)).astype(np.uint8)
    return np.stack([texture[:, 100 - (x := round(t * speed)) : 100 - x + W] for t in range(F)])


def counting(F: int) -> Watched:
    """Frame t is all t."""
    return video_of(np.arange(F, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 12, 3), np.uint8))


def video_of(frames: np.ndarray) -> Watched:
    return Watched(frames, 8.0)


def measured(name: str, judge, size: str, *videos: Watched):
    """A metric as `score` computes it."""
    metric = METRICS[name]
    return np.mean(metric.formula(*metric.picks(judge, Config(size=size), *videos)))


def write_pairs(root: Path, gt: list[np.ndarray], **methods: list[np.ndarray]) -> Path:
    for folder, videos in {"gt": gt, **methods}.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i, frames in enumerate(videos):
            np.save(root / folder / f"{i:04d}.npy", frames)
    return root


def results_of(root: Path, method: str = "ours") -> dict:
    return json.loads((root / "metrics" / method / "metrics.json").read_text())


@pytest.fixture
def three(tmp_path) -> Path:
    """Three pairs: a method's videos are the stimuli, noisy."""
    gt = [moving(6, speed=1, seed=i) for i in range(3)]
    noise = np.random.default_rng(9).integers(-20, 20, gt[0].shape)
    return write_pairs(tmp_path / "set", gt, ours=[np.clip(v + noise, 0, 255).astype(np.uint8) for v in gt])


def ssim_of_windows(x: np.ndarray, y: np.ndarray, weights: np.ndarray, top: float, n: float) -> float:
    """Wang et al. 2004 of one channel (H, W), the mean of all windows within; n / (n - 1) makes variances unbiased."""
    x, y = (sliding_window_view(v.astype(float), weights.shape) for v in (x, y))
    m_x, m_y, xx, yy, xy = ((v * weights).sum((-2, -1)) for v in (x, y, x * x, y * y, x * y))
    C_1, C_2, unbiased = (0.01 * top) ** 2, (0.03 * top) ** 2, n / (n - 1)
    similarity = (2 * m_x * m_y + C_1) * (2 * unbiased * (xy - m_x * m_y) + C_2)
    spread = unbiased * (xx - m_x**2 + yy - m_y**2)
    return (similarity / ((m_x**2 + m_y**2 + C_1) * (spread + C_2))).mean()


def test_pixels_by_hand():
    a = np.random.default_rng(0).integers(0, 256, (2, 21, 34, 3), dtype=np.uint8)
    b = gaussian_filter(a[::-1], (0, 2, 2, 0))
    box, bell = np.full((7, 7), 1 / 49), np.exp(-(np.arange(-5, 6)[:, None] ** 2) / (2 * 1.5**2))
    gray = [v @ [0.2125, 0.7154, 0.0721] / 255 for v in (a, b)]
    for t in range(2):
        channels = [ssim_of_windows(a[t, ..., c], b[t, ..., c], box, 255, 49) for c in range(3)]
        assert pixels.ssim(a, b)[t] == pytest.approx(np.mean(channels), abs=1e-6)
        of_gray = ssim_of_windows(gray[0][t], gray[1][t], bell / bell.sum(), 1, 1e12)
        assert pixels.ssim_gray(a, b)[t] == pytest.approx(of_gray, abs=1e-6)
        error = np.square(a[t].astype(float) - b[t]).mean()
        assert pixels.psnr(a, b)[t] == pytest.approx(10 * np.log10(255**2 / error))
    with pytest.raises(ValueError, match="40 x 6 pixels, wanted at least 7 x 7: --size 256"):
        pixels.ssim(*np.zeros((2, 1, 40, 6, 3), np.uint8))
    assert pixels.ssim(a, a) == pytest.approx([1, 1]) == pixels.ssim_gray(a, a)
    assert pixels.psnr(a, a) == pytest.approx([10 * np.log10(255**2 * a[0].size)] * 2)


@pytest.mark.parametrize(("size", "height", "width"), [("256", 256, 256), ("native", 32, 48)])
def test_videos_are_compared_at_common_times_and_one_size(size, height, width):
    gt, pred = moving(6, 32, 48, 1, 0), moving(14, 60, 80, 1, 1)
    times = [1, 3, 5, 8, 10, 12]  # the middles of six sixths of 14 frames: 14/12, 42/12, ...
    of_pred, of_gt = METRICS["psnr"].picks(None, Config(size=size), video_of(pred), video_of(gt))
    assert of_pred.shape == of_gt.shape == (6, height, width, 3)
    for frames, resized_ones in ((pred[times], of_pred), (gt, of_gt)):
        by_pil = [Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC) for f in frames]
        assert abs(np.stack(by_pil).astype(int) - resized_ones).mean() < 0.5  # PIL resizes in whole numbers


def test_clip_pcc_and_dtc_by_hand():
    e = unit(np.random.default_rng(0).normal(size=(5, 8)) + 0.7)
    judge = lambda frames: e[frames[:, 0, 0, 0]]  # noqa: E731
    adjacent = pytest.approx(np.mean([e[i] @ e[i + 1] for i in range(4)]), abs=1e-6)
    pairs = pytest.approx(np.mean([e[i] @ e[j] for i, j in combinations(range(5), 2)]), abs=1e-6)
    assert measured("clip_pcc", judge, "256", counting(5)) == adjacent
    assert measured("clip_pcc_all_pairs", judge, "256", counting(5)) == pairs
    assert measured("clip_pcc_gated", judge, "256", counting(5), counting(5)) == adjacent
    of_clips = [METRICS["clip_pcc"].of_clip(judge, Config(), counting(n), None) for n in (1, 2)]
    assert of_clips == [None, pytest.approx(e[0] @ e[1], abs=1e-6)]
    four = np.array([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], np.float32)
    # cosines to the one before 0, 0, -0.6; to the first 0, -1, 0.6
    assert measured("dtc", lambda frames: four, "256", video_of(moving(4))) == pytest.approx(0.6 / 6)
    pred = unit(np.array([[2, 1.0], [1, 1], [1, 2]]))  # their mean points to (1, 1)
    for cosine_of_means, passes in ((0.59, False), (0.61, True), (-0.9, False)):
        angle = np.pi / 4 + np.arccos(cosine_of_means)
        gt = 3 * np.array([[np.cos(angle), np.sin(angle)]] * 4)
        assert features.gated(pred, gt) == pytest.approx(3 / 10**0.5 if passes else 0)


def test_dino_sees_whole_frames_whose_short_side_is_its_own(tmp_path):
    torch.manual_seed(0)
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = ViTConfig(image_size=32, patch_size=16, initializer_range=0.3, **size)
    vit = ViTModel(config, add_pooling_layer=False).eval()
    vit.save_pretrained(tmp_path)
    mean, std = [0.1, 0.4, 0.7], [0.2, 0.5, 0.9]
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=mean, image_std=std)
    processor.save_pretrained(tmp_path)
    frames = moving(33, 48, 96, 1)
    with torch.inference_mode():
        x = torch.from_numpy(frames).movedim(-1, 1) / 255
        x = nn.functional.interpolate(x, (32, 64), mode="bilinear", antialias=False)
        x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        tokens = vit(x, interpolate_pos_encoding=True).last_hidden_state
        e = features.dino_frames(str(tmp_path), "cpu")(frames)
    np.testing.assert_allclose(e, unit(tokens[:, 0].numpy()), atol=1e-5)


@pytest.mark.parametrize(("fast", "dynamic"), [(3, 0), (4, 1)])
def test_dynamic_degree_by_hand(fast, dynamic):
    """16 frames: at least 4 pairs must have 5 % of the pixels faster than 6 pixels of 256."""
    flow, still = np.zeros((2, 15, 2, 64, 128), np.float32)
    flow[:fast, 1, :4] = 1.6  # 6.25 % of the rows; the threshold is 6 x 64 / 256 = 1.5
    flow[fast:, 0, :4] = 1.4
    video, gt = video_of(np.zeros((16, 64, 128, 3), np.uint8)), video_of(np.ones((16, 64, 128, 3), np.uint8))
    judge = lambda frames: still if frames.any() else flow  # noqa: E731
    assert measured("dynamic_degree", judge, "native", video) == dynamic
    assert measured("delta_dynamic_degree", judge, "native", video, gt) == dynamic
    assert measured("delta_dynamic_degree", judge, "native", gt, video) == -dynamic
    assert motion.dynamic(flow[:13]) == (fast > 3)  # 14 frames: at least 3.5 pairs
    seen, noted = [], lambda f: (seen.append(f[:, 0, 0, 0].tolist()), np.zeros((9, 2, 8, 8)))[1]
    pred, gt = counting(30), counting(9)
    pred.fps = 24.0  # looked at eight times a second
    measured("delta_dynamic_degree", noted, "256", pred, gt)
    assert seen == [[*range(0, 30, 3)], [*range(9)]]


def test_motion_smoothness_is_of_the_middle_frames():
    """Of six frames the last odd one is not judged."""
    frames = np.array([10, 20, 30, 50, 60, 90], np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
    middle = lambda even: ((even[:-1].astype(int) + even[1:]) // 2).astype(np.uint8)  # noqa: E731
    still = lambda even: np.zeros((len(even) - 1, 2, 8, 8), np.float32)  # noqa: E731
    for name, judge in (("ms", middle), ("ms_flow", still)):
        assert measured(name, judge, "native", video_of(frames)) == pytest.approx(1 - (0 + 5) / 2 / 255)


def test_motion_smoothness_as_vbench(tmp_path):
    """Where the published metrics are not installed (docs/metrics.md), it is skipped."""
    pytest.importorskip("vbench", reason="pip install --no-deps vbench omegaconf easydict decord imageio")
    published = importlib.import_module("vbench.motion_smoothness")
    torch.manual_seed(0)
    amt = importlib.import_module("vbench.third_party.amt.networks.AMT-S").Model()
    torch.save({"state_dict": amt.state_dict()}, tmp_path / "amt.pth")
    config = Path(published.__file__).parent / "third_party" / "amt" / "cfgs" / "AMT-S.yaml"
    frames = moving(6, 72, 100, 3)  # padded to 80 x 112
    theirs = published.MotionSmoothness(str(config), str(tmp_path / "amt.pth"), "cpu")
    theirs.fp.get_frames_from_img_folder = lambda folder: list(frames)
    expected = theirs.motion_score(str(tmp_path))
    judge = motion.load_amt(str(tmp_path / "amt.pth"), "cpu")
    with torch.inference_mode():
        assert measured("ms", judge, "native", video_of(frames)) == pytest.approx(expected, abs=1e-4)
    assert 0 < expected < 0.999


class Network(nn.Module):
    """What RAFT and AMT are given."""

    def __init__(self):
        super().__init__()
        self.weight, self.inputs = nn.Parameter(torch.zeros(1)), []

    def forward(self, a, b, *half, **options):
        self.inputs.append((a, b, half, options))
        if half:
            return {"imgt_pred": a + (b - a) * half[0]}
        return [torch.zeros_like(a), a[:, :2] + 4 * b[:, :2]]


def test_raft_and_amt_see_neighbours_padded_on_all_sides(tmp_path, monkeypatch):
    raft, frames = Network(), moving(19, 13, 21, 1)
    monkeypatch.setitem(sys.modules, "vbench.third_party.amt.networks.AMT-S", SimpleNamespace(Model=Network))
    torch.save({"state_dict": {"weight": torch.ones(1)}}, tmp_path / "amt.pth")
    amt_between = motion.load_amt(str(tmp_path / "amt.pth"), "cpu")
    (amt,) = amt_between.args
    with torch.inference_mode():
        flow, between = motion.raft_flow(raft, frames), amt_between(frames[:2])
    assert amt.weight == 1 and not amt.training
    x = (frames / 127.5 - 1).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(flow, x[:-1, :2] + 4 * x[1:, :2], atol=1e-5)
    assert [len(a) for a, *_ in raft.inputs] == [16, 2] and raft.inputs[0][3] == {"num_flow_updates": 20}
    padded = np.pad(x, ((0, 0), (0, 0), (57, 58), (53, 54)), mode="edge")  # RAFT needs 128 pixels
    np.testing.assert_allclose(raft.inputs[1][1], padded[17:], atol=1e-6)
    assert between.dtype == np.uint8  # cut to whole numbers
    assert abs(between[0] - (frames[0].astype(int) + frames[1]) // 2).mean() < 0.1
    (a, _, (half,), options) = amt.inputs[0]
    assert a.shape == (1, 3, 16, 32) and half.flatten().tolist() == [0.5] and options == {"eval": True}
    assert motion.raft_flow(None, frames[:1]).shape == (0, 2, 13, 21)
    motion.raft_flow(raft, moving(2, 129, 144))
    assert raft.inputs[-1][0].shape == (1, 3, 136, 144)  # else multiples of 8


def test_flow_points_where_the_texture_moves():
    flow = motion.farneback_flow
    slow, fast = (moving(5, speed=v) for v in (1, 2))
    w = flow(fast)
    assert w.shape == (4, 2, 48, 64) and w[:, 0, 8:-8, 8:-8].mean() == pytest.approx(2, abs=0.1)
    a, b = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in fast[1:3])  # as Mind-Animator's code
    by_opencv = cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0)
    np.testing.assert_array_equal(w[1], by_opencv.transpose(2, 0, 1))
    assert flow(fast[:1]).shape == (0, 2, 48, 64)
    assert measured("epe", flow, "native", video_of(fast), video_of(slow)) == pytest.approx(1, abs=0.1)


def test_epe_and_warping_by_hand():
    w, g = np.random.default_rng(0).normal(size=(2, 4, 2, 12, 16))
    by_hand = [np.hypot(*(w - g)[t, :, y, x]) for t in range(4) for y in range(12) for x in range(16)]
    assert motion.epe(w, g) == pytest.approx(np.mean(by_hand))
    frames, flow = moving(2, 20, 24, seed=3), np.random.default_rng(1).normal(size=(1, 2, 20, 24))
    frames[1] = frames[1, ::-1]
    y, x = np.mgrid[:20, :24].astype(float)
    sampled = []
    for frame, sign in zip(frames.astype(float), (-1, 1), strict=True):
        at = [y + sign * flow[0, 1] / 2, x + sign * flow[0, 0] / 2]
        sampled.append([map_coordinates(frame[..., c], at, order=1, mode="nearest") for c in range(3)])
    expected = np.moveaxis(np.mean(sampled, 0), 0, -1)
    assert abs(motion.warped_half_way(flow, frames)[0] - expected).max() <= 0.51


def test_n_way_by_hand():
    probs = torch.tensor([[0.4, 0.1, 0.3, 0.15, 0.05]] * 2)
    gt = torch.tensor([[1, 2], [4, 0]])  # 0.1 and 0.3; 0.05 and 0.4
    for n, k, expected in (
        (2, 1, [2 / 3, 1]),
        (3, 1, [math.comb(2, 2) / math.comb(3, 2), 1]),
        (3, 2, [1, 1]),
    ):
        np.testing.assert_allclose(n_way_top_k(probs, gt, n, k), expected)
    assert n_way_top_k(torch.ones(1, 5) / 5, gt[:1], 2) == [0]  # what cannot be told apart is no hit
    with pytest.raises(ValueError, match="5-way: only 3 classes beside those of the GT, wanted 4"):
        n_way_top_k(probs, gt, 5)
    p = np.arange(53.0)[::-1][None]  # the stimulus has the second likeliest and two of the least likely
    p_gt = np.zeros((1, 53))
    p_gt[0, [1, 51, 52]] = 0.2, 0.3, 0.4
    for name in NAMES[:4]:
        expected = 49 / 50 if "2way" in name else 1 / 50
        assert METRICS[name].formula(p, p_gt) == pytest.approx(expected)
        assert METRICS[name].chance == pytest.approx(3 / 4 if "2way" in name else 3 / 52)


def write_classifier(folder: Path, names: list[str], video: bool) -> Path:
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    size = dict(image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)  # fmt: skip
    torch.manual_seed(0)
    if video:
        model = VideoMAEForVideoClassification(VideoMAEConfig(**size, **labels, initializer_range=0.5))
        processor = VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        model = ViTForImageClassification(ViTConfig(**size, **labels, initializer_range=0.5))
        processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    model.half().save_pretrained(folder)
    return folder


def test_a_classifier_takes_a_clips_own_frames(tmp_path, frames=33):
    """As the public code of MinD-Video: from_pretrained(..., num_frames=the clip's). One of pictures judges each."""
    own = {"num_frames": frames}
    for kind, more in ((VideoMAEForVideoClassification, own), (ViTForImageClassification, {})):
        folder = write_classifier(tmp_path / kind.__name__, list("abcde"), bool(more))
        judge, video = Classifier(folder), moving(frames, 32, 32, 1)
        theirs = kind.from_pretrained(folder, dtype=torch.float32, **more).eval()
        with torch.inference_mode():
            inputs = judge.processor(list(video), return_tensors="pt")["pixel_values"]
            np.testing.assert_allclose(judge(video), theirs(inputs).logits.softmax(-1).numpy(), atol=1e-6)
        assert (judge.of_video, judge.names) == (bool(more), list("abcde"))


@pytest.mark.parametrize(("of_video", "number", "lengths", "expected"), [
    (True, "own", (14, 6), [[1, 3, 5, 8, 10, 12], [0, 1, 2, 3, 4, 5]]),  # at common times, spread over the clip
    (True, "own", (1, 9), [[0, 0], [2, 6]]),  # two frames are one token of VideoMAE
    (True, "16", (4, 32), [[0] * 4 + [1] * 4 + [2] * 4 + [3] * 4, [*range(1, 32, 2)]]),
])  # fmt: skip
def test_a_classifier_is_given_frames_spread_over_the_clip(of_video, number, lengths, expected):
    judge = Network()
    judge.of_video, judge.least, judge.forward = of_video, 2, lambda frames: frames[:, 0, 0, 0].tolist()
    videos = [counting(length) for length in lengths]
    assert METRICS["video_2way"].picks(judge, Config(classifier_frames=number), *videos) == expected


def test_identity_is_best_and_shuffled_is_chance(tmp_path, monkeypatch, capsys):
    """Of 20 clips of the toy world."""
    monkeypatch.chdir(REPO)  # where toy/ lies
    rng, (seen, _) = np.random.default_rng(3), combinations_of_toy()
    clips = [render(random_clip(seen[i], rng))[:7] for i in rng.permutation(len(seen))[:20]]
    root = write_pairs(tmp_path / "set", clips, same=clips)
    assert main(parse(["--data", "toy", "--pairs", str(root)])) == 0
    m = results_of(root, "same")["metrics"]
    assert list(m) == NAMES
    best = dict.fromkeys(NAMES[:4], 1.0) | dict(epe=0.0, ssim=1.0, ssim_gray=1.0, delta_dynamic_degree=0.0)
    for name, value in best.items():
        assert m[name]["mean"] == pytest.approx(value, abs=1e-9), name
    assert m["clip_pcc_gated"]["mean"] == m["clip_pcc"]["mean"] > 0.9
    assert m["dtc"]["mean"] > 0.3 and m["ms_flow"]["mean"] > 0.95
    for name, near in zip(NAMES[:4], (0.15, 0.08, 0.15, 0.08), strict=True):
        assert abs(m[name]["shuffled"] - m[name]["chance"]) < near, name
    assert m["psnr"]["shuffled"] < 30 and m["dtc"]["shuffled"] is None  # it does not look at the stimulus
    assert m["ms"]["mean"] is None and m["ms"]["reason"] == "not asked for (--metrics)"
    assert "Farneback" in m["epe"]["weights"] and "sha256" in m["video_2way"]["weights"]
    assert "quoted" not in capsys.readouterr().out  # numbers of the toy world stand beside no published ones


def test_second_run_computes_only_what_is_new(three, monkeypatch):
    config, computed = PIXELS | {"pairs": str(three)}, []
    for _ in range(2):
        main(Config(**config))
        monkeypatch.setattr(metrics.score, "watch", lambda *_: pytest.fail("a video was read again"))
    monkeypatch.undo()
    for name in ("psnr", "epe"):
        noted = lambda *_, name=name: (computed.append(name), 0.0)[1]  # noqa: E731
        monkeypatch.setitem(METRICS, name, METRICS[name]._replace(judge="", formula=noted))
    again = partial(score, find_pairs(three), Config(**config | {"metrics": "psnr,epe"}), three / "metrics")
    again()
    assert computed == ["epe"] * 6  # three clips, each with its control
    np.save(three / "ours" / "0001.npy", moving(6, speed=2))
    again()
    assert sorted(computed[6:]) == ["epe"] * 2 + ["psnr"] * 2
    # what a kill cut short is passed over, and what follows it is kept; what cannot be is computed anew
    values, known = three / "metrics" / "values" / "0.jsonl", known_values(three / "metrics")
    values.write_text(values.read_text()[:-9])
    again()
    assert known_values(three / "metrics") == known
    key = keys_of(find_pairs(three)["ours"][1], Config(**config))["psnr"]
    for damage in (b"\xff\xfe", b'{"KEY": [1]}', b'{"KEY": [NaN, 0.5]}', b'{"KEY": [0.5, -3]}', b"[" * 5000):
        with open(values, "ab") as file:
            file.write(b"\n" + damage.replace(b"KEY", key.encode()))
        again()
        assert known_value(known_values(three / "metrics"), "psnr", key) == known[key], damage


def test_a_value_of_other_options_or_videos_is_not_reused(three, tmp_path):
    pair, names = find_pairs(three)["ours"][0], "ssim,clip_pcc,video_2way"
    weights = write_classifier(tmp_path / "v", list("abcde"), True)

    def keys(pair=pair, **options) -> dict[str, str]:
        return keys_of(pair, Config(metrics=names, video_classifier=str(weights), **options))

    first = keys()
    assert list(first) == ["video_2way", "clip_pcc", "ssim"] and len({*first.values()}) == 3
    another_half = pair._replace(pred=Source(pair.pred.path, "left"))
    for changes in (dict(size="native"), dict(classifier_frames="16"), dict(trials=7), dict(seconds=3.0),
                    dict(pair=another_half)):  # fmt: skip
        assert all(key != first[name] for name, key in keys(**changes).items()), changes
    for another in (pair._replace(gt=pair.control), pair._replace(control=None)):
        alike = {name for name, key in keys(another).items() if key == first[name]}
        assert alike == {"clip_pcc"}  # it sees no GT
    thinned = {name for name, key in keys(pair._replace(frames=4)).items() if key != first[name]}
    assert thinned == {"clip_pcc"}  # it compares neighbours
    assert {name for name, key in keys(clip="another").items() if key != first[name]} == {"clip_pcc"}
    state = load_file(weights / "model.safetensors")
    state["classifier.bias"] *= torch.nan
    save_file(state, weights / "model.safetensors", metadata={"format": "pt"})
    assert {name for name, key in keys().items() if key != first[name]} == {"video_2way"}
    judges = Judges(Config(video_classifier=str(weights)), "cpu")
    assert judges("video_classifier") is None
    assert re.search(f"{weights}.*NaN or infinity", judges.unavailable["video_classifier"])


def upper(picture: Image.Image, row: int, column: int, rows: int, columns: int) -> np.ndarray:
    """Mean colour (3,) of the upper part of a cell of a page."""
    W, H = picture.width / columns, picture.height / rows
    box = (column * W + 12, row * H + 40, (column + 1) * W - 12, row * H + H * 0.6)
    return np.asarray(picture.convert("RGB").crop([int(x) for x in box]), float).mean((0, 1))


def test_formats_names_several_methods_and_the_order_of_what_is_written(tmp_path, capsys):
    """é composed or not is é. metrics.json comes last: extras/ablations.py takes it for the end."""
    colours = {"gt": 0, "a": 1, "b": 2}
    command = ["--pairs", str(tmp_path), "--metrics", "ssim,psnr", "--size", "native"]
    for i, name in enumerate(("9.mp4", "10.GIF", "é.npy")):
        for folder, colour in colours.items():
            frames = (moving(8, 32, 32, 1, i) if folder == "a" else moving(6, speed=1, seed=i)) // 2
            frames[..., colour] += 100
            file = tmp_path / folder / unicodedata.normalize("NFD" if folder == "a" else "NFC", name)
            file.parent.mkdir(exist_ok=True)
            np.save(file, frames) if file.suffix == ".npy" else write_video(file, frames, 8)
    (tmp_path / "gt" / ".DS_Store").write_bytes(b"")
    (tmp_path / "a" / "._9.mp4").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(metrics.report, "_pictures", lambda *_: 1 / 0)
        main(parse(command))
    assert not list(tmp_path.rglob("metrics.json"))
    assert main(parse(command)) == 0
    assert [row["clip"] for row in results_of(tmp_path, "a")["clips"]] == ["9", "10", "é"]
    text, out = capsys.readouterr().out, tmp_path / "metrics"
    assert "quoted" not in text and "are n/a: 1 of them" in text  # three clips are not cc2017's test set
    assert "another stimulus" in text and "shuffled" not in text  # --pairs knows no scenes
    with Image.open(out / "sheet.png") as sheet, Image.open(out / "grid.gif") as grid:
        for column, folder in enumerate(colours):  # stimulus | a | b: each in its own colour
            assert upper(sheet, 2, column, 3, 3).argmax() == colours[folder]
        assert grid.n_frames == 8 and grid.info["duration"] == pytest.approx(2000 / 8, abs=10)


def test_neighbours_are_measured_at_the_times_of_the_coarsest_of_a_table(tmp_path, capsys):
    """The same videos at 33 frames and at 6 have one EPE, but by --frames own."""
    gt, fine = ([moving(33, speed=v, seed=i) for i in range(2)] for v in (0.2, 0.5))
    coarse = [v[uniform_frames(33, 6)] for v in fine]
    root, means, names = write_pairs(tmp_path / "set", gt, fine=fine, coarse=coarse), {}, "epe,ms_flow,psnr"
    for kind in ("common", "own"):
        words = ["--pairs", str(root), "--flow", "farneback", "--metrics", names, "--size", "native"]
        assert main(parse([*words, "--frames", kind])) == 0
        step = "EPE: of the coarsest video's times, 6 frames a clip, 0.333 s between neighbours"
        assert (step in capsys.readouterr().out) == (kind == "common")
        for method in ("fine", "coarse"):
            entries = results_of(root, method)["metrics"]
            means[kind, method] = np.array([entries[name]["mean"] for name in names.split(",")])
    np.testing.assert_allclose(means["common", "fine"][:2], means["common", "coarse"][:2], rtol=0.05)
    assert means["common", "fine"][0] > 3 * means["own", "fine"][0]
    assert means["common", "fine"][2] == means["own", "fine"][2]  # PSNR compares no neighbours
    np.testing.assert_array_equal(means["common", "coarse"], means["own", "coarse"])


def test_ranked_picture_goes_from_best_to_worst(tmp_path):
    """Of ten predictions the two best, two in the middle and the two worst; black is worst."""
    gt, order = [moving(2, 48, 64, seed=i) for i in range(10)], np.random.default_rng(0).permutation(10)
    ours = [(v * (1 - 0.09 * k)).astype(np.uint8) for v, k in zip(gt, order, strict=True)]
    main(Config(**PIXELS | {"size": "native"}, pairs=str(write_pairs(tmp_path, gt, ours=ours))))
    ssim = [row["ssim"] for row in results_of(tmp_path)["clips"]]
    assert np.argsort(ssim)[::-1].tolist() == np.argsort(order).tolist()
    sheet = order[[0, 2, 4, 5, 7, 9]]  # evenly spread
    for file, brightness in (("ranked.png", np.array([0, 1, 4, 5, 8, 9])), ("sheet.png", sheet)):
        with Image.open(tmp_path / "metrics" / file) as page:
            ratio = [upper(page, row, 1, 6, 2).mean() / upper(page, row, 0, 6, 2).mean() for row in range(6)]
        np.testing.assert_allclose(ratio, 1 - 0.09 * brightness, atol=0.05)


VALUES = {  # of clips 0 ... 2 [value, value against another stimulus]
    "video_50way": [[0.5, 0.1], [0.9, 0.2], [0.1, 0.0]],
    "delta_dynamic_degree": [[-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]],
    "dtc": [[0.5, None], [None, None], [0.8, None]],
    "psnr": [[11.0, 7.0], [12.0, 8.0], [16.0, 6.0]],
}


def test_what_is_reported_of_values(three):
    pairs, out = find_pairs(three), three / "out"
    config = Config(data="none", metrics=",".join(VALUES), trials=64)
    known = []
    for i, pair in enumerate(pairs["ours"]):
        known.append({key: VALUES[name][i] for name, key in keys_of(pair, config).items()})
    (out / "values").mkdir(parents=True)
    (out / "values" / "0.jsonl").write_text("\n".join(map(json.dumps, known)))
    groups, more = {"old": np.array([True, False, True])}, {"all_attributes": np.array([1, 0, 0])}
    text = report(Evaluation(pairs, out, config, {}, {"run": "full"}, groups, more))
    result, third = json.loads((out / "metrics.json").read_text()), pytest.approx(1 / 3)
    m = result["metrics"]
    for name, expected in {
        "video_50way": (pytest.approx(0.5), pytest.approx(0.55 / 12), 3 / 52, pytest.approx(0.1), 3),
        "delta_dynamic_degree": (third, None, None, third, 3),
        "dtc": (pytest.approx(0.65), pytest.approx(0.15), None, None, 2),
        "psnr": (13, pytest.approx((14 / 3) ** 0.5), None, 7, 3),
    }.items():
        columns = ("mean", "std", "chance", "shuffled", "n")
        assert tuple(m[name][column] for column in columns) == expected, name
    assert m["dtc"]["reason"] == "1 of 3 clips have no value: 1 videos of fewer than 2 frames"
    row = {name: values[2][0] for name, values in VALUES.items()}
    assert result["clips"][2] == {"clip": "0002", **row, "all_attributes": 0}
    old = result["groups"]["old"]
    assert old["clips"] == ["0000", "0002"] and old["psnr"] == {"mean": 13.5, "ci95": None}
    assert old["all_attributes"]["mean"] == 0.5 and old["delta_dynamic_degree"]["mean"] == 0
    origin = result["provenance"]
    assert [origin[name] for name in ("run", "method", "trials")] == ["full", "ours", 64]
    table = {tuple(re.split(r"\s{2,}", line.strip())) for line in text.split("\n")}
    assert {("ours, 3 clips: mean ±", "-", "0.500±0.05", "-", "-"), ("chance", "-", "0.058", "-", "-"), ("shuffled", "-", "0.100", "-", "-"),
            ("old, 2 clips", "-", "0.300", "-", "-")} <= table  # fmt: skip


def test_pictures_in_folders_and_one_array_of_all_clips_are_videos(three):
    clips = np.stack([np.load(file) for file in sorted((three / "ours").iterdir())])
    np.save(three / "array.npy", clips)
    torch.save(torch.from_numpy(clips).movedim(-1, 2) / 255, three / "floats.pt")
    for i, t in np.ndindex(clips.shape[:2]):
        (three / "pictures" / f"{i:04d}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(clips[i, t]).save(three / "pictures" / f"{i:04d}" / f"frame{t + 5}.png")
    sets = find_pairs(three)
    assert list(sets) == ["ours", "pictures", "array", "floats"]
    for pairs in sets.values():
        np.testing.assert_array_equal([watch(pair.pred, 3.0).frames for pair in pairs], clips)
        assert watch(pairs[0].pred, 3.0).fps == 2 and pairs[2].gt == sets["ours"][2].gt
    keys = [keys_of(pair, Config(metrics="ssim"))["ssim"] for pairs in sets.values() for pair in pairs]
    assert len({*keys}) == len(keys)
    for write, message in (
        (lambda root: (root / "a").mkdir(), "gt has 0000, 0001, 0002; .*/a has none"),
        (lambda root: np.save(root / "array.npy", clips[:2]), "array.npy: found 2 clips, wanted 3, "),
        (lambda root: np.save(root / "ours.npy", clips), "ours.npy: another METHOD has its name"),
    ):
        write(three)
        with pytest.raises(ValueError, match=message):
            find_pairs(three)


def test_side_by_side_videos_are_cut(tmp_path):
    """The stimulus is on the left. The field's GIFs are 518 x 260: make_grid's border around 2 x 256 x 256."""
    pair = lambda i: [np.clip(moving(3, 256, 256, 1, seed + 9 * i), 40, 255) for seed in (0, 1)]  # noqa: E731
    both = np.stack([pair(i) for i in range(3)])
    glued = [np.concatenate([*pair], 2) for pair in both]
    bordered = torch.from_numpy(both).permute(0, 2, 1, 5, 3, 4)  # (clips, F, 2, 3, H, W)
    bordered = [
        np.stack([make_grid(t, nrow=2, padding=2).permute(1, 2, 0).numpy() for t in v]) for v in bordered
    ]
    assert bordered[0].shape == (3, 260, 518, 3)
    write_pairs(tmp_path, glued[:0], glued=glued, bordered=bordered)
    (tmp_path / "gt").rmdir()
    for pairs in find_pairs(tmp_path, split=True).values():
        for i, pair in enumerate(pairs):
            halves = [watch(source, 2.0).frames for source in (pair.pred, pair.gt, pair.control)]
            np.testing.assert_array_equal(halves, [both[i, 1], both[i, 0], both[(i + 1) % 3, 0]])
    write_video(tmp_path / "test1.gif", bordered[0], 8)  # the border is not quite black
    assert abs(watch(Source(tmp_path / "test1.gif", "right"), 2.0).frames - both[0, 1].astype(int)).mean() < 8
    with pytest.raises(FileNotFoundError, match="has videos in bordered, glued; wanted gt/NAME.*--split"):
        find_pairs(tmp_path)


@pytest.mark.parametrize(("change", "message"), [
    (lambda file: file.write_bytes(b"no video"), "ours/0001.npy: found .*--skip-bad"),
    (lambda file: file.rename(file.with_suffix(".mpg")), "without a partner: 0001; --skip-bad"),
])  # fmt: skip
def test_bad_files_are_missing_values_only_with_skip_bad(three, capsys, change, message):
    """Then a mean is also over the clips that all methods have."""
    write_pairs(three, [], every=[np.load(three / "gt" / f"{i:04d}.npy") for i in range(3)])
    change(three / "ours" / "0001.npy")
    config = PIXELS | {"pairs": str(three), "size": "native"}
    with pytest.raises(ValueError, match=message):
        main(Config(**config))
    assert main(Config(**config, skip_bad=True)) == 0
    assert capsys.readouterr().out.count("that all methods have, 2 clips") == 2
    for method in ("ours", "every"):
        result = results_of(three, method)
        first, second, third = (row.get("ssim") for row in result["clips"])
        assert (second is None) == (method == "ours")
        assert result["groups"]["that all methods have"]["ssim"]["mean"] == pytest.approx((first + third) / 2)
    m = results_of(three)["metrics"]["psnr"]
    assert m["n"] == 2 and m["reason"].endswith("videos that are missing or cannot be read")


def test_every_clip_gets_another_scene():
    for lengths in ((40,), (31, 20, 3)):
        segments = [f"test{s}" for s, n in enumerate(lengths) for _ in range(n)]
        n, order = len(segments), other_scenes(far_apart(segments))
        assert sorted(order) == [*range(n)]
        assert all(segments[i] != segments[j] or abs(i - j) > 15 for i, j in enumerate(order))
        assert len(lengths) == 3 or order[0] == n // 2  # turned round by half
    with pytest.raises(ValueError, match="--shuffle: 20 clips cannot"):
        other_scenes(far_apart(["test1"] * 20))


def test_a_judge_that_fails_ends_no_evaluation(three, monkeypatch, capsys):
    def judge(frames: np.ndarray) -> np.ndarray:
        if np.array_equal(frames, np.load(three / "ours" / "0001.npy")):
            raise RuntimeError("too small\nat line 3")
        return np.zeros((len(frames) - 1, 2, *frames.shape[1:3]))

    monkeypatch.setitem(metrics.score.LOADERS, "flow", lambda *_: judge)
    assert main(Config(data="cc2017", metrics="epe,ssim", pairs=str(three), size="native")) == 3
    m = results_of(three)["metrics"]
    assert (m["ssim"]["n"], "reason" in m["ssim"], m["epe"]["n"]) == (3, False, 2)
    assert m["epe"]["reason"] == "1 of 3 clips have no value: 0001: too small"
    assert m["epe"]["reason"] in capsys.readouterr().out


def test_presets():
    assert parse([]).data == "toy" and parse(["--pairs", "x"]).data == "cc2017"
    assert parse(["--pairs=x", "--data=toy"]).data == "toy"
    assert metrics.options.asked(parse(["--metrics", "psnr, ssim"])) == ["ssim", "psnr"]  # as in the table


def test_a_block_never_straddles_segments():
    assert blocks_of(["0003", "0019", "0020", "0041"]).tolist() == [0, 0, 1, 2]
    episodes = blocks_of([f"{i:04d}" for i in range(540)], "cinebrain")  # of 270 clips
    assert np.bincount(episodes).tolist() == [20] * 13 + [10] + [20] * 13 + [10] and episodes[270] == 14


def test_an_interval_is_of_95_percent_of_blocks_and_paired():
    """With t of one block fewer; by scipy's test of the blocks' means where all are of one size."""
    rng = np.random.default_rng(0)
    values, blocks = rng.normal(3, 2, size=160), np.arange(160) // 20
    mean, ci95, freedom = difference("epe", values, blocks)
    test = ttest_1samp(values.reshape(8, 20).mean(1), 0).confidence_interval(0.95)
    assert (mean, ci95, freedom) == (pytest.approx(values.mean()), pytest.approx([*test]), pytest.approx(7))
    uneven = np.concatenate([values, [np.nan, 3.0]])  # a ratio of sums: a block of one clip weighs little
    assert difference("epe", uneven, np.append(blocks, [3, 8]))[1] == pytest.approx(ci95, abs=0.1)
    assert difference("epe", values[:100], blocks[:100]) == (pytest.approx(values[:100].mean()), None, None)
    assert difference("ssim", np.where(blocks, 1.0, 0.9), blocks)[1][1] == 1  # its greatest value
    a = values - 3
    assert difference("epe", a + 0.01, blocks, a)[:2] == (pytest.approx(0.01), pytest.approx([0.01, 0.01]))


def test_an_interval_of_several_runs_is_over_their_seeds_too():
    rng = np.random.default_rng(1)
    clips, blocks, seeds = rng.normal(size=160), np.arange(160) // 20, np.array([[-0.3], [0.1], [0.2]])
    alone = np.subtract(*difference("", clips, blocks)[1])
    ci95 = [0.5 - 4.3027 * 0.2646 / 3**0.5, 0.5 + 0.6573]
    same = difference("", np.stack([clips] * 3), blocks)
    assert np.subtract(*same.ci95) == pytest.approx(alone) and same.freedom == pytest.approx(7)
    # the clips cancel: what is left is t of two degrees of freedom over the seeds
    assert difference("", clips + 0.5 + seeds, blocks, np.stack([clips] * 3))[:2] == (
        pytest.approx(0.5), pytest.approx(ci95, abs=1e-3)
    )  # fmt: skip
    both = difference("", clips + seeds, blocks)
    assert -np.subtract(*both.ci95) > -alone and 2 < both.freedom < 7
    ragged = np.stack([clips, np.where(blocks < 4, clips + 1, np.nan)])  # the second subject has one run
    assert difference("", ragged, blocks).more == pytest.approx(clips.mean() + 0.25)


def test_an_interval_of_a_signed_metric_is_of_the_absolute_mean():
    rng, blocks, name = np.random.default_rng(2), np.arange(320) // 20, "delta_dynamic_degree"
    a = rng.normal(size=320)
    a -= a.mean()
    low, high = difference("", a, blocks)[1]
    assert difference(name, a - 0.01, blocks)[:2] == (pytest.approx(0.01), [0, pytest.approx(high + 0.01)])
    assert difference(name, a - 0.5, blocks)[1] == pytest.approx([0.5 - high, 0.5 - low])
    mean, ci95, _ = difference(name, -a - 0.5, blocks, a + 0.4)  # farther from 0 by 0.1, whatever the signs
    assert [mean, *ci95] == pytest.approx([0.1] * 3)
    low, high = difference(name, a + 0.01, blocks, rng.permutation(a) + 0.01)[1]
    assert low < 0 < high  # both signs are open


def write_metrics(folder: Path, ssim: np.ndarray, dynamic: np.ndarray, subject=1, seed=0, **more) -> dict:
    folder.mkdir(parents=True)
    rows = [
        {"clip": f"{i:04d}", "ssim": s, "dynamic_degree": d, "delta_dynamic_degree": d - 1}
        for i, (s, d) in enumerate(zip(ssim.tolist(), dynamic.tolist(), strict=True))
    ]
    entries = {name: {"mean": None} for name in NAMES} | {"ssim": {"mean": float(ssim.mean())}}
    entries["delta_dynamic_degree"] = {"mean": float(abs(dynamic.mean() - 1))}
    origin = {"size": "256", "data": "cc2017", "subject": subject, "seed": seed}
    result = {"metrics": entries, "clips": rows, "provenance": origin} | more
    (folder / "metrics.json").write_text(json.dumps(result))
    return result


@pytest.fixture
def four_runs(tmp_path, monkeypatch) -> np.ndarray:
    """runs/cc2017: full, with its best memories of subject 1, and no-mom. Returns the SSIM that they share."""
    monkeypatch.chdir(tmp_path)
    base = np.random.default_rng(0).uniform(0.2, 0.4, 120)  # six blocks
    for subject, seed in ((1, 0), (1, 1), (2, 0), (2, 1)):
        folder = Path("runs") / "cc2017" / f"sub{subject}"
        clips = [f"{i:04d}" for i in range(60 if subject == 1 else 90)]  # each subject's own
        full, less = base + 0.1 + 0.05 * seed, base + 0.02 * subject + 0.05 * seed
        more: dict = {"groups": {"never shown": {"clips": clips}}}
        half = np.repeat([1.0, 0.0], 60)
        write_metrics(folder / f"no-mom-s{seed}" / "eval", less, half, subject, seed, **more)
        if subject == 1:
            more["memory"] = write_metrics(Path("played", f"{seed}"), base + 0.08, np.ones(120), 1)
        write_metrics(folder / f"full-s{seed}" / "eval", full, np.ones(120), subject, seed, **more)
    return base


def compared(capsys, words: str) -> list[tuple[str, str, str]]:
    """Of each row its label, Δ Dyn. Degree and SSIM; the title and the remark."""
    assert main(parse(["--data", "cc2017", "--compare", *words.split()])) == 0
    lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines() if line]
    assert lines[0][1::2] == ["Δ Dyn. Degree ↓", "SSIM ↑", "PSNR ↑"]
    return [(line[0], *line[2::2][:2]) for line in lines]


def test_runs_side_by_side(four_runs, capsys):
    """By hand. ± is by n - 1: 0.029 of 0, 0, 0.05, 0.05; by n it would be 0.025. A row names its run."""
    mean = four_runs.mean()
    _, full, own, group, no_mom, *_, less, paired, quoted = compared(capsys, "full no-mom")[:10]
    assert full == ("full, 240 clips: mean ± over 4 runs", "0.000±0.00", f"{mean + 0.125:.3f}±0.03")
    assert own[:2] == ("95 % interval of full", "[0.000, 0.000]")
    both = (four_runs[:60].mean() + four_runs[:90].mean()) / 2 + 0.125
    assert group == ("never shown, 150 clips", "0.000±0.00", f"{both:.3f}±0.03")
    assert no_mom[0] == "no-mom, 240 clips: mean ± over 4 runs"
    # nearer to the stimuli's dynamic degree; and 0.1 less 0.02 or 0.04; seeds are paired
    assert less == ("full less no-mom, 240 clips", "-0.500", "0.070") and paired[0] == "95 % interval, paired"
    assert paired[2] == "[0.070, 0.070]" and quoted[0].endswith("quoted from the paper")
    # of one subject, whose runs all have their best memories; of one seed, too
    rows = compared(capsys, "full no-mom --subject 1")
    labels = [label for label, *_ in rows]
    assert labels[1] == "full, 120 clips: mean ± over 2 runs"
    assert rows[4] == ("best memory, played", "0.000±0.00", f"{mean + 0.08:.3f}±0.00")
    at = labels.index("full less its memory, 120 clips")
    assert rows[at][2] == "0.045" and rows[at + 1][0] == "95 % interval, paired"
    rows = compared(capsys, "full --seed 1 --subject 1")
    assert rows[1] == ("full, 120 clips: 1 run", "0.000", f"{mean + 0.15:.3f}")
    # on the clips that both have, whatever their order
    result = write_metrics(Path("fewer"), four_runs - 0.03, np.ones(120), 1)
    Path("fewer/metrics.json").write_text(json.dumps(result | {"clips": result["clips"][:0:-1]}))
    rows = compared(capsys, "runs/cc2017/sub1/full-s0 fewer --subject 1")
    at = [label for label, *_ in rows].index("runs/cc2017/sub1/full-s0 less fewer, 119 clips")
    assert rows[at][2] == "0.130" and rows[at + 1][2] == "[0.130, 0.130]"


def test_runs_that_cannot_be_compared(four_runs, tmp_path):
    write_metrics(Path("runs/cc2017/sub1/no-mom-s2/eval"), four_runs[:80], four_runs[:80])
    origin = {"size": "256", "subject": 1, "classifier_frames": "own"}
    write_metrics(tmp_path / "frames", four_runs, four_runs, provenance=origin)
    write_metrics(tmp_path / "played2", four_runs, four_runs, memory={"metrics": {}, "clips": 3})
    for second, message in (
        ("no-mom", "no-mom: its runs scored 120 and 80 clips"),
        ("full/eval-shuffled", "no metrics.json there, nor in runs/cc2017/sub.*/full-s.*/eval-shuffled/"),
        ("frames", "--classifier-frames 16, and .* --classifier-frames own"),
        ("played2", "metrics.json: found .*, wanted what evaluate.py writes"),
        ("no-mom --subject 3 --seed 1", "full --subject 3 --seed 1: none of its 4 runs is of these"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            main(parse(f"--data cc2017 --compare full {second}".split()))


def test_stage_1s_table_is_of_images_captions_and_actions():
    """A Brain Model that reads images and actions out of the fMRI; captions are those of other clips."""
    f_c = nn.functional.normalize(torch.randn(70, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    targets = SimpleNamespace(e_img=f_c, e_txt=f_c.roll(1, 0), e_act=f_c, categories=f_c[:, :3] > 0)
    brain_model = Network()
    brain_model.forward = lambda x: (x[:, 0], None)
    heads = lambda f_c, e_img: (e_img, f_c, f_c[:, :3])  # noqa: E731
    far = ~np.eye(70, dtype=bool)
    fmri, shuffled, _ = retrieval.with_controls(brain_model, heads, f_c[:, None], targets, far).values()
    assert fmri["image top-1"] == fmri["action 50-way"] == fmri["category mAP"] == pytest.approx(1)
    assert fmri["text top-1"] < 0.2 and shuffled["image top-1"] < 0.2
