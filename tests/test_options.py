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
from watch import STAGE1, STAGE2, Watched, watch

import train_stage1
import train_stage2

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


def same_losses(a: Watched, b: Watched) -> bool:
    return all(one == pytest.approx(other, rel=1e-4) for one, other in zip(a.losses, b.losses, strict=True))


def hidden(a: Watched) -> float:
    """The share of the voxels that are hidden."""
    return float(np.mean([(batch.x == 0).float().mean() for batch in a.batches]))


def dropped(a: Watched) -> int:
    return sum(int(batch.dropped.sum()) for batch in a.batches)


def rate(a: Watched, b: Watched, group: int) -> float:
    """How many times as fast the group learns, at the first step."""
    return b.rates[0][group] / a.rates[0][group]


def has(a: Watched, part: str) -> bool:
    return any(part in name for name in a.start)


def same_shapes(a: Watched, b: Watched) -> bool:
    return all(a.start[name].shape == b.start[name].shape for name in a.start)


def lora(a: Watched) -> torch.Tensor:
    """The first lora_A (rank, width)."""
    return next(p for name, p in a.start.items() if "lora_A" in name)


def update_of_lora(a: Watched) -> float:
    """How large the first LoRA's change of its layer is, beside B A."""
    layer = next(m for m in a.models[0].modules() if hasattr(m, "lora_A"))
    return float(
        layer.get_delta_weight("default").norm()
        / (layer.lora_B.default.weight @ layer.lora_A.default.weight).norm()
    )


BOTH = {
    "run": ("other", lambda a, b: (a.folder.parent.name, b.folder.parent.name) == ("full-s0", "other-s0")),
    "seed": (3, lambda a, b: b.folder.parent.name == "full-s3" and clips(a) != clips(b) and not same_start(a, b)),
    "batch_size": (5, lambda a, b: [len(batch.clips) for batch in b.batches] == [5] * 3),
    "weight_decay": (0.9, lambda a, b: moved(a, b) and {g["weight_decay"] for g in b.optimiser.param_groups} == {0.9}),
    "max_norm": (1e-3, lambda a, b: max(b.norms) < 1.001e-3 < min(a.norms) <= max(a.norms) < 1.001),
    "log_every": (2, lambda a, b: (a.logged, b.logged) == ([0, 1, 2], [0, 2])),
    "save_every": (2, lambda a, b: (a.saved, b.saved) == ([], [2])),
    "optimizer": ("adamw8bit", "no bitsandbytes"),
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
    "rank": (3, lambda a, b: a.start.keys() == b.start.keys() and not same_shapes(a, b)),
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
    "frames": (5, "frames = 9, but frames = 5"),
    "height": (48, "height = 32, but height = 48"),
    "width": (32, "width = 48, but width = 32"),
    "lora_rank": (2, lambda a, b: lora(a).shape[0] == 4 and lora(b).shape[0] == 2),
    "lora_alpha": (2, lambda a, b: same_start(a, b) and (update_of_lora(a), update_of_lora(b)) == pytest.approx((2, 0.5))),
    "K": (3, lambda a, b: (a.recalled[0].indices.shape[1], b.recalled[0].indices.shape[1]) == (5, 3)),
    "own_captions": (0, lambda a, b: sum(int(x.excluded.sum()) for x in b.batches)
                     > sum(int(x.excluded.sum()) for x in a.batches)),
    "alpha": (2, lambda a, b: b.models[0].mom.integration.alpha == 2 and moved(a, b)),
    "attention_heads": (2, lambda a, b: same_start(a, b) and b.models[0].mom.integration.heads == 2),
    "epochs": (4, lambda a, b: b.rates[2][0] < a.rates[2][0]),  # a longer way up
    "micro_batch": (3, lambda a, b: (set(a.dit_calls), set(b.dit_calls)) == ({4}, {2, 3}) and same_losses(a, b)),
    "checkpointing": (False, lambda a, b: len(a.dit_calls) == 2 * len(b.dit_calls) and len(a.calls) > len(b.calls)
                      and same_losses(a, b)),
    "lr": (2e-3, lambda a, b: [rate(a, b, k) for k in range(4)] == pytest.approx([2, 2, 1, 1]) and moved(a, b)),
    "lr_fusion": (4e-3, lambda a, b: [rate(a, b, k) for k in range(4)] == pytest.approx([1, 1, 2, 1]) and moved(a, b)),
    "lr_lora": (2e-3, lambda a, b: [rate(a, b, k) for k in range(4)] == pytest.approx([1, 1, 1, 2]) and moved(a, b)),
    "condition_dropout": (0, lambda a, b: dropped(a) > 0 == dropped(b)),
    "noise_shift": (4, lambda a, b: same_start(a, b) and a.losses[0]["diffusion"] != b.losses[0]["diffusion"]
                    and a.losses[0]["image"] == b.losses[0]["image"]),
    "guidance": ("1 --sample_every 2 --samples 1 --sampling_steps 2", lambda a, b: b.samples[0]["guidance"] == 1),
    "sampling_steps": ("3 --sample_every 2 --samples 1", lambda a, b: b.samples[0]["steps"] == 3),
    "samples": ("2 --sample_every 2 --sampling_steps 1", lambda a, b: b.samples[0]["clips"] == 2),
    "sample_every": ("2 --samples 1 --sampling_steps 1", lambda a, b: len(b.samples) == 1 and not a.samples),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory) -> Path:
    """The tiny world with a second subject, a second dataset and a second stage 1."""
    root = tmp_path_factory.mktemp("options") / "world"
    shutil.copytree(tiny, root)
    shutil.rmtree(root / "runs" / "cc2017" / "sub1" / "full-s0" / "stage2")
    data = root / "data" / "cc2017"
    shutil.copytree(data / "sub1", data / "sub2")
    for split in ("train", "test"):
        file = data / "sub2" / split / "fmri.npy"
        np.save(file, np.roll(np.load(file), 7, axis=3))
    shutil.copytree(data, root / "data" / "cinebrain")
    (root / "data" / "cinebrain" / "sub2").rename(root / "data" / "cinebrain" / "sub3")
    runs = root / "runs" / "cc2017" / "sub1"
    shutil.copytree(runs / "full-s0", runs / "full-s3")
    shutil.copytree(runs, runs.with_name("sub2"))
    shutil.copytree(runs, root / "runs" / "cinebrain" / "sub3")
    for copy in (runs.with_name("sub2"), root / "runs" / "cinebrain" / "sub3"):
        config = copy / "full-s0" / "stage1" / "config.json"
        changes = {"data": copy.parent.name, "subject": int(copy.name[3:])}
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    write_stage1(root, "second-s0", seed=7)
    (root / "runs").rename(root / "finished")
    return root


def see(place: Path, script, arguments: list[str]) -> Watched:
    """The first three steps of a new run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setitem(sys.modules, "bitsandbytes.optim", None)
        shutil.rmtree(place / "runs", ignore_errors=True)
        if script is train_stage2:
            shutil.copytree(place / "finished", place / "runs")
        return watch(script, arguments)


@pytest.fixture(scope="module")
def usual(place) -> dict:
    """What is watched of each script without the option."""
    return {script: see(place, script, arguments) for script, arguments in USUAL.items()}


USUAL = {train_stage1: STAGE1, train_stage2: STAGE2}
TABLES = {train_stage1: OF_STAGE1, train_stage2: OF_STAGE2}
ROWS = [(script, name) for script, table in TABLES.items() for name in table]


@pytest.mark.parametrize("script, name", ROWS, ids=[f"{script.__name__}-{name}" for script, name in ROWS])
def test_an_option_changes_what_it_should(place, usual, script, name):
    value, check = TABLES[script][name]
    words = (
        f"--{name} {value}".split() if not isinstance(value, bool) else [f"--{'' if value else 'no-'}{name}"]
    )
    if isinstance(check, str):
        with pytest.raises(ValueError, match=check):
            see(place, script, [*USUAL[script], *words])
    else:
        assert check(usual[script], see(place, script, [*USUAL[script], *words]))


def test_every_option_has_a_row():
    for script, table in TABLES.items():
        assert table.keys() == {f.name for f in dataclasses.fields(script.Config)}
