"""Each option of the three scripts changes what it should: a row an option, and an option without a row fails."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_stage1
from watch import EVALUATE, STAGE1, STAGE2, Evaluated, Watched, watch, watch_evaluation

import evaluate
import train_stage1
import train_stage2
from support.files import MissingData
from support.options import without
from support.videos import read_video, write_video

Check = Callable[[Watched, Watched], bool]  # (as usual, with the option): does it do what it should?


def total(a: Watched, **weights: float) -> bool:
    """The losses of each step add up with these weights; a term that is not named counts once."""
    terms = dict.fromkeys(("image", "text", "action", "category", "diffusion"), 1.0) | weights
    sums = [sum(row.get(name, 0) * weight for name, weight in terms.items()) for row in a.losses]
    return sums == pytest.approx([row["loss"] for row in a.losses], rel=1e-5)


def clips(a: Watched) -> list[int]:
    return torch.cat([batch.clips for batch in a.batches]).tolist()


def same_start(a: Watched, b: Watched) -> bool:
    """The first weights and the first batch are alike: what differs later is the option's doing."""
    same_x = torch.equal(a.batches[0].x, b.batches[0].x)
    return same_x and all(torch.equal(a.start[name], b.start[name]) for name in a.start)


def moved(a: Watched, b: Watched) -> bool:
    """From the same start to other weights."""
    return same_start(a, b) and any(not torch.equal(a.end[name], b.end[name]) for name in a.end)


def other_weights(a: Watched, b: Watched) -> bool:
    """All that is drawn starts elsewhere, and so does what is read of another stage 1."""
    drawn = "to_f_c.weight", "lora_A.default.weight", "W_Q.weight"
    return not any(torch.equal(a.start[name], b.start[name]) for name in a.start if name.endswith(drawn))


def same_losses(a: Watched, b: Watched) -> bool:
    return all(one == pytest.approx(other, rel=1e-4) for one, other in zip(a.losses, b.losses, strict=True))


def hidden(a: Watched) -> float:
    """The share of the voxels that are hidden."""
    return float(np.mean([(batch.x == 0).float().mean() for batch in a.batches]))


def masked(a: Watched, field: str) -> int:
    """How many are true in a field of the batches."""
    return sum(int(getattr(batch, field).sum()) for batch in a.batches)


def has(a: Watched, part: str) -> list[torch.Tensor]:
    return [p for name, p in a.start.items() if part in name]


def update_of_lora(a: Watched) -> float:
    """How large the first LoRA's change of its layer is, beside B A."""
    layer = next(m for m in a.models[0].modules() if hasattr(m, "lora_A"))
    product = layer.lora_B.default.weight @ layer.lora_A.default.weight
    return float(layer.get_delta_weight("default").norm() / product.norm())


def rate(a: Watched, b: Watched, group: int) -> float:
    """How many times as fast the group learns, at the first step."""
    return b.rates[0][group] / a.rates[0][group]


BOTH = {
    "run": ("other", lambda a, b: (a.folder.parent.name, b.folder.parent.name) == ("full-s0", "other-s0")),
    "seed": (3, lambda a, b: b.folder.parent.name == "full-s3" and clips(a) != clips(b) and other_weights(a, b)),
    "batch_size": (5, lambda a, b: [len(batch.clips) for batch in b.batches] == [5] * 3),
    "weight_decay": (0.9, lambda a, b: moved(a, b) and {g["weight_decay"] for g in b.optimiser.param_groups} == {0.9}),
    "max_norm": (1e-3, lambda a, b: max(b.norms) < 1.001e-3 < min(a.norms) <= max(a.norms) < 1.001),
    "log_every": (2, lambda a, b: (a.logged, b.logged) == ([0, 1, 2], [0, 2])),
    "save_every": (2, lambda a, b: (a.saved, b.saved) == ([], [2])),
    "optimizer": ("adamw8bit", "no bitsandbytes"),
    "device": ("mps", "--device mps: this process has cpu"),
    "compile": (True, lambda a, b: not a.compiled and b.compiled[:2] == [*b.brain_model.blocks]),
    "precision": (
        "bf16",
        lambda a, b: torch.equal(a.batches[0].x, b.batches[0].x) and 0 < abs(a.losses[0]["image"] - b.losses[0]["image"]) < 0.05
        and {p.dtype for p in b.brain_model.parameters()} == {torch.float32},
    ),
}  # fmt: skip
OF_STAGE1 = BOTH | {
    "data": ("cinebrain --subject 3", lambda a, b: b.folder.parts[1:3] == ("cinebrain", "sub3")),
    "subject": (2, lambda a, b: b.folder.parts[2] == "sub2" and torch.equal(a.batches[0].clips, b.batches[0].clips)
                and not torch.equal(a.batches[0].x, b.batches[0].x)),
    "cls": (False, lambda a, b: b.folder.parent.name == "full-no-cls-s0" and total(b, category=0) and same_start(a, b)),
    "action": (False, lambda a, b: b.folder.parent.name == "full-no-action-s0" and total(b, action=0)),
    "lambda_1": (3, lambda a, b: total(a) and total(b, action=3) and moved(a, b)),
    "lambda_2": (3, lambda a, b: total(b, category=3) and moved(a, b)),
    "tau": (0.3, lambda a, b: b.losses[0]["image"] < 0.9 * a.losses[0]["image"] and moved(a, b)
            and b.losses[0]["category"] == a.losses[0]["category"]),
    "rois": ("visual", lambda a, b: (a.batches[0].x.shape[2], b.batches[0].x.shape[2]) == (40, 24)
             == (a.brain_model.voxels, b.brain_model.voxels)),
    "val_segments": ("seg3", lambda a, b: max(clips(a)) >= 30 > max(clips(b))),
    "steps": (4, lambda a, b: [row[0] for row in b.rates] != [row[0] for row in a.rates]
              and b.rates[2][0] < a.rates[2][0]),  # OneCycle is past its peak
    "lr": (6e-3, lambda a, b: rate(a, b, 0) == pytest.approx(2) and moved(a, b)),
    "tokens": (9, lambda a, b: (a.brain_model.position.shape[-2], b.brain_model.position.shape[-2]) == (13, 10)),
    "width": (32, lambda a, b: b.brain_model.position.shape[-1] == 32),
    "layers": (3, lambda a, b: (len(a.brain_model.blocks), len(b.brain_model.blocks)) == (2, 3)),
    "attention_heads": (2, lambda a, b: same_start(a, b) and a.losses[0] != b.losses[0]),
    "rank": (3, lambda a, b: a.start.keys() == b.start.keys()
             and any(a.start[name].shape != b.start[name].shape for name in a.start)),
    "dropout": (0.6, lambda a, b: abs(hidden(a) - 0.25) < 0.05 and abs(hidden(b) - 0.6) < 0.05),
    "checkpointing": (False, lambda a, b: len(a.calls) == 2 * len(b.calls) and same_losses(a, b)),
    "micro_batch": (3, lambda a, b: b.calls[:3] == [3, 3, 2] and same_losses(a, b)),
}  # fmt: skip
OF_STAGE2 = BOTH | {
    "run": ("other --stage1 full", lambda a, b: b.folder.parent.name == "other-s0"),
    "data": ("cinebrain --subject 3", lambda a, b: b.folder.parts[1:3] == ("cinebrain", "sub3")),
    "subject": (2, lambda a, b: b.folder.parts[2] == "sub2" and not torch.equal(a.batches[0].x, b.batches[0].x)),
    "stage1": ("second", lambda a, b: b.folder.parent.name == "second-s0" and not same_start(a, b)),
    "mom": (False, lambda a, b: b.folder.parent.name == "full-no-mom-s0" and not has(b, "mom.router") and has(a, "mom.router")),
    "integration": (False, lambda a, b: b.folder.parent.name == "full-no-integration-s0" and has(b, "mom.project")),
    "decoder": ("models/cogvideox", lambda a, b: "CogVideoX" in type(b.models[0].decoder.transformer).__name__),
    "frames": (5, "latents-5x32x48.npy, .* is not there"),
    "height": (48, "latents-9x48x48.npy, .* is not there"),
    "width": (32, "latents-9x32x32.npy, .* is not there"),
    "lora_rank": (2, lambda a, b: (len(has(a, "lora_A")[0]), len(has(b, "lora_A")[0])) == (4, 2)),
    "lora_alpha": (2, lambda a, b: same_start(a, b) and (update_of_lora(a), update_of_lora(b)) == pytest.approx((2, 0.5))),
    "K": (3, lambda a, b: (a.recalled[0].indices.shape[1], b.recalled[0].indices.shape[1]) == (5, 3)),
    "own_captions": (0, lambda a, b: masked(b, "excluded") > masked(a, "excluded")),
    "alpha": (2, lambda a, b: b.models[0].mom.integration.alpha == 2 and moved(a, b)),
    "attention_heads": (2, lambda a, b: same_start(a, b) and b.models[0].mom.integration.heads == 2),
    "epochs": (4, lambda a, b: b.rates[2][0] < a.rates[2][0]),  # a longer way up
    "micro_batch": (3, lambda a, b: (set(a.dit_calls), set(b.dit_calls)) == ({4}, {2, 3}) and same_losses(a, b)),
    "checkpointing": (False, lambda a, b: len(a.dit_calls) == 2 * len(b.dit_calls) and len(a.calls) > len(b.calls)
                      and same_losses(a, b)),
    "lr": (2e-3, lambda a, b: [rate(a, b, k) for k in range(4)] == pytest.approx([2, 2, 1, 1]) and moved(a, b)),
    "lr_fusion": (4e-3, lambda a, b: [rate(a, b, k) for k in range(4)] == pytest.approx([1, 1, 2, 1]) and moved(a, b)),
    "lr_lora": (2e-3, lambda a, b: [rate(a, b, k) for k in range(4)] == pytest.approx([1, 1, 1, 2]) and moved(a, b)),
    "condition_dropout": (0, lambda a, b: masked(a, "dropped") > 0 == masked(b, "dropped")),
    "time_sampling": ("logit_normal", lambda a, b: all(torch.allclose(torch.special.ndtri(x.u), torch.logit(y.u), atol=1e-4)
                      for x, y in zip(a.batches, b.batches, strict=True)) and a.losses[0] != b.losses[0]),
    "noise_shift": (4, lambda a, b: same_start(a, b) and a.losses[0]["diffusion"] != b.losses[0]["diffusion"]
                    and a.losses[0]["image"] == b.losses[0]["image"]),
    "guidance": ("1 --sample_every 2 --samples 1 --sampling_steps 2", lambda a, b: b.samples[0]["guidance"] == 1),
    "sampling_steps": ("3 --sample_every 2 --samples 1", lambda a, b: b.samples[0]["steps"] == 3),
    "samples": ("2 --sample_every 2 --sampling_steps 1", lambda a, b: b.samples[0]["clips"] == 2),
    "sample_every": ("2 --samples 1 --sampling_steps 1", lambda a, b: len(b.samples) == 1 and not a.samples),
}  # fmt: skip


def differ(a: Evaluated, b: Evaluated, kind: str, axis: int | None = None) -> float:
    """The mean difference of a video of both, b's mirrored along the axis."""
    other = b.videos[kind] if axis is None else np.flip(b.videos[kind], axis)
    return float(abs(a.videos[kind] - other).mean())


def score(a: Evaluated) -> list[float]:
    return [value for value, _ in a.values.values()]


def has_no(judge: str) -> Callable:
    """The judge's weights are those that the option names, which are nowhere."""
    return lambda a, b: "nowhere" in b.evaluation.unavailable[judge]


OF_EVALUATE = {
    "data": ("cinebrain --subject 3 --seconds 2", lambda a, b: b.out.parts[1:3] == ("cinebrain", "sub3")),
    "subject": (2, lambda a, b: b.out.parts[2] == "sub2" and not torch.equal(a.x(), b.x())),
    "run": ("no-mom", lambda a, b: b.out.parent.name == "no-mom-s0" and torch.equal(a.x(), b.x())),
    "seed": (3, lambda a, b: b.out.parent.name == "full-s3" and {key[0] for key in b.keys()} == {3}),
    "stage2": (False, lambda a, b: b.out.name.startswith("eval-no-stage2") and torch.equal(a.x(), b.x())
               and not b.evaluation.provenance["stage2"]),
    "shuffle": (True, lambda a, b: b.out.name.startswith("eval-shuffled") and not (a.x() == b.x()).all((1, 2)).any()
                and a.keys() == b.keys()),
    "fmri": ("x.npy --out one.mp4", lambda a, b: "written: one.mp4" in b.printed and b.x().shape == (1, 2, 40)
             and "it recalls" in b.printed),
    "pairs": ("pairs", lambda a, b: [*b.evaluation.sets] == ["ours"] and b.out == Path("pairs/metrics")),
    "split": ("", lambda a, b: {pair.pred.half for pair in b.evaluation.sets["ours"]} == {"right"}
              and max(score(b)) < 0.9),
    "skip_bad": ("", lambda a, b: len(b.values) == 2 and len(b.evaluation.sets["ours"]) == 3),
    "frames": ("own --metrics epe --flow farneback", lambda a, b: "coarsest" not in b.printed and max(score(b)) > 0),
    "compare": ("full no-mom", lambda a, b: b.printed == "compared: ['full', 'no-mom'] cc2017\n" and not b.reconstructed),
    "out": ("elsewhere --pairs pairs", lambda a, b: b.out == Path("elsewhere") and b.values),
    "clips": (6, lambda a, b: [clip for _, clip in b.keys()] == [0, 5, 10, 15, 20, 25] and len(a.keys()) == 4),
    "batch_size": (3, lambda a, b: [row["clips"] for row in a.made + b.made] == [2, 2, 3, 1]),
    "device": ("mps", "--device mps: this process has cpu"),
    "processes": (2, lambda a, b: (set(a.processes), set(b.processes)) == ({1}, {2})),
    "steps": (3, lambda a, b: [row["steps"] for row in a.made + b.made] == [2, 2, 3, 3] and "steps3" in b.out.name),
    "guidance": (0, lambda a, b: [row["guidance"] for row in a.made + b.made] == [2, 2, 0, 0]),
    "stimuli": ("films", lambda a, b: differ(a, b, "gt", 2) < 3 < differ(a, b, "gt") and score(a) != score(b)),
    "seconds": (1, lambda a, b: differ(a, b, "gt") > 3 and differ(a, b, "recon") == 0),
    "fps": (9, lambda a, b: (a.fps, b.fps) == ([4.5] * 3, [9] * 3)),
    "metrics": ("psnr", lambda a, b: b.out.name == "eval-4-clips-psnr" and max(score(a)) <= 1 < min(score(b))),
    "size": ("256", lambda a, b: score(a) != score(b) and differ(a, b, "recon") == 0),
    "classifier_frames": ("16 --metrics video_2way", lambda a, b: set(b.judged) == {16}),
    "trials": ("7 --metrics video_2way", lambda a, b: all(round(7 * value, 6).is_integer() for value in score(b))),
    "video_classifier": ("nowhere --metrics video_2way", has_no("video_classifier")),
    "image_classifier": ("/nowhere --metrics frame_2way", has_no("image_classifier")),
    "clip": ("local-dir:/nowhere --metrics clip_pcc", has_no("clip")),
    "clip_large": ("local-dir:/nowhere --metrics clip_pcc_all_pairs", has_no("clip_large")),
    "dino": ("/nowhere --metrics dtc", has_no("dino")),
    "flow": ("farneback --metrics epe", lambda a, b: min(score(b)) > 0 and not b.evaluation.unavailable),
    "amt": ("/nowhere --metrics ms", has_no("amt")),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory) -> Path:
    """The tiny world, and seconds of each; finished/, stage1/: runs/ before an evaluation, before stage 2."""
    root = tmp_path_factory.mktemp("options") / "world"
    shutil.copytree(tiny, root)
    data, runs = root / "data" / "cc2017", root / "runs" / "cc2017" / "sub1"
    shutil.copytree(data / "sub1", data / "sub2")
    for split in ("train", "test"):
        file = data / "sub2" / split / "fmri.npy"
        np.save(file, np.roll(np.load(file), 7, axis=3))
    shutil.copytree(data, root / "data" / "cinebrain")
    (root / "data" / "cinebrain" / "sub2").rename(root / "data" / "cinebrain" / "sub3")
    write_stage1(root, "second-s0", seed=7)
    rewrite(shutil.copytree(runs / "full-s0", runs / "full-s3"), seed=3)
    write_stage1(root, "full-s3", seed=5)
    rewrite(shutil.copytree(runs, runs.with_name("sub2")), subject=2)
    rewrite(shutil.copytree(runs, root / "runs" / "cinebrain" / "sub3"), data="cinebrain", subject=3)
    shutil.copytree(root / "runs", root / "stage1", ignore=shutil.ignore_patterns("stage2"))
    (root / "runs").rename(root / "finished")
    np.save(root / "x.npy", np.load(data / "sub1" / "test" / "fmri.npy")[0, 0])
    for film in (data / "raw" / "stimuli").iterdir():  # mirrored
        video = read_video(film)
        write_video(root / "films" / film.name, video.frames[:, :, ::-1], video.fps)
    for method, turn in (("gt", 1), ("ours", -1)):
        for k in range(3):
            frames = np.random.default_rng(k).integers(256, size=(5, 32, 48, 3), dtype=np.uint8)
            write_video(root / "pairs" / method / f"{k}.mp4", frames[::turn], 5)
    for k in range(3):
        left, right = (read_video(root / "pairs" / method / f"{k}.mp4").frames for method in ("gt", "ours"))
        write_video(root / "sides" / "ours" / f"{k}.mp4", np.concatenate([left, right], 2), 5)
    shutil.copytree(root / "pairs", root / "broken")
    (root / "broken" / "ours" / "1.mp4").write_bytes(b"no video")
    return root


def rewrite(folder: Path, **settings) -> None:
    """Other settings in each config.json below."""
    for file in folder.rglob("stage?/config.json"):
        config = json.loads(file.read_text())
        for part in (config, config.get("stage1_config", {})):
            part.update({name: value for name, value in settings.items() if name in part})
        file.write_text(json.dumps(config))


def see(place: Path, script, arguments: list[str]) -> Watched:
    """The first three steps of a new run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setitem(sys.modules, "bitsandbytes.optim", None)
        shutil.rmtree(place / "runs", ignore_errors=True)
        if script is train_stage2:
            shutil.copytree(place / "stage1", place / "runs")
        elif script is evaluate:
            shutil.copytree(place / "finished", place / "runs")
            return watch_evaluation(arguments)
        return watch(script, arguments)


@pytest.fixture(scope="module")
def usual(place) -> dict:
    """What is watched of each script without the option."""
    return {script: see(place, script, arguments) for script, arguments in USUAL.items()}


USUAL = {train_stage1: STAGE1, train_stage2: STAGE2, evaluate: [*EVALUATE, "--clips", "4"]}
ALONE = {  # with these, evaluate.py has no clips of a run
    **dict.fromkeys(("fmri", "pairs", "out", "compare"), EVALUATE),
    "split": [*EVALUATE, "--pairs", "sides"],
    "frames": [*EVALUATE, "--pairs", "pairs"],
    "skip_bad": [*EVALUATE, "--pairs", "broken"],
}
TABLES = {train_stage1: OF_STAGE1, train_stage2: OF_STAGE2, evaluate: OF_EVALUATE}
ROWS = [(script, name) for script, table in TABLES.items() for name in table]


@pytest.mark.parametrize("script, name", ROWS, ids=[f"{script.__name__}-{name}" for script, name in ROWS])
def test_an_option_changes_what_it_should(place, usual, script, name):
    value, check = TABLES[script][name]
    words = [f"--{name}", *str(value).split()]
    arguments = ALONE.get(name, USUAL[script]) if script is evaluate else USUAL[script]
    if isinstance(value, bool):
        words = [f"--{name}" if value else f"--no-{name}"]
        arguments = without(arguments, train_stage2.UNUSED if name in ("mom", "integration") else ())
    if isinstance(check, str):
        with pytest.raises((ValueError, MissingData), match=check):
            see(place, script, [*arguments, *words])
    else:
        assert check(usual[script], see(place, script, [*arguments, *words]))


def test_every_option_has_a_row():
    for script, table in TABLES.items():
        assert table.keys() == {f.name for f in dataclasses.fields(script.Config)}
