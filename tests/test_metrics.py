"""Metrics against independent formulas and the public code they follow; scoring of anyone's videos, its cache,
bad input, comparisons."""

import importlib
import json
import logging
import math
import re
import unicodedata
from functools import partial
from itertools import combinations
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import scipy.stats
import torch
from conftest import REPO
from PIL import Image
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter, map_coordinates
from skimage.color import rgb2gray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tiny import unit
from torchvision.models.optical_flow import raft_large
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
import metrics.pairs
import metrics.score
from evaluate import Config, main
from metrics import features, motion, pixels
from metrics.classes import Classifier, n_way_top_k
from metrics.pairs import Source, Watched, find_pairs, watch
from metrics.report import blocks_of, estimate
from metrics.score import Judges, keys_of, known_value, known_values, score
from metrics.table import METRICS, NAMES
from support.videos import read_video, resized, write_video

parse = partial(metrics.options.parse, doc="What it does.")

torch.set_num_threads(1)
PUBLISHED = REPO / ".." / "shared" / "data" / "cc2017" / "neuroclips_pairs"
PIXELS = {"data": "cc2017", "metrics": "ssim,ssim_gray,psnr"}


@pytest.fixture
def vbench():
    """The published metrics; the comparisons with them are skipped where it is not installed (README)."""
    pytest.importorskip(
        "vbench",
        reason="pip install --no-deps vbench omegaconf easydict; and decord opencv-python-headless imageio",
    )
    yield importlib.import_module
    logging.disable(logging.NOTSET)


def moving(F: int, H: int = 48, W: int = 64, speed: float = 0.0, seed: int = 0) -> np.ndarray:
    """A smooth texture that moves to the right, uint8 (F, H, W, 3)."""
    texture = gaussian_filter(np.random.default_rng(seed).random((H, W + 200, 3)), (3, 3, 0))
    texture = (255 * (texture - texture.min()) / np.ptp(texture)).astype(np.uint8)
    return np.stack([texture[:, 100 - (x := round(t * speed)) : 100 - x + W] for t in range(F)])


def video_of(frames: np.ndarray, fps: float = 8.0) -> Watched:
    return Watched(frames, fps)


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


def write_as(file: Path, frames: np.ndarray) -> None:
    if file.suffix.lower() == ".npy":
        with open(file, "wb") as opened:
            np.save(opened, frames)
    elif file.suffix.lower() == ".webm":
        with av.open(str(file), "w") as out:
            stream = out.add_stream("libvpx-vp9", rate=8, options={"lossless": "1"})
            stream.height, stream.width = frames.shape[1:3]
            for frame in frames:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode())
    else:
        write_video(file, frames, 8)


def results_of(root: Path, method: str = "ours") -> dict:
    return json.loads((root / "metrics" / method / "metrics.json").read_text())


@pytest.fixture
def three(tmp_path) -> Path:
    """Three pairs: a method's videos are the stimuli, noisy."""
    gt = [moving(6, speed=1, seed=i) for i in range(3)]
    noise = np.random.default_rng(9).integers(-20, 20, gt[0].shape)
    return write_pairs(tmp_path / "set", gt, ours=[np.clip(v + noise, 0, 255).astype(np.uint8) for v in gt])


# -- pixels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["noise", "smooth", "flat", "equal", "other flat", "small"])
def test_pixels_as_scikit_image(kind):
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 21, 34, 3), dtype=np.uint8)
    b = {
        "noise": rng.integers(0, 256, a.shape, dtype=np.uint8),
        "smooth": gaussian_filter(a, (0, 2, 2, 0)),
        "flat": np.full_like(a, 7),
        "equal": a,
        "other flat": np.full_like(a, 255),
        "small": a[:, :11, :13],
    }[kind]
    a = {"other flat": np.full_like(a, 254), "small": b[::-1].copy()}.get(kind, a)
    expected = [
        structural_similarity(x, y, data_range=255, channel_axis=-1) for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(pixels.ssim(a, b), expected, atol=1e-7)
    options = dict(
        channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0
    )
    expected = [structural_similarity(rgb2gray(x), rgb2gray(y), **options) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(pixels.ssim_gray(a, b), expected, atol=1e-7)
    if kind == "equal":
        np.testing.assert_allclose(pixels.psnr(a, b), 10 * np.log10(255**2 * a[0].size))
    else:
        expected = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b, strict=True)]
        np.testing.assert_allclose(pixels.psnr(a, b), expected, atol=1e-9)


def test_frames_too_small_for_a_window_name_the_option():
    with pytest.raises(ValueError, match="6 x 40 pixels, wanted at least 7 x 7: --size 256"):
        pixels.ssim(*np.zeros((2, 1, 6, 40, 3), np.uint8))
    with pytest.raises(ValueError, match="10 rows, wanted at least 11: --size 256"):
        pixels.ssim_gray(*np.zeros((2, 1, 10, 40, 3), np.uint8))


def test_videos_are_compared_at_common_times_and_one_size():
    gt, pred = moving(6, 32, 48, 1, 0), moving(14, 60, 80, 1, 1)
    times = [1, 3, 5, 8, 10, 12]  # the middles of six sixths of 14 frames: 14/12, 42/12, ...
    for size, (h, w) in (("256", (256, 256)), ("native", (32, 48))):
        small = [np.asarray(Image.fromarray(f).resize((w, h), Image.Resampling.BICUBIC)) for f in pred[times]]
        big = [np.asarray(Image.fromarray(f).resize((w, h), Image.Resampling.BICUBIC)) for f in gt]
        by_hand = [
            structural_similarity(x, y, data_range=255, channel_axis=-1)
            for x, y in zip(small, big, strict=True)
        ]
        found = measured("ssim", None, size, video_of(pred), video_of(gt))
        assert found == pytest.approx(np.mean(by_hand), abs=2e-3)  # PIL resizes in whole numbers


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published pairs are not there")
def test_published_pairs_as_scikit_image_by_hand(tmp_path):
    for file in sorted(PUBLISHED.glob("*.gif")):
        name, kind = file.stem.split("_")
        link = tmp_path / "demo" / {"gt": "gt", "pred": "neuroclips"}[kind] / f"{name}.gif"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())
    assert main(Config(**PIXELS | {"metrics": "ssim,psnr"}, pairs=str(tmp_path / "demo"))) == 0
    rows = results_of(tmp_path / "demo", "neuroclips")["clips"]
    assert len(rows) == 12
    for row in rows:
        gt, pred = (
            [f.convert("RGB") for f in frames_of(PUBLISHED / f"{row['clip']}_{kind}.gif")]
            for kind in ("gt", "pred")
        )
        assert (len(gt), len(pred)) == (6, 14)
        both = [(np.asarray(gt[i]), np.asarray(pred[k])) for i, k in enumerate([1, 3, 5, 8, 10, 12])]
        ssim = np.mean([structural_similarity(y, x, data_range=255, channel_axis=-1) for x, y in both])
        psnr = np.mean([peak_signal_noise_ratio(x, y, data_range=255) for x, y in both])
        assert row["ssim"] == pytest.approx(ssim, abs=1e-6) and row["psnr"] == pytest.approx(psnr, abs=1e-6)


def frames_of(gif: Path) -> list[Image.Image]:
    with Image.open(gif) as image:
        return [(image.seek(i), image.copy())[1] for i in range(image.n_frames)]


# -- CLIP-pcc and DTC -----------------------------------------------------------------------------------------------


def test_clip_pcc_in_three_definitions():
    e = unit(np.random.default_rng(0).normal(size=(5, 8)) + 0.7)
    other = unit(np.random.default_rng(1).normal(size=(5, 8)))
    pred, near, far = (video_of(moving(5, seed=i)) for i in range(3))
    made = [(pred, e), (near, e + 0.01), (far, other)]
    judge = lambda frames: next(x for video, x in made if np.array_equal(video.frames, frames))  # noqa: E731
    cosine = lambda x, y: x @ y / np.linalg.norm(x) / np.linalg.norm(y)  # noqa: E731
    adjacent = np.mean([cosine(e[i], e[i + 1]) for i in range(4)])
    assert measured("clip_pcc", judge, "256", pred) == pytest.approx(adjacent, abs=1e-6)
    pairs = np.mean([cosine(e[i], e[j]) for i, j in combinations(range(5), 2)])
    assert measured("clip_pcc_all_pairs", judge, "256", pred) == pytest.approx(pairs, abs=1e-6)
    assert cosine(e.mean(0), (e + 0.01).mean(0)) > 0.6 > cosine(e.mean(0), other.mean(0))
    assert measured("clip_pcc_gated", judge, "256", pred, near) == pytest.approx(adjacent, abs=1e-6)
    assert measured("clip_pcc_gated", judge, "256", pred, far) == 0


def tiny_vit(image: int = 224) -> ViTModel:
    torch.manual_seed(0)
    size = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=16
    )
    return ViTModel(
        ViTConfig(image_size=image, initializer_range=0.3, **size), add_pooling_layer=False
    ).eval()


def test_dtc_as_vbench(vbench, tmp_path):
    write_video(tmp_path / "v.mp4", np.concatenate([moving(5, 100, 100, 9), moving(3, 100, 100, 2, 1)]), 8)
    published, model = vbench("vbench.subject_consistency"), tiny_vit()
    logging.disable(logging.INFO)
    cls = lambda x: model(x).last_hidden_state[:, 0]  # noqa: E731
    expected, _ = published.subject_consistency(cls, [str(tmp_path / "v.mp4")], "cpu", read_frame=False)
    frames = (
        vbench("vbench.utils")
        .load_video(str(tmp_path / "v.mp4"))
        .permute(0, 2, 3, 1)
        .contiguous()
        .numpy()
        .astype(np.uint8)
    )
    judge = partial(features.dino_features, model, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        found = measured("dtc", judge, "256", video_of(frames))
    assert found == pytest.approx(expected, abs=1e-4) and 0 < expected < 0.99


def test_dtc_by_hand():
    e = np.array(
        [[1, 0], [0, 1], [-1, 0], [1, 0]], np.float32
    )  # cosines to the one before 0, 0, -1; to the first 0, -1, 1
    assert measured("dtc", lambda frames: e, "256", video_of(moving(4))) == pytest.approx(1 / 6)


# -- motion ---------------------------------------------------------------------------------------------------------


def raft_with_the_weights_of(published: torch.nn.Module) -> torch.nn.Module:
    """torchvision's RAFT with the weights of the original code, whose names differ."""
    names = {
        r"(f|c)net\.": lambda m: {"f": "feature", "c": "context"}[m[1]] + "_encoder.",
        r"encoder\.conv1\.": "encoder.convnormrelu.0.",
        r"encoder\.norm1\.": "encoder.convnormrelu.1.",
        r"encoder\.conv2\.": "encoder.conv.",
        r"(layer\d\.\d)\.conv(\d)\.": r"\1.convnormrelu\2.0.",
        r"(layer\d\.\d)\.norm([12])\.": r"\1.convnormrelu\2.1.",
        r"(layer\d\.\d)\.norm3\.": r"\1.downsample.1.",
        r"update_block\.encoder\.conv(c1|c2|f1|f2)\.": lambda m: (
            "update_block.motion_encoder.conv" + m[1].replace("c", "corr").replace("f", "flow") + ".0."
        ),
        r"update_block\.encoder\.conv\.": "update_block.motion_encoder.conv.0.",
        r"gru\.conv([zrq])([12])\.": r"recurrent_block.convgru\2.conv\1.",
        r"update_block\.mask\.0\.": "mask_predictor.convrelu.0.",
        r"update_block\.mask\.2\.": "mask_predictor.conv.",
    }
    model, state = raft_large().eval(), {}
    for name, value in published.state_dict().items():
        for old, new in names.items():
            name = re.sub(old, new, name)
        state[re.sub(r"(layer\d\.\d)\.downsample\.([01])\.", r"\1.downsample.\2.", name)] = value
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


def test_dynamic_degree_as_vbench(vbench, tmp_path):
    published = vbench("vbench.dynamic_degree")
    logging.disable(logging.INFO)
    options = published.edict({"small": False, "mixed_precision": False, "alternate_corr": False})
    torch.manual_seed(0)
    raft = vbench("vbench.third_party.RAFT.core.raft").RAFT(options).eval()
    torch.save({f"module.{name}": value for name, value in raft.state_dict().items()}, tmp_path / "raft.pth")
    theirs = published.DynamicDegree(published.edict(options | {"model": str(tmp_path / "raft.pth")}), "cpu")
    ours = partial(motion.raft_flow, raft_with_the_weights_of(raft))
    frames = moving(2, 131, 128, 2)  # 131 rows are padded to 136
    images = [torch.from_numpy(frame)[None].permute(0, 3, 1, 2).float() for frame in frames]
    padder = published.InputPadder(images[0].shape)
    theirs.get_frames_from_img_folder = lambda folder: [image[:, :, :128] for image in images]
    video = video_of(
        frames[:, :128]
    )  # VBench takes the fastest pixels before it cuts the padding off: compared without any
    with torch.inference_mode():
        expected = padder.unpad(theirs.model(*padder.pad(*images), iters=20, test_mode=True)[1])[0].numpy()
        assert (
            abs(ours(frames)[0] - expected).max() < 1e-4 * max(1, abs(expected).max())
            and abs(expected).max() > 1e-3
        )
        assert measured("dynamic_degree", ours, "native", video) == float(theirs.infer(str(tmp_path)))


@pytest.mark.parametrize("fast, dynamic", [(0, 0), (1, 0), (3, 0), (4, 1), (15, 1)])
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
    assert motion.dynamic(flow[:0]) == 0  # a pair of frames further apart than 1/8 s is none


def test_dynamic_degree_looks_at_eight_frames_a_second(tmp_path):
    write_video(tmp_path / "v.mp4", moving(30), 24)
    seen = []
    judge = lambda f: (seen.append(len(f)), np.zeros((9, 2, 8, 8)))[1]  # noqa: E731
    measured("dynamic_degree", judge, "256", watch(Source(tmp_path / "v.mp4"), 2.0))
    assert seen == [10]  # every third


def test_motion_smoothness_as_vbench(vbench, tmp_path):
    published = vbench("vbench.motion_smoothness")
    torch.manual_seed(0)
    amt = vbench("vbench.third_party.amt.networks.AMT-S").Model()
    torch.save({"state_dict": amt.state_dict()}, tmp_path / "amt.pth")
    config = Path(published.__file__).parent / "third_party" / "amt" / "cfgs" / "AMT-S.yaml"
    frames = moving(6, 72, 100, 3)  # padded to 80 x 112; of six frames the last odd one is not judged
    theirs = published.MotionSmoothness(str(config), str(tmp_path / "amt.pth"), "cpu")
    theirs.fp.get_frames_from_img_folder = lambda folder: list(frames)
    expected = theirs.motion_score(str(tmp_path))
    judge = motion.load_amt(str(tmp_path / "amt.pth"), "cpu")
    with torch.inference_mode():
        assert measured("ms", judge, "native", video_of(frames)) == pytest.approx(expected, abs=1e-4)
    assert 0 < expected < 0.999


def test_flow_of_a_moving_texture():
    flow = motion.farneback_flow
    slow, fast, still = (video_of(moving(5, speed=v)) for v in (1, 2, 0))
    w = flow(fast.frames)
    assert w.shape == (4, 2, 48, 64) and abs(w[:, 1]).mean() < 0.2
    assert w[:, 0, 8:-8, 8:-8].mean() == pytest.approx(2, abs=0.1)
    assert flow(fast.frames[:1]).shape == motion.raft_flow(None, fast.frames[:1]).shape == (0, 2, 48, 64)
    assert measured("epe", flow, "native", fast, fast) == 0
    assert measured("epe", flow, "native", fast, slow) == pytest.approx(1, abs=0.15)
    assert measured("ms_flow", flow, "native", still) == 1
    jumpy = video_of(np.stack([moving(1, seed=i % 3)[0] for i in range(5)]))
    assert measured("ms_flow", flow, "native", fast) > 0.98
    assert measured("ms_flow", flow, "native", jumpy) < 0.95


def test_farneback_as_mind_animator():
    """Its settings, by OpenCV itself, of gray frames."""
    frames = moving(3, speed=2)
    a, b = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames[1:])
    by_hand = cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0)
    np.testing.assert_array_equal(motion.farneback_flow(frames)[1], by_hand.transpose(2, 0, 1))


def test_epe_and_warping_by_hand():
    w, g = np.random.default_rng(0).normal(size=(2, 4, 2, 12, 16))
    by_hand = [np.hypot(*(w - g)[t, :, y, x]) for t in range(4) for y in range(12) for x in range(16)]
    assert motion.epe(w, g) == pytest.approx(np.mean(by_hand))
    frames, flow = moving(2, 20, 24, seed=3), np.random.default_rng(1).normal(size=(1, 2, 20, 24))
    y, x = np.mgrid[:20, :24].astype(float)
    sampled = []
    for frame, sign in zip(frames, (-1, 1), strict=True):
        at = [y + sign * flow[0, 1] / 2, x + sign * flow[0, 0] / 2]
        sampled.append(
            [map_coordinates(frame[..., c].astype(float), at, order=1, mode="nearest") for c in range(3)]
        )
    expected = np.moveaxis(np.mean(sampled, 0), 0, -1)
    assert abs(motion.warped_half_way(flow, frames)[0] - expected).max() <= 0.51


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
    np.testing.assert_allclose(
        n_way_top_k(torch.ones(1, 5) / 5, gt[:1], 2), [0]
    )  # what cannot be told apart is no hit
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
        VideoMAEImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ).save_pretrained(folder)
    else:
        model = ViTForImageClassification(ViTConfig(**size, **labels, initializer_range=0.5))
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    model.half().save_pretrained(folder)
    return folder


def inputs_of(model: Classifier, frames: np.ndarray) -> torch.Tensor:
    return model.processor(list(frames), return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("frames", [2, 6, 8, 33])
def test_a_video_classifier_takes_a_clips_own_frames(tmp_path, frames):
    """As the public code of MinD-Video: from_pretrained(..., num_frames=the clip's)."""
    folder, video = write_classifier(tmp_path / "v", list("abcde"), True), moving(frames, 32, 32, 1)
    judge = Classifier(folder)
    theirs = VideoMAEForVideoClassification.from_pretrained(
        folder, num_frames=frames, dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        expected = theirs(inputs_of(judge, video)).logits.softmax(-1).numpy()
        np.testing.assert_allclose(judge(video), expected, atol=1e-6)
        sixteen = judge(moving(16, 32, 32, 1))  # the model as it is, before and after
        np.testing.assert_allclose(judge(moving(16, 32, 32, 1)), sixteen)


def test_frames_that_a_classifier_is_given(tmp_path):
    seen = []
    folder = write_classifier(tmp_path / "v", list("abcde"), True)
    judge = Classifier(folder)
    judge_seen = lambda frames: (seen.append(len(frames)), judge(frames))[1]  # noqa: E731
    judge_seen.of_video, judge_seen.least = True, judge.least
    metric = METRICS["video_2way"]
    for own, wanted in (("own", [6, 6, 2, 2]), ("16", [16] * 4)):
        for pred, gt in ((14, 6), (1, 9)):  # at common times; two frames are one token of VideoMAE
            videos = video_of(moving(pred, 32, 32)), video_of(moving(gt, 32, 32))
            with torch.inference_mode():
                metric.picks(judge_seen, Config(classifier_frames=own), *videos)
        assert seen == wanted
        seen.clear()


# -- a set of pairs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_set(tmp_path_factory) -> Path:
    """20 clips of the toy world; `same` are the stimuli themselves."""
    from toy.world import combinations as kinds, random_clip, render

    rng = np.random.default_rng(3)
    seen, _ = kinds()
    clips = [render(random_clip(seen[i], rng))[:7] for i in rng.permutation(len(seen))[:20]]
    return write_pairs(tmp_path_factory.mktemp("toy") / "set", clips, same=clips)


@pytest.fixture
def toy_config(monkeypatch, tmp_path) -> dict:
    monkeypatch.chdir(REPO)  # where toy/ lies
    config = vars(parse(["--data", "toy"]))
    if not (REPO / "toy" / "dino").is_dir():
        tiny_vit(64).save_pretrained(tmp_path / "dino")
        ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "dino")
        config["dino"] = str(tmp_path / "dino")
    return config


def test_identity_is_best_and_shuffled_is_chance(toy_set, toy_config, capsys):
    assert main(Config(**toy_config | {"pairs": str(toy_set)})) == 0
    found = results_of(toy_set, "same")
    assert list(found["metrics"]) == NAMES and len(found["clips"]) == 20
    m = found["metrics"]
    best = dict.fromkeys(NAMES[:4], 1.0) | {
        "epe": 0.0,
        "ssim": 1.0,
        "ssim_gray": 1.0,
        "delta_dynamic_degree": 0.0,
    }
    best["psnr"] = 10 * np.log10(255**2 * 64 * 64 * 3)
    for name, value in best.items():
        assert m[name]["mean"] == pytest.approx(value, abs=1e-9), name
    assert (
        m["clip_pcc_gated"]["mean"] == m["clip_pcc"]["mean"] > 0.9
        and m["dtc"]["mean"] > 0.3
        and m["ms_flow"]["mean"] > 0.95
    )
    for name, near in (
        ("video_2way", 0.15),
        ("frame_2way", 0.15),
        ("video_50way", 0.08),
        ("frame_50way", 0.08),
    ):
        assert abs(m[name]["shuffled"] - m[name]["chance"]) < near, name
    assert m["psnr"]["shuffled"] < 30 and m["ssim"]["shuffled"] < 0.8 and m["epe"]["shuffled"] > 0
    assert m["dtc"]["shuffled"] is None  # it does not look at the stimulus
    assert m["ms"]["mean"] is None and m["ms"]["reason"] == "not asked for (--metrics)"
    assert "Farneback" in m["epe"]["weights"] and "sha256" in m["video_2way"]["weights"]
    assert "quoted" not in capsys.readouterr().out  # numbers of the toy world stand beside no published ones


def test_second_run_reads_no_video_and_leaves_the_same_bytes(three, monkeypatch):
    config = PIXELS | {"pairs": str(three)}
    main(Config(**config))
    file = three / "metrics" / "ours" / "metrics.json"
    before = file.read_bytes()
    score_only = partial(score, find_pairs(three), out=three / "metrics")
    with monkeypatch.context() as patch:
        patch.setattr(metrics.score, "watch", lambda *_: pytest.fail("a video was read again"))
        score_only(Config(**config))
    main(Config(**config))
    assert file.read_bytes() == before
    # one more metric, another video: only what is new is computed
    computed = []
    psnr = METRICS["psnr"].formula
    counted = METRICS["psnr"]._replace(formula=lambda *a: (computed.append("psnr"), psnr(*a))[1])
    monkeypatch.setitem(METRICS, "psnr", counted)
    epe = METRICS["epe"]._replace(judge="", formula=lambda *a: (computed.append("epe"), 0.0)[1])
    monkeypatch.setitem(METRICS, "epe", epe)
    score_only(Config(**config | {"metrics": "psnr,epe"}))
    assert computed == ["epe"] * 6  # three clips, each with its control
    np.save(three / "ours" / "0001.npy", moving(6, speed=2))
    score_only(Config(**config | {"metrics": "psnr,epe"}))
    assert sorted(computed[6:]) == ["epe"] * 2 + ["psnr"] * 2
    key = keys_of(find_pairs(three)["ours"][1], Config(**config | {"metrics": "psnr"}))["psnr"]
    by_hand = pixels.psnr(
        *(resized(np.load(three / kind / "0001.npy"), (256, 256)) for kind in ("ours", "gt"))
    )
    assert known_values(three / "metrics")[key][0] == pytest.approx(by_hand.mean())
    # what a kill cut short is passed over, and what follows it is kept
    values = three / "metrics" / "values" / "0.jsonl"
    known = known_values(three / "metrics")
    values.write_text(values.read_text()[:-9])
    score_only(Config(**config | {"metrics": "psnr,epe"}))
    assert known_values(three / "metrics") == known


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[1, 2]", b"5", b'{"KEY": "x"}', b'{"KEY": [1]}', b'{"KEY": [NaN, 0.5]}', b'{"KEY": [0.5, "x"]}',
             b'{"KEY": [true, 0.5]}', b'{"KEY": [7.0, 0.5]}', b'{"KEY": [0.5, -3]}', b'{"KEY": null}', b"[" * 5000]
)  # fmt: skip
def test_cached_values_that_cannot_be_are_computed_anew(three, line):
    config = Config(**PIXELS | {"metrics": "ssim"}, pairs=str(three))
    sets, out = find_pairs(three), three / "metrics"
    score(sets, config, out)
    key, before = keys_of(sets["ours"][1], config)["ssim"], known_values(out)
    with open(out / "values" / "0.jsonl", "ab") as file:
        file.write(b"\n" + line.replace(b"KEY", key.encode()))
    score(sets, config, out)
    assert known_value(known_values(out), "ssim", key) == before[key]


def test_a_folder_in_place_of_the_values_is_named(three):
    (three / "metrics" / "values" / "0.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match="values/0.jsonl: found a folder"):
        main(Config(**PIXELS, pairs=str(three)))


def test_processes_share_the_clips(three):
    config, sets = Config(**PIXELS, pairs=str(three)), find_pairs(three)
    score(sets, config, three / "one")
    for rank in (1, 0):
        score(sets, config, three / "two", rank=rank, world=2)
    shares = [len((three / "two" / "values" / f"{rank}.jsonl").read_text().split()) for rank in (0, 1)]
    assert known_values(three / "one") == known_values(three / "two") and min(shares) > 0


def test_trials_as_the_peers_and_the_same_again(toy_set, toy_config):
    config = toy_config | {"pairs": str(toy_set), "metrics": "video_50way"}
    sets = {"shifted": [pair._replace(pred=pair.control) for pair in find_pairs(toy_set)["same"]]}
    values = []
    for k, trials in enumerate((0, 100, 100)):
        options, out = Config(**config | {"trials": trials}), toy_set / "metrics" / f"t{k}"
        score(sets, options, out)
        known = known_values(out)
        values.append([known[keys_of(pair, options)["video_50way"]][0] for pair in sets["shifted"]])
    p, q, r = np.array(values)
    assert q.tolist() == r.tolist() and np.allclose(q * 100, (q * 100).round())
    hits = (100 * q).round()
    tail = np.minimum(scipy.stats.binom.cdf(hits, 100, p), scipy.stats.binom.sf(hits - 1, 100, p))
    assert (tail > 1e-6).all() and (p != q).any()


def upper(picture: Image.Image, row: int, column: int, rows: int, columns: int) -> np.ndarray:
    """Mean colour (3,) of the upper part of a cell of a page."""
    W, H = picture.width / columns, picture.height / rows
    box = (column * W + 12, row * H + 40, (column + 1) * W - 12, row * H + H * 0.6)
    return np.asarray(picture.convert("RGB").crop([int(x) for x in box]), float).mean((0, 1))


def test_formats_names_and_several_methods(tmp_path, capsys):
    colours = {"gt": 0, "a": 1, "b": 2}
    for i, suffix in enumerate(("mp4", "GIF", "webm", "npy", "MP4")):
        for folder, frames in (
            ("gt", moving(6, speed=1, seed=i)),
            ("a", moving(8, 32, 32, 1, i)),
            ("b", moving(6, speed=1, seed=i)),
        ):
            (tmp_path / folder).mkdir(exist_ok=True)
            file = tmp_path / folder / f"{i + 9}.{suffix}"
            frames = frames // 2
            frames[..., colours[folder]] += 100
            write_as(file, frames)
            assert read_video(file).frames.shape == frames.shape
    (tmp_path / "gt" / ".DS_Store").write_bytes(b"")
    (tmp_path / "a" / "._9.mp4").write_bytes(b"")
    assert main(parse(["--pairs", str(tmp_path), "--metrics", "ssim,psnr", "--size", "native"])) == 0
    assert [row["clip"] for row in results_of(tmp_path, "a")["clips"]] == ["9", "10", "11", "12", "13"]
    text, out = capsys.readouterr().out, tmp_path / "metrics"
    assert "a, 5 clips" in text and "b, 5 clips" in text
    assert "NeuroClips, quoted from the paper" in text and "9.211±1.46" in text
    assert "another stimulus" in text and "shuffled" not in text  # --pairs knows no scenes
    header = (out / "metrics.csv").read_text().splitlines()
    assert header[0].startswith("method,metric,mean") and len(header) == 1 + 2 * len(NAMES)
    with Image.open(out / "sheet.png") as sheet, Image.open(out / "grid.gif") as grid:
        for column, folder in enumerate(colours):  # stimulus | a | b: each in its own colour
            assert upper(sheet, 2, column, 5, 3).argmax() == colours[folder]
            assert upper(grid, 2, column, 5, 3).argmax() == colours[folder]
        assert grid.n_frames == 8


def test_ranked_picture_goes_from_best_to_worst(tmp_path):
    """Predictions whose brightness falls with their SSIM: black is worst."""
    gt = [moving(6, seed=i) for i in range(6)]
    order = [3, 0, 5, 1, 4, 2]
    worse = [(v * (1 - 0.18 * order[i])).astype(np.uint8) for i, v in enumerate(gt)]
    root = write_pairs(tmp_path, gt, ours=worse)
    main(Config(**PIXELS, pairs=str(root)))
    ssim = [row["ssim"] for row in results_of(root)["clips"]]
    assert np.argsort(ssim)[::-1].tolist() == np.argsort(order).tolist()
    with Image.open(root / "metrics" / "ranked.png") as page:
        ratio = []
        for row in range(6):
            stimulus, prediction = (upper(page, row, column, 6, 2).mean() for column in (0, 1))
            ratio.append(prediction / stimulus)
    np.testing.assert_allclose(ratio, 1 - 0.18 * np.arange(6), atol=0.05)


def test_side_by_side_videos_are_cut(three):
    for i in range(3):
        gt, ours = (np.load(three / kind / f"{i:04d}.npy") for kind in ("gt", "ours"))
        (three.parent / "glued" / "ours").mkdir(parents=True, exist_ok=True)
        np.save(three.parent / "glued" / "ours" / f"{i:04d}.npy", np.concatenate([gt, ours], 2))
    main(Config(**PIXELS, pairs=str(three)))
    main(Config(**PIXELS, pairs=str(three.parent / "glued"), split=True))
    apart, glued = results_of(three), results_of(three.parent / "glued")
    assert apart["clips"] == glued["clips"]
    with pytest.raises(FileNotFoundError, match="glued has videos in ours; wanted gt/NAME.*--split"):
        find_pairs(three.parent / "glued")


@pytest.mark.parametrize("suffix", ["npy", "gif", "mp4"])
def test_the_border_of_make_grid_is_cut_off(tmp_path, capsys, suffix):
    """The field's GIFs: two videos of 256 x 256 in 518 x 260."""
    metrics.pairs._write_once.cache_clear()
    both = [np.clip(moving(3, 256, 256, 1, seed), 40, 255) for seed in (0, 1)]
    frames = []
    for pair in zip(*both, strict=True):
        grid = make_grid(torch.from_numpy(np.stack(pair)).permute(0, 3, 1, 2), nrow=2, padding=2)
        frames.append(grid.permute(1, 2, 0).numpy())
    assert frames[0].shape == (260, 518, 3)
    file = tmp_path / f"test1.{suffix}"
    write_as(file, np.stack(frames))
    for half, video in zip(("left", "right"), both, strict=True):
        seen = watch(Source(file, half), 2.0).frames
        assert seen.shape == video.shape
        assert abs(seen.astype(int) - video).mean() < {"npy": 1e-9, "gif": 8, "mp4": 4}[suffix]
    assert capsys.readouterr().out.count("a black border of 2 pixels, as of make_grid, is cut off") == 1


@pytest.mark.parametrize("where", [(0, 5), (100, 0), (130, 258), (259, 300)])
def test_what_is_no_border_stays(tmp_path, where):
    """One bright pixel in one frame where make_grid has black: the halves are whole."""
    frames = np.zeros((3, 260, 518, 3), np.uint8)
    frames[:, 2:-2, 2:258] = frames[:, 2:-2, 260:-2] = 200
    frames[1, *where] = 90
    np.save(tmp_path / "v.npy", frames)
    left, right = (watch(Source(tmp_path / "v.npy", half), 2.0).frames for half in ("left", "right"))
    np.testing.assert_array_equal(left, frames[:, :, :259])
    np.testing.assert_array_equal(right, frames[:, :, 259:])


def test_names_composed_and_decomposed_are_one(three):
    for kind, form in (("gt", "NFC"), ("ours", "NFD")):
        (three / kind / "0001.npy").rename(three / kind / unicodedata.normalize(form, "café.npy"))
    assert [pair.name for pair in find_pairs(three)["ours"]] == ["0000", "0002", "café"]


# -- bad input ------------------------------------------------------------------------------------------------------


def test_no_pair_matches(three):
    for file in (three / "ours").iterdir():
        file.rename(file.with_name(f"x{file.name}"))
    with pytest.raises(ValueError, match=r"set/gt has 0000, 0001, 0002; .*set/ours has x0000, x0001, x0002"):
        main(Config(**PIXELS, pairs=str(three)))
    assert not (three / "metrics").exists()


def test_different_numbers_of_videos(three):
    (three / "ours" / "0001.npy").unlink()
    np.save(three / "ours" / "0007.npy", moving(6))
    with pytest.raises(
        ValueError, match="3 stimuli, 3 videos in ours; without a partner: 0001, 0007; --skip-bad"
    ):
        main(Config(**PIXELS, pairs=str(three)))
    assert main(Config(**PIXELS, pairs=str(three), skip_bad=True)) == 0
    found = results_of(three)
    assert [row["clip"] for row in found["clips"]] == ["0000", "0001", "0002"] and "ssim" not in found[
        "clips"
    ][1]
    assert found["metrics"]["ssim"]["n"] == 2 and found["metrics"]["ssim"]["reason"].startswith(
        "1 of 3 clips have no value"
    )


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webm", "npy"])
def test_truncated_video_is_named(tmp_path, suffix):
    write_as(
        file := tmp_path / f"v.{suffix}", np.random.default_rng(0).integers(0, 256, (12, 40, 48, 3), np.uint8)
    )
    assert read_video(file).frames.shape == (12, 40, 48, 3)
    whole = file.read_bytes()
    for share in (0.01, 0.5, 0.9):
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=rf"v.{suffix}: found"):
            read_video(file)


def test_bad_file_is_missing_only_when_told(three):
    (three / "ours" / "0001.npy").write_bytes(b"no video")
    with pytest.raises(ValueError, match="ours/0001.npy: found .*--skip-bad"):
        main(Config(**PIXELS, pairs=str(three)))
    assert not (three / "metrics" / "ours").exists()
    assert main(Config(**PIXELS, pairs=str(three), skip_bad=True)) == 0
    m = results_of(three)["metrics"]["psnr"]
    assert m["n"] == 2 and "missing or cannot be read" in m["reason"]


def test_array_that_is_no_video(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8)))
    with pytest.raises(ValueError, match=r"x.npy: found float64 of shape \(4, 8, 8\), wanted"):
        read_video(tmp_path / "x.npy")


def test_one_frame_has_no_motion(three, capsys):
    """An array of one frame; a picture in a video file is shown for a while (support.videos), and stands still."""
    np.save(three / "ours" / "0002.npy", moving(1))
    asked = {
        "metrics": "ssim,epe,ms_flow,dynamic_degree,delta_dynamic_degree",
        "flow": "farneback",
        "size": "native",
    }
    assert main(Config(data="cc2017", pairs=str(three), **asked)) == 0
    m, rows = results_of(three)["metrics"], results_of(three)["clips"]
    assert m["ssim"]["n"] == 3 and m["epe"]["n"] == m["dynamic_degree"]["n"] == m["ms_flow"]["n"] == 2
    assert rows[2]["epe"] is None and rows[2]["ssim"] is not None
    assert "1 videos of fewer than 2 frames" in m["epe"]["reason"]
    assert "fewer than 3 frames" in m["ms_flow"]["reason"]
    assert "ms_flow: ours: 1 of 3 clips" in capsys.readouterr().out


def test_what_is_no_video_is_named(three):
    (three / "ours" / "0001.npy").rename(three / "ours" / "0001.mpg")
    (three / "ours" / "0002.npy").unlink()
    (three / "ours" / "0002.mp4").symlink_to("0002.mp4")  # a loop
    with pytest.raises(
        ValueError, match="partner: 0001, 0002; no video: ours/0001.mpg, ours/0002.mp4; --skip-bad"
    ):
        main(Config(**PIXELS, pairs=str(three)))
    assert main(Config(**PIXELS, pairs=str(three), skip_bad=True)) == 0
    assert results_of(three)["metrics"]["ssim"]["n"] == 1


def test_results_of_before_are_no_method(three):
    for out in (None, str(three / "results")):
        config = Config(**PIXELS, pairs=str(three), out=out)
        assert main(config) == main(config) == 0  # grid.gif is there the second time
    (three / "results" / "ours").mkdir(exist_ok=True)
    assert list(find_pairs(three, out=three / "results")) == ["ours"]


def test_weights_that_cannot_be_had(three, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = {
        "metrics": "video_2way,clip_pcc,ms,ssim",
        "video_classifier": "no/such",
        "clip": "local-dir:nowhere",
        "amt": "no.pth",
    }
    config = {"data": "cc2017", "pairs": str(three)} | asked
    assert main(Config(**config)) == 3
    m = results_of(three)["metrics"]
    assert (
        m["ssim"]["mean"] is not None
        and m["video_2way"]["mean"] is None
        and "no/such cannot be had" in m["video_2way"]["reason"]
    )
    assert "nowhere" in m["clip_pcc"]["reason"] and m["ms"]["reason"].startswith("no.pth cannot be had")
    assert "n/a or in part, video_2way: ours: no/such cannot be had" in capsys.readouterr().out
    assert main(Config(**config | {"metrics": "ssim"})) == 0


def test_classifier_of_too_few_classes(three, tmp_path):
    folder = write_classifier(tmp_path / "v", [f"class {i}" for i in range(9)], True)
    with pytest.raises(ValueError, match="50-way: only 6 classes beside those of the GT"):
        main(Config(data="cc2017", pairs=str(three), metrics="video_50way", video_classifier=str(folder)))


def spoil(folder: Path, how: str) -> None:
    """Damage a transformers folder."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    model = VideoMAEForVideoClassification.from_pretrained(folder)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if how == "missing":
        del state["classifier.weight"]
    elif how == "mismatched":
        state["classifier.bias"] = torch.zeros(7)
    elif how == "nan":
        state["classifier.bias"][0] = torch.nan
    elif how == "pickled":
        torch.save(state, folder / "pytorch_model.bin")
        return weights.unlink()
    elif how == "truncated":
        return weights.write_bytes(weights.read_bytes()[:-9]) and None
    else:  # code of the folder itself
        about = json.loads(config.read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}
        config.write_text(json.dumps(about))
        return (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass C: pass\n") and None
    save_file(state, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("how", ["missing", "mismatched", "nan", "pickled", "truncated", "code"])
def test_damaged_weights_are_refused(tmp_path, how):
    folder = write_classifier(tmp_path / "v", list("abcde"), True)
    assert Judges(Config(video_classifier=str(folder)), "cpu")("video_classifier")
    spoil(folder, how)
    judges = Judges(Config(video_classifier=str(folder)), "cpu")
    assert judges("video_classifier") is None and str(folder) in judges.unavailable["video_classifier"]
    named = {"missing": "classifier.weight", "mismatched": "classifier.bias", "nan": "NaN or infinity"}
    assert named.get(how, "") in judges.unavailable["video_classifier"]
    assert not (folder / "ran").exists()


def test_presets():
    toy, pairs, cinebrain = parse([]), parse(["--pairs", "x"]), parse(["--data", "cinebrain"])
    assert (toy.data, pairs.data) == ("toy", "cc2017") and "toy" in toy.clip and "openai" in pairs.clip
    assert parse(["--pairs=x", "--data=toy"]).data == "toy"
    assert set(NAMES) - set(toy.metrics.split(",")) == {"ms"}
    assert set(NAMES) - set(pairs.metrics.split(",")) == {"ms_flow"}
    assert (toy.flow, pairs.flow) == ("farneback", "raft")
    assert (toy.size, pairs.size, cinebrain.size) == ("native", "256", "native")
    assert (toy.classifier_frames, pairs.classifier_frames) == ("16", "own")


# -- statistics and comparisons -------------------------------------------------------------------------------------


def test_interval_of_blocks():
    """Against resampling written out; and wider than that of single clips where neighbours are alike."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=15), 20) + 0.1 * rng.normal(size=300)
    blocks = np.arange(300) // 20
    values[7] = np.nan
    mean, (low, high) = estimate("ssim", values, blocks)
    assert mean == pytest.approx(np.nanmean(values))
    drawn = []
    for _ in range(2000):
        chosen = np.concatenate([values[blocks == b] for b in rng.integers(15, size=15)])
        drawn.append(np.nanmean(chosen))
    np.testing.assert_allclose([low, high], np.quantile(drawn, [0.025, 0.975]), atol=0.06)
    single = estimate("ssim", values, np.arange(300))[1]
    assert high - low > 3 * (single[1] - single[0])
    assert estimate("ssim", values[:20], blocks[:20]) == (pytest.approx(np.nanmean(values[:20])), None)
    assert estimate("ssim", np.full(3, np.nan), np.arange(3)) == (None, None)
    assert blocks_of(["0003", "0019", "0020", "0041"]).tolist() == [0, 0, 1, 2]
    assert blocks_of([f"clip{i}" for i in range(21)]).tolist() == [0] * 20 + [1]


def test_interval_of_a_difference_is_paired():
    rng = np.random.default_rng(0)
    a, blocks = rng.normal(size=400), np.arange(400) // 20
    mean, (low, high) = estimate("ssim", a + 0.01, blocks, a)
    assert mean == pytest.approx(0.01) and low == pytest.approx(0.01) and high == pytest.approx(0.01)
    assert estimate("delta_dynamic_degree", -a, blocks, a)[0] == pytest.approx(
        0
    )  # equally far from the stimuli
    assert estimate("delta_dynamic_degree", np.full(400, -0.2), blocks)[0] == pytest.approx(0.2)


def write_metrics(
    folder: Path, ssim: np.ndarray, dynamic: np.ndarray, subject: int, size: str = "256"
) -> None:
    folder.mkdir(parents=True)
    rows = [
        {
            "clip": f"{i:04d}",
            "ssim": float(s),
            "dynamic_degree": float(d),
            "delta_dynamic_degree": float(d) - 1,
        }
        for i, (s, d) in enumerate(zip(ssim, dynamic, strict=True))
    ]
    metrics = {name: {"mean": None} for name in NAMES} | {"ssim": {"mean": float(ssim.mean())}}
    metrics["delta_dynamic_degree"] = {"mean": float(abs(dynamic.mean() - 1))}
    provenance = {"size": size, "subject": subject}
    (folder / "metrics.json").write_text(
        json.dumps({"metrics": metrics, "clips": rows, "provenance": provenance})
    )


def test_runs_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.4, 80)
    for subject, seed in ((1, 0), (1, 1), (2, 0), (2, 1)):
        folder = Path("runs") / "cc2017" / f"sub{subject}"
        write_metrics(folder / f"full-s{seed}" / "eval", base + 0.1 + 0.05 * seed, np.ones(80), subject)
        write_metrics(
            folder / f"no-mom-s{seed}" / "eval", base + 0.02 * subject, np.repeat([1.0, 0.0], 40), subject
        )
    assert main(parse("--data cc2017 --compare full no-mom".split())) == 0
    lines = capsys.readouterr().out.splitlines()
    full = next(line for line in lines if line.startswith("full: mean"))
    assert "over 4 runs" in full and f"{base.mean() + 0.125:.3f}±0.02" in full
    at = next(i for i, line in enumerate(lines) if line.startswith("full less no-mom, 160 clips"))
    assert (
        "-0.500" in lines[at] and f"{0.125 - 0.03:.3f}" in lines[at]
    )  # nearer to the stimuli's dynamic degree; and 0.1 + 0.05/2 - 0.03
    assert "paired" in lines[at + 1] and "[0.095, 0.095]" in lines[at + 1]
    assert any("CineNeuron, quoted" in line for line in lines)
    main(parse("--data cc2017 --compare runs/cc2017/sub1/full-s0 runs/cc2017/sub1/no-mom-s0/eval".split()))
    assert "80 clips" in capsys.readouterr().out
    for subject, clips in ((1, range(40)), (2, range(60))):  # each subject's own clips
        for file in Path("runs", "cc2017", f"sub{subject}").glob("full-s*/eval/metrics.json"):
            groups = {"never shown": {"clips": [f"{i:04d}" for i in clips]}}
            file.write_text(json.dumps(json.loads(file.read_text()) | {"groups": groups}))
    main(parse("--data cc2017 --compare full no-mom".split()))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "never shown" in line)
    both = (base[:40].mean() + base[:60].mean()) / 2 + 0.125
    assert "never shown, 100 clips" in line and f"{both:.3f}±0.03" in line
    write_metrics(Path("runs") / "cc2017" / "sub1" / "uneven-s0" / "eval", base, base, 1)
    write_metrics(Path("runs") / "cc2017" / "sub1" / "uneven-s1" / "eval", base[:40], base[:40], 1)
    with pytest.raises(ValueError, match="uneven: its runs scored 80 and 40 clips"):
        main(parse("--data cc2017 --compare full uneven".split()))
    with pytest.raises(
        FileNotFoundError, match="--compare other: no metrics.json there, nor in runs/cc2017/sub"
    ):
        main(parse("--data cc2017 --compare full other".split()))
    write_metrics(tmp_path / "native", base, base, 1, "native")
    with pytest.raises(ValueError, match="--size 256 .* and --size native"):
        main(parse("--data cc2017 --compare full native".split()))


@pytest.mark.parametrize(
    "changes, message",
    [
        ([], "found list"),
        ({"provenance": None}, "provenance"),
        ({"provenance": {}}, "no size"),
        ({"metrics": {"ssim": {"mean": "x"}}}, "metrics.json, ssim: found mean"),
        ({"clips": [{"clip": "0000", "ssim": "x"}]}, "found ssim = 'x'"),
        ({"clips": [5]}, "found 5"),
        ({"groups": None}, "found groups = 'None'"),
        ({"groups": {"never shown": {"clips": [3]}}}, "wanted names of clips"),
        ({"groups": {"never shown": {"clips": 3}}}, "found clips = .3"),
        ({"groups": {"never shown": {}}}, "no clips"),
    ],
)
def test_damaged_results_are_named(tmp_path, changes, message):
    write_metrics(tmp_path / "r", np.ones(3), np.ones(3), 1)
    file = tmp_path / "r" / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes if changes else changes))
    with pytest.raises(ValueError, match=message):
        main(Config(data="cc2017", compare=[str(tmp_path / "r")]))
