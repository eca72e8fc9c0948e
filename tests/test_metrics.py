"""Metrics against independent formulas and the public code they follow; scoring of anyone's videos, its cache, bad input, comparisons."""

import importlib
import json
import logging
import re
from functools import partial
from itertools import combinations
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import REPO, unit
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.color import rgb2gray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from test_evaluate import write_classifier
from torchvision.models.optical_flow import raft_large
from transformers import ViTConfig, ViTImageProcessor, ViTModel

import evaluate
from evaluate import METRICS, NAMES, Config, Source, Video, estimate, find_pairs, main, parse, read_video, score

torch.set_num_threads(1)
PUBLISHED = REPO / ".." / "shared" / "data" / "cc2017" / "neuroclips_pairs"
PIXELS = {"data": "cc2017", "metrics": "ssim,ssim_gray,psnr"}


@pytest.fixture
def vbench():
    """The published metrics; the comparisons with them are skipped where it is not installed (README)."""
    pytest.importorskip("vbench", reason="pip install --no-deps vbench omegaconf easydict; and decord opencv-python-headless imageio")
    yield importlib.import_module
    logging.disable(logging.NOTSET)


def moving(F: int, H: int = 48, W: int = 64, speed: float = 0.0, seed: int = 0) -> np.ndarray:
    """A smooth texture that moves to the right, uint8 (F, H, W, 3)."""
    texture = gaussian_filter(np.random.default_rng(seed).random((H, W + 200, 3)), (3, 3, 0))
    texture = (255 * (texture - texture.min()) / np.ptp(texture)).astype(np.uint8)
    return np.stack([texture[:, 100 - (x := round(t * speed)) : 100 - x + W] for t in range(F)])


def video_of(frames: np.ndarray, tmp_path: Path, name: str = "v.npy") -> Video:
    np.save(tmp_path / name, frames)
    return Video(Source(tmp_path / name), seconds=2.0)


def write_pairs(root: Path, gt: list[np.ndarray], **methods: list[np.ndarray]) -> Path:
    for folder, videos in {"gt": gt, **methods}.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i, frames in enumerate(videos):
            np.save(root / folder / f"{i:04d}.npy", frames)
    return root


def write_as(file: Path, frames: np.ndarray) -> None:
    if file.suffix == ".npy":
        np.save(file, frames)
    elif file.suffix == ".mp4":
        evaluate.write_video(file, frames, 8)
    elif file.suffix == ".gif":
        first, *others = map(Image.fromarray, frames)
        first.save(file, save_all=True, append_images=others, duration=125)
    else:
        with av.open(str(file), "w") as out:
            stream = out.add_stream("libvpx-vp9", rate=8, options={"lossless": "1"})
            stream.height, stream.width = frames.shape[1:3]
            for frame in frames:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode())


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
    expected = [structural_similarity(x, y, data_range=255, channel_axis=-1) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(evaluate.structural_similarity(a, b), expected, atol=1e-7)
    options = dict(channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0)
    expected = [structural_similarity(rgb2gray(x), rgb2gray(y), **options) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(evaluate.structural_similarity_gray(a, b), expected, atol=1e-7)
    if kind == "equal":
        np.testing.assert_allclose(evaluate.peak_signal_to_noise(a, b), 10 * np.log10(255**2 * a[0].size))
    else:
        expected = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b, strict=True)]
        np.testing.assert_allclose(evaluate.peak_signal_to_noise(a, b), expected, atol=1e-9)


def test_videos_are_compared_at_common_times_and_one_size(tmp_path):
    gt, pred = moving(6, 32, 48, 1, 0), moving(14, 60, 80, 1, 1)
    a, b = video_of(gt, tmp_path, "a.npy"), video_of(pred, tmp_path, "b.npy")
    times = [1, 3, 5, 8, 10, 12]  # the middles of six sixths of 14 frames: 14/12, 42/12, ...
    for size, (h, w) in (("256", (256, 256)), ("native", (32, 48))):
        small = [np.asarray(Image.fromarray(f).resize((w, h), Image.Resampling.BICUBIC)) for f in pred[times]]
        big = [np.asarray(Image.fromarray(f).resize((w, h), Image.Resampling.BICUBIC)) for f in gt]
        expected = np.mean([structural_similarity(x, y, data_range=255, channel_axis=-1) for x, y in zip(small, big, strict=True)])
        assert METRICS["ssim"].measure(b, a, None, size).mean() == pytest.approx(expected, abs=2e-3)  # PIL resizes in whole numbers
    assert a.fps == 3 and b.fps == 7  # of arrays: frames in two seconds


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
        gt, pred = ([f.convert("RGB") for f in frames_of(PUBLISHED / f"{row['clip']}_{kind}.gif")] for kind in ("gt", "pred"))
        assert (len(gt), len(pred)) == (6, 14)
        both = [(np.asarray(gt[i]), np.asarray(pred[k])) for i, k in enumerate([1, 3, 5, 8, 10, 12])]
        ssim = np.mean([structural_similarity(y, x, data_range=255, channel_axis=-1) for x, y in both])
        psnr = np.mean([peak_signal_noise_ratio(x, y, data_range=255) for x, y in both])
        assert row["ssim"] == pytest.approx(ssim, abs=1e-6) and row["psnr"] == pytest.approx(psnr, abs=1e-6)


def frames_of(gif: Path) -> list[Image.Image]:
    with Image.open(gif) as image:
        return [(image.seek(i), image.copy())[1] for i in range(image.n_frames)]


# -- CLIP-pcc and DTC -----------------------------------------------------------------------------------------------


def test_clip_pcc_in_three_definitions(tmp_path):
    e = unit(np.random.default_rng(0).normal(size=(5, 8)) + 0.7)
    other = unit(np.random.default_rng(1).normal(size=(5, 8)))
    pred, near, far = (video_of(moving(5, seed=i), tmp_path, f"{i}.npy") for i in range(3))
    stands_for = {id(pred): e, id(near): e + 0.01, id(far): other}
    judge = lambda frames: next(stands_for[id(v)] for v in (pred, near, far) if np.array_equal(v.frames, frames))  # noqa: E731
    cosine = lambda x, y: x @ y / np.linalg.norm(x) / np.linalg.norm(y)  # noqa: E731
    adjacent = np.mean([cosine(e[i], e[i + 1]) for i in range(4)])
    assert METRICS["clip_pcc"].measure(pred, None, judge, "256") == pytest.approx(adjacent, abs=1e-6)
    pairs = np.mean([cosine(e[i], e[j]) for i, j in combinations(range(5), 2)])
    assert METRICS["clip_pcc_all_pairs"].measure(pred, None, judge, "256") == pytest.approx(pairs, abs=1e-6)
    assert cosine(e.mean(0), (e + 0.01).mean(0)) > 0.6 > cosine(e.mean(0), other.mean(0))
    assert METRICS["clip_pcc_gated"].measure(pred, near, judge, "256") == pytest.approx(adjacent, abs=1e-6)
    assert METRICS["clip_pcc_gated"].measure(pred, far, judge, "256") == 0


def tiny_vit(image: int = 224) -> ViTModel:
    torch.manual_seed(0)
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=16)
    return ViTModel(ViTConfig(image_size=image, initializer_range=0.3, **size), add_pooling_layer=False).eval()


def test_dtc_as_vbench(vbench, tmp_path):
    evaluate.write_video(tmp_path / "v.mp4", np.concatenate([moving(5, 100, 100, 9), moving(3, 100, 100, 2, 1)]), 8)
    published, model = vbench("vbench.subject_consistency"), tiny_vit()
    logging.disable(logging.INFO)
    cls = lambda x: model(x).last_hidden_state[:, 0]  # noqa: E731
    expected, _ = published.subject_consistency(cls, [str(tmp_path / "v.mp4")], "cpu", read_frame=False)
    frames = vbench("vbench.utils").load_video(str(tmp_path / "v.mp4")).permute(0, 2, 3, 1).contiguous().numpy().astype(np.uint8)
    judge = partial(evaluate.dino_features, model, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        found = METRICS["dtc"].measure(video_of(frames, tmp_path), None, judge, "256")
    assert found == pytest.approx(expected, abs=1e-4) and 0 < expected < 0.99


def test_dtc_by_hand(tmp_path):
    e = np.array([[1, 0], [0, 1], [-1, 0], [1, 0]], np.float32)  # cosines to the one before 0, 0, -1; to the first 0, -1, 1
    assert METRICS["dtc"].measure(video_of(moving(4), tmp_path), None, lambda frames: e, "256") == pytest.approx(1 / 6)


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
    ours = partial(evaluate.raft_flow, raft_with_the_weights_of(raft))
    frames = moving(2, 131, 128, 2)  # 131 rows are padded to 136
    images = [torch.from_numpy(frame)[None].permute(0, 3, 1, 2).float() for frame in frames]
    padder = published.InputPadder(images[0].shape)
    theirs.get_frames_from_img_folder = lambda folder: [image[:, :, :128] for image in images]
    video = video_of(frames[:, :128], tmp_path)  # VBench takes the fastest pixels before it cuts the padding off: compared without any
    with torch.inference_mode():
        expected = padder.unpad(theirs.model(*padder.pad(*images), iters=20, test_mode=True)[1])[0].numpy()
        assert abs(ours(frames)[0] - expected).max() < 1e-4 * max(1, abs(expected).max()) and abs(expected).max() > 1e-3
        assert METRICS["dynamic_degree"].measure(video, None, ours, "native") == float(theirs.infer(str(tmp_path)))


@pytest.mark.parametrize("fast, dynamic", [(0, 0), (1, 0), (3, 0), (4, 1), (15, 1)])
def test_dynamic_degree_by_hand(tmp_path, fast, dynamic):
    """16 frames: at least 4 pairs must have 5 % of the pixels faster than 6 pixels of 256."""
    flow = np.zeros((15, 2, 64, 128), np.float32)
    flow[:fast, 1, :4] = 1.6  # 6.25 % of the rows; the threshold is 6 x 64 / 256 = 1.5
    flow[fast:, 0, :4] = 1.4
    video = video_of(np.zeros((16, 64, 128, 3), np.uint8), tmp_path)
    assert METRICS["dynamic_degree"].measure(video, None, lambda frames: flow, "native") == dynamic


def test_dynamic_degree_looks_at_eight_frames_a_second(tmp_path):
    evaluate.write_video(tmp_path / "v.mp4", moving(30), 24)
    seen = []
    METRICS["dynamic_degree"].measure(
        Video(Source(tmp_path / "v.mp4"), 2.0), None, lambda f: (seen.append(len(f)), np.zeros((9, 2, 8, 8)))[1], "256"
    )
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
    judge = evaluate.load_judge("amt", Config(amt=str(tmp_path / "amt.pth")), "cpu")
    with torch.inference_mode():
        assert METRICS["ms"].measure(video_of(frames, tmp_path), None, judge, "native") == pytest.approx(expected, abs=1e-4)
    assert 0 < expected < 0.999


def test_flow_of_a_moving_texture(tmp_path):
    slow, fast, still = (video_of(moving(5, speed=v), tmp_path, f"{v}.npy") for v in (1, 2, 0))
    flow = evaluate.tv_l1_flow(fast.frames)
    assert flow.shape == (4, 2, 48, 64) and np.allclose(flow[:, 0, 8:-8, 8:-8].mean(), 2, atol=0.1) and abs(flow[:, 1]).mean() < 0.2
    measure = METRICS["epe"].measure
    assert measure(fast, fast, evaluate.tv_l1_flow, "native") == 0
    assert measure(fast, slow, evaluate.tv_l1_flow, "native") == pytest.approx(1, abs=0.15)
    assert METRICS["ms_flow"].measure(still, None, evaluate.tv_l1_flow, "native") == 1
    jumpy = video_of(np.stack([moving(1, seed=i % 3)[0] for i in range(5)]), tmp_path)
    assert METRICS["ms_flow"].measure(fast, None, evaluate.tv_l1_flow, "native") > 0.98
    assert METRICS["ms_flow"].measure(jumpy, None, evaluate.tv_l1_flow, "native") < 0.95
    w, g = np.random.default_rng(0).normal(size=(2, 4, 2, 48, 64))
    by_hand = np.mean([[np.hypot(*(w[t, :, y, x] - g[t, :, y, x])) for y in range(48) for x in range(64)] for t in range(4)])
    assert measure(fast, slow, lambda f: w if np.array_equal(f, fast.frames) else g, "native") == pytest.approx(by_hand)


# -- a set of pairs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_set(tmp_path_factory) -> Path:
    """20 clips of the toy world; `same` are the stimuli themselves."""
    from toy.world import combinations as kinds
    from toy.world import random_clip, render

    rng = np.random.default_rng(3)
    seen, _ = kinds()
    clips = [render(random_clip(seen[i], rng))[:7] for i in rng.permutation(len(seen))[:20]]
    return write_pairs(tmp_path_factory.mktemp("toy") / "set", clips, same=clips)


@pytest.fixture
def toy_config(monkeypatch, tmp_path) -> dict:
    monkeypatch.chdir(REPO)  # where toy/ lies
    config = vars(parse(["--data", "toy"])) | {"flow": "tv-l1"}
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
    best = dict.fromkeys(NAMES[:4], 1.0) | {"epe": 0.0, "ssim": 1.0, "ssim_gray": 1.0, "delta_dynamic_degree": 0.0}
    best["psnr"] = 10 * np.log10(255**2 * 64 * 64 * 3)
    for name, value in best.items():
        assert m[name]["mean"] == pytest.approx(value, abs=1e-9), name
    assert m["clip_pcc_gated"]["mean"] == m["clip_pcc"]["mean"] > 0.9 and m["dtc"]["mean"] > 0.3 and m["ms_flow"]["mean"] > 0.95
    for name, near in (("video_2way", 0.15), ("frame_2way", 0.15), ("video_50way", 0.08), ("frame_50way", 0.08)):
        assert abs(m[name]["shuffled"] - m[name]["chance"]) < near, name
    assert m["psnr"]["shuffled"] < 30 and m["ssim"]["shuffled"] < 0.8 and m["epe"]["shuffled"] > 0
    assert m["dtc"]["shuffled"] is None  # it does not look at the stimulus
    assert m["ms"]["mean"] is None and m["ms"]["reason"] == "not asked for (--metrics)"
    assert "TV-L1" in m["epe"]["weights"] and "sha256" in m["video_2way"]["weights"]
    assert "quoted" not in capsys.readouterr().out  # numbers of the toy world stand beside no published ones


def test_second_run_reads_no_video_and_leaves_the_same_bytes(three, monkeypatch):
    config = PIXELS | {"pairs": str(three)}
    main(Config(**config))
    file = three / "metrics" / "ours" / "metrics.json"
    before = file.read_bytes()
    score_only = partial(score, find_pairs(three, False, False), out=three / "metrics")
    with monkeypatch.context() as patch:
        patch.setattr(Video, "__init__", lambda *_, **__: pytest.fail("a video was read again"))
        score_only(Config(**config))
    main(Config(**config))
    assert file.read_bytes() == before
    # one more metric, another video: only what is new is computed
    computed = []
    measure = METRICS["psnr"].measure
    monkeypatch.setitem(METRICS, "psnr", METRICS["psnr"]._replace(measure=lambda *a: (computed.append("psnr"), measure(*a))[1]))
    epe = METRICS["epe"]._replace(judge="", measure=lambda *a: (computed.append("epe"), 0.0)[1])
    monkeypatch.setitem(METRICS, "epe", epe)
    score_only(Config(**config | {"metrics": "psnr,epe"}))
    assert computed == ["epe"] * 6  # three clips, each with its control
    np.save(three / "ours" / "0001.npy", moving(6, speed=2))
    evaluate.digest.cache_clear()
    score_only(Config(**config | {"metrics": "psnr,epe"}))
    assert sorted(computed[6:]) == ["epe"] * 2 + ["psnr"] * 2
    # what a kill cut short is passed over, and what follows it is kept
    values = three / "metrics" / "values" / "0.jsonl"
    known = evaluate.known_values(three / "metrics")
    values.write_text(values.read_text()[:-9])
    score_only(Config(**config | {"metrics": "psnr,epe"}))
    assert evaluate.known_values(three / "metrics") == known


def test_processes_share_the_clips(three):
    config, sets = Config(**PIXELS, pairs=str(three)), find_pairs(three, False, False)
    score(sets, config, three / "one")
    for rank in (1, 0):
        score(sets, config, three / "two", rank=rank, world=2)
    shares = [len((three / "two" / "values" / f"{rank}.jsonl").read_text().split()) for rank in (0, 1)]
    assert evaluate.known_values(three / "one") == evaluate.known_values(three / "two") and min(shares) > 0


def test_trials_as_the_peers_and_the_same_again(toy_set, toy_config):
    config = toy_config | {"pairs": str(toy_set), "metrics": "video_50way"}
    sets = {"shifted": [pair._replace(pred=pair.other) for pair in find_pairs(toy_set, False, False)["same"]]}
    exact, drawn, again = (dict(config, trials=n) for n in (0, 100, 100))
    values = []
    for k, options in enumerate((exact, drawn, again)):
        score(sets, Config(**options), toy_set / "metrics" / f"t{k}")
        known = evaluate.known_values(toy_set / "metrics" / f"t{k}")
        values.append([known[evaluate.keys_of(pair, Config(**options))["video_50way"]][0] for pair in sets["shifted"]])
    p, q, r = np.array(values)
    assert q.tolist() == r.tolist() and np.allclose(q * 100, (q * 100).round())
    assert (abs(p - q) <= 5 * np.sqrt(p * (1 - p) / 100) + 1e-12).all() and (p != q).any()


def test_formats_names_and_several_methods(tmp_path, capsys):
    for i, suffix in enumerate(("mp4", "gif", "webm", "npy")):
        for folder, frames in (("gt", moving(6, speed=1, seed=i)), ("a", moving(8, 32, 32, 1, i)), ("b", moving(6, speed=1, seed=i))):
            (tmp_path / folder).mkdir(exist_ok=True)
            file = tmp_path / folder / f"{i + 9}.{suffix}"
            write_as(file, frames)
            assert read_video(file).shape == frames.shape
    assert main(parse(["--pairs", str(tmp_path), "--metrics", "ssim,psnr", "--size", "native"])) == 0
    assert [row["clip"] for row in results_of(tmp_path, "a")["clips"]] == ["9", "10", "11", "12"]
    same, small = (results_of(tmp_path, method)["metrics"]["ssim"]["mean"] for method in ("b", "a"))
    assert same == 1 and small < 0.9
    text = capsys.readouterr().out
    assert "a, 4 clips" in text and "b, 4 clips" in text and "NeuroClips, quoted from the paper" in text and "9.211±1.46" in text
    header = (tmp_path / "metrics" / "metrics.csv").read_text().splitlines()
    assert header[0].startswith("method,metric,mean") and len(header) == 1 + 2 * len(NAMES)
    for name in ("sheet.png", "ranked.png", "grid.gif"):
        with Image.open(tmp_path / "metrics" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 20


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
        find_pairs(three.parent / "glued", False, False)


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
    with pytest.raises(ValueError, match="3 stimuli, 3 videos in ours; without a partner: 0001, 0007; --skip-bad"):
        main(Config(**PIXELS, pairs=str(three)))
    assert main(Config(**PIXELS, pairs=str(three), skip_bad=True)) == 0
    found = results_of(three)
    assert [row["clip"] for row in found["clips"]] == ["0000", "0001", "0002"] and "ssim" not in found["clips"][1]
    assert found["metrics"]["ssim"]["n"] == 2 and found["metrics"]["ssim"]["reason"].startswith("1 of 3 clips have no value")


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webm", "npy"])
def test_truncated_video_is_named(tmp_path, suffix):
    write_as(file := tmp_path / f"v.{suffix}", np.random.default_rng(0).integers(0, 256, (12, 40, 48, 3), np.uint8))
    assert read_video(file).shape == (12, 40, 48, 3)
    whole = file.read_bytes()
    for share in (0.01, 0.5, 0.9):
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=rf"v.{suffix} "):
            read_video(file)


def test_bad_file_is_missing_only_when_told(three):
    (three / "ours" / "0001.npy").write_bytes(b"no video")
    with pytest.raises(ValueError, match="ours/0001.npy cannot be read as a video.*--skip-bad"):
        main(Config(**PIXELS, pairs=str(three)))
    assert not (three / "metrics" / "ours").exists()
    assert main(Config(**PIXELS, pairs=str(three), skip_bad=True)) == 0
    m = results_of(three)["metrics"]["psnr"]
    assert m["n"] == 2 and "missing or cannot be read" in m["reason"]


def test_array_that_is_no_video(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8)))
    with pytest.raises(ValueError, match=r"x.npy holds float64 \(4, 8, 8\), wanted uint8"):
        read_video(tmp_path / "x.npy")


@pytest.mark.parametrize("suffix", ["npy", "gif", "mp4"])
def test_one_frame_has_no_motion(three, capsys, suffix):
    (three / "ours" / "0002.npy").unlink()
    write_as(three / "ours" / f"0002.{suffix}", moving(1))
    asked = {"metrics": "ssim,epe,ms_flow,dynamic_degree,delta_dynamic_degree", "flow": "tv-l1", "size": "native"}
    assert main(Config(data="cc2017", pairs=str(three), **asked)) == 0
    m, rows = results_of(three)["metrics"], results_of(three)["clips"]
    assert m["ssim"]["n"] == 3 and m["epe"]["n"] == m["dynamic_degree"]["n"] == m["ms_flow"]["n"] == 2
    assert rows[2]["epe"] is None and rows[2]["ssim"] is not None
    assert "1 videos of fewer than 2 frames" in m["epe"]["reason"] and "fewer than 3 frames" in m["ms_flow"]["reason"]
    assert "ms_flow: ours: 1 of 3 clips" in capsys.readouterr().out


def test_weights_that_cannot_be_had(three, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = {"metrics": "video_2way,clip_pcc,ms,ssim", "video_classifier": "no/such", "clip": "local-dir:nowhere", "amt": "no.pth"}
    config = {"data": "cc2017", "pairs": str(three)} | asked
    assert main(Config(**config)) == 3
    m = results_of(three)["metrics"]
    assert m["ssim"]["mean"] is not None and m["video_2way"]["mean"] is None and "no/such cannot be had" in m["video_2way"]["reason"]
    assert "nowhere" in m["clip_pcc"]["reason"] and m["ms"]["reason"].startswith("no.pth cannot be had")
    assert "n/a or in part, video_2way: ours: no/such cannot be had" in capsys.readouterr().out
    assert main(Config(**config | {"metrics": "ssim"})) == 0


def test_classifier_of_too_few_classes(three, tmp_path):
    folder = write_classifier(tmp_path / "v", [f"class {i}" for i in range(9)], True)
    with pytest.raises(ValueError, match="50-way: only 6 classes beside those of the GT"):
        main(Config(data="cc2017", pairs=str(three), metrics="video_50way", video_classifier=str(folder)))


@pytest.mark.parametrize(
    "options, message", [("--metrics ssim,lpips", "lpips"), ("--size 128", "256 or native"), ("--data x", "there are")]
)
def test_options_that_are_not_there(options, message, capsys):
    with pytest.raises(SystemExit):
        parse(options.split())
    assert message in capsys.readouterr().err


def test_presets():
    toy, pairs = parse([]), parse(["--pairs", "x"])
    assert (toy.data, pairs.data) == ("toy", "cc2017") and "toy" in toy.clip and "openai" in pairs.clip
    assert set(NAMES) - set(toy.metrics.split(",")) == {"ms"} and set(NAMES) - set(pairs.metrics.split(",")) == {"ms_flow"}


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
    assert evaluate.blocks_of(["0003", "0019", "0020", "0041"]).tolist() == [0, 0, 1, 2]
    assert evaluate.blocks_of([f"clip{i}" for i in range(21)]).tolist() == [0] * 20 + [1]


def test_interval_of_a_difference_is_paired():
    rng = np.random.default_rng(0)
    a, blocks = rng.normal(size=400), np.arange(400) // 20
    mean, (low, high) = estimate("ssim", a + 0.01, blocks, a)
    assert mean == pytest.approx(0.01) and low == pytest.approx(0.01) and high == pytest.approx(0.01)
    assert estimate("delta_dynamic_degree", -a, blocks, a)[0] == pytest.approx(0)  # equally far from the stimuli
    assert estimate("delta_dynamic_degree", np.full(400, -0.2), blocks)[0] == pytest.approx(0.2)


def write_metrics(folder: Path, ssim: np.ndarray, dynamic: np.ndarray, subject: int, size: str = "256") -> None:
    folder.mkdir(parents=True)
    rows = [
        {"clip": f"{i:04d}", "ssim": float(s), "dynamic_degree": float(d), "dynamic_degree_gt": 1.0}
        for i, (s, d) in enumerate(zip(ssim, dynamic, strict=True))
    ]
    metrics = {name: {"mean": None} for name in NAMES} | {"ssim": {"mean": float(ssim.mean())}}
    metrics["delta_dynamic_degree"] = {"mean": float(abs(dynamic.mean() - 1))}
    provenance = {"size": size, "subject": subject}
    (folder / "metrics.json").write_text(json.dumps({"metrics": metrics, "clips": rows, "provenance": provenance}))


def test_runs_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.4, 80)
    for subject, seed in ((1, 0), (1, 1), (2, 0), (2, 1)):
        folder = Path("runs") / "cc2017" / f"sub{subject}"
        write_metrics(folder / f"full-s{seed}" / "eval", base + 0.1 + 0.05 * seed, np.ones(80), subject)
        write_metrics(folder / f"no-mom-s{seed}" / "eval", base + 0.02 * subject, np.repeat([1.0, 0.0], 40), subject)
    assert main(parse("--data cc2017 --compare full no-mom".split())) == 0
    lines = capsys.readouterr().out.splitlines()
    full = next(line for line in lines if line.startswith("full: mean"))
    assert "over 4 runs" in full and f"{base.mean() + 0.125:.3f}±0.02" in full
    at = next(i for i, line in enumerate(lines) if line.startswith("full less no-mom, 160 clips"))
    assert "-0.500" in lines[at] and f"{0.125 - 0.03:.3f}" in lines[at]  # nearer to the stimuli's dynamic degree; and 0.1 + 0.05/2 - 0.03
    assert "paired" in lines[at + 1] and "[0.095, 0.095]" in lines[at + 1]
    assert any("CineNeuron, quoted" in line for line in lines)
    main(parse("--data cc2017 --compare runs/cc2017/sub1/full-s0 runs/cc2017/sub1/no-mom-s0/eval".split()))
    assert "80 clips" in capsys.readouterr().out
    write_metrics(Path("runs") / "cc2017" / "sub1" / "uneven-s0" / "eval", base, base, 1)
    write_metrics(Path("runs") / "cc2017" / "sub1" / "uneven-s1" / "eval", base[:40], base[:40], 1)
    with pytest.raises(ValueError, match="uneven: its runs scored 80 and 40 clips"):
        main(parse("--data cc2017 --compare full uneven".split()))
    with pytest.raises(FileNotFoundError, match="--compare other: no metrics.json there, nor in runs/cc2017/sub"):
        main(parse("--data cc2017 --compare full other".split()))
    write_metrics(tmp_path / "native", base, base, 1, "native")
    with pytest.raises(ValueError, match="256, native, wanted one size"):
        main(parse("--data cc2017 --compare full native".split()))
