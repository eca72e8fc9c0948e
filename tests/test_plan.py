"""--plan: counts against truth at small size, the paper's size within 3 %, what a GPU that is too small is
told."""

import re
import sys

import pytest
import test_train_stage2
import torch
from accelerate.utils import set_seed
from conftest import run_script, write_prepared
from test_video_decoder import wan_pipeline
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import train_stage1
import train_stage2
from extras import steps
from prepare.facts import PUBLISHED
from support import plan, training

SMALL = "--tokens 63 --width 256 --layers 3 --attention_heads 4 --batch_size 16".split()
SIZES = {"volumes": 1, "voxels": 3000, "frames": 3, "embed_dim": 64, "classes": 4}
BRAIN = {name: PUBLISHED["cc2017"][name] for name in ("voxels", "volumes", "embed_dim")}


def stage1(*argv: object, sizes: dict = PUBLISHED["cc2017"]) -> plan.Count:
    config = train_stage1.parse(["--data", "cc2017", *map(str, argv)])
    return steps.stage1(config, sizes, train_stage1.build, train_stage1.losses_and_gradients)


def stage2(*argv: object, sizes: dict = PUBLISHED["cc2017"], brain: dict = BRAIN) -> plan.Count:
    config = train_stage2.parse(["--data", "cc2017", *map(str, argv)])
    return steps.stage2(config, sizes, brain, train_stage2.Parts, train_stage2.losses_and_gradients)


# ---------------------------------------------------------------- the paper's size


@pytest.mark.parametrize(
    ("argv", "peak", "flop"),
    [
        ([], 34.2, 687.9),
        (["--no-checkpointing"], 140.0, 561.5),
        (["--micro_batch", 8], 21.8, 873.9),  # the 24 GB card
        (["--micro_batch", 8, "--no-checkpointing", "--optimizer", "adamw8bit"], 20.8, 747.4),
    ],
)
def test_stage_1_at_the_papers_size(argv, peak, flop):
    need = stage1(*argv)
    assert need.peak / plan.GIB == pytest.approx(peak, rel=0.03)
    assert need.flop / plan.TERA == pytest.approx(flop, rel=0.01)


def test_stage_2_at_the_papers_size_printed(tmp_path, monkeypatch, capsys):
    """By --plan itself, which needs no data and writes nothing."""
    monkeypatch.chdir(tmp_path)
    train_stage2.main(train_stage2.parse(["--data", "cc2017", "--plan"]))
    printed = capsys.readouterr().out
    numbers = [
        re.search(f"([0-9.,]+) {unit}", printed)[1] for unit in ("GiB", "TFLOP", "hours", "GB of latents")
    ]
    numbers = [float(number.replace(",", "")) for number in numbers]
    assert numbers == pytest.approx([26.7, 16_720, 31.7, 16.1], rel=0.03)
    assert "counted, not measured" in printed and not list(tmp_path.iterdir())


def test_stage_2_on_a_24_gb_card():
    need = stage2("--optimizer", "adamw8bit")
    assert need.peak / plan.GIB == pytest.approx(19.8, rel=0.03)


# ---------------------------------------------------------------- against truth


def real_step(config) -> tuple:
    """The same step on real tensors: a function, and the bytes of what lies there before it."""
    set_seed(0)
    model, heads = train_stage1.build(config, SIZES)
    x, targets = steps.inputs(config.batch_size, SIZES)
    for value in (x, *targets.values()):
        value.uniform_()
    fixed = sum(p.nbytes for part in (model, heads) for p in part.parameters())
    how = {}, config.micro_batch, plan.bf16
    return lambda: train_stage1.losses_and_gradients(model, heads, x, targets, *how), fixed


@pytest.mark.parametrize("more", [[], ["--no-checkpointing"], ["--micro_batch", 4]])
def test_the_peak_is_that_of_the_allocator(more):
    """torch.profiler sees each allocation of a real step; the count sees the tensors of a fake one."""
    config = train_stage1.parse(["--data", "cc2017", *SMALL, *map(str, more)])
    step, fixed = real_step(config)
    step()  # what is allocated once and for all
    step, fixed = real_step(config)
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    x, targets = steps.inputs(config.batch_size, SIZES)
    fixed += 2 * fixed + sum(value.nbytes for value in (x, *targets.values()))  # moments; inputs
    assert stage1(*SMALL, *more, sizes=SIZES).peak == pytest.approx(fixed + peak, rel=0.05)


@pytest.mark.parametrize("more", [[], ["--no-checkpointing"], ["--micro_batch", 4]])
def test_the_operations_are_those_of_flop_counter_mode(more):
    step, _ = real_step(train_stage1.parse(["--data", "cc2017", *SMALL, *map(str, more)]))
    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        step()
    assert stage1(*SMALL, *more, sizes=SIZES).flop == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_of_equal_parts_one_is_counted(tmp_path, monkeypatch):
    """As much as if each ran; and the DiT of a local folder."""
    wan_pipeline().save_pretrained(tmp_path / "wan")
    size = test_train_stage2.SIZE
    argv = ["--decoder", tmp_path / "wan", "--batch_size", 8, "--micro_batch", 2, "--attention_heads", 4]
    argv += [
        word for name, n in zip(("--frames", "--height", "--width"), size, strict=True) for word in (name, n)
    ]
    how = {
        "sizes": SIZES,
        "brain": dict(voxels=3000, tokens=12, width=64, layers=2, attention_heads=4, embed_dim=64),
    }
    one = stage2(*argv, **how)
    monkeypatch.setattr(plan.Repeated, "__call__", lambda self, *inputs: self.call(*inputs))
    each = stage2(*argv, **how)
    assert one.flop == pytest.approx(each.flop, rel=0.001) and one.peak == pytest.approx(each.peak, rel=0.01)


# ---------------------------------------------------------------- what is printed, and refused


def test_plan_needs_no_data_and_writes_nothing(tmp_path):
    done = run_script("train_stage1.py", "--data", "cc2017", "--plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "34.2 GiB a process: fits" in done.stdout and "3.4 hours" in done.stdout
    assert not list(tmp_path.iterdir())


def test_seconds_follow_from_the_card(monkeypatch):
    need = plan.Count(20 * plan.GIB, 989 * plan.TERA, plan.GB, 3 * plan.GB)
    monkeypatch.setattr(plan, "gpu", lambda: ("NVIDIA H100 80GB HBM3", 79 * plan.GIB))
    text = plan.report("x", need, 3600, 0.5, {"of weights": plan.GB})
    assert (
        "2.00 s at 50% of 989" in text
        and "2.0 hours" in text
        and "fits in 79.0" in text
        and "1.0 GB of" in text
    )
    monkeypatch.setattr(plan, "gpu", lambda: ("NVIDIA T4", 15 * plan.GIB))
    text = plan.report("x", need, 3600, 0.5, {})
    assert "DOES NOT FIT in 15.0" in text and "no estimate of seconds" in text and "hours" not in text


LARGE = [*SMALL, "--batch_size", 96]  # activations take more than the weights


@pytest.mark.parametrize(
    ("argv", "fits", "message"),
    [
        (["--no-checkpointing"], ["--no-checkpointing"], None),
        (["--no-checkpointing"], ["--checkpointing"], r"with --checkpointing: add that"),
        ([], ["--micro_batch", 8], r"with --micro_batch 8: add that"),
        (
            [],
            ["--micro_batch", 8, "--optimizer", "adamw8bit"],
            r"--micro_batch 8 --optimizer adamw8bit: add that",
        ),
        ([], None, r"wanted another GPU \(.* GiB with --micro_batch 8 --optimizer adamw8bit\)"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_mends_it(argv, fits, message, monkeypatch):
    """A card on which just the options `fits` fit."""
    free = stage1(*LARGE, *fits, sizes=SIZES).peak if fits else 1000
    monkeypatch.setattr(plan, "gpu", lambda: ("a card", free))
    config = train_stage1.parse(["--data", "cc2017", *map(str, [*LARGE, *argv])])
    how = config, SIZES, train_stage1.build, train_stage1.losses_and_gradients
    if message is None:
        return steps.refuse_stage1(*how)
    with pytest.raises(ValueError, match=message):
        steps.refuse_stage1(*how)


def test_a_run_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_prepared(tmp_path / "data")
    monkeypatch.setattr(plan, "gpu", lambda: ("a card", 1000))
    monkeypatch.setattr(train_stage1, "learn", lambda *_: sys.exit("it was loaded"))
    with pytest.raises(ValueError, match=r"a step needs .* a card has 0.0 free"):
        train_stage1.main(train_stage1.parse(["--data", "cc2017", *SMALL, "--steps", "1"]))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kernel", ["math", "flash", "auto"])
def test_the_attention_kernel_is_chosen_and_named(kernel, capsys):
    from accelerate import Accelerator

    try:
        training.choose_attention(kernel, Accelerator(cpu=True), 32)
        named = capsys.readouterr().out
        assert named == "attention: MATH\n" if kernel == "math" else "FLASH" in named
        assert torch.backends.cuda.math_sdp_enabled() == (kernel in ("auto", "math"))
    finally:
        training.choose_attention("auto", Accelerator(cpu=True), 32)
