"""Bad input, a table of file x damage x command: one error of at most three lines that names the file or
option, an exit status that is not 0, and no file of data/ or runs/ changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sha256
from safetensors.torch import load_file, save_file
from test_evaluate import write_world

import evaluate
import train_stage1
import train_stage2
from metrics.options import parse as parse_evaluate
from support.runs import door

STAGE1 = "--data cc2017 --steps 4 --batch_size 8 --tokens 12 --width 24 --layers 1 --attention_heads 4 --save_every 2 --log_every 1"
STAGE2 = (
    "--data cc2017 --decoder models/wan --frames 9 --height 32 --width 32 --epochs 2 --batch_size 8 --micro_batch 4 "
    "--attention_heads 4 --lora_rank 4 --sample_every 0 --save_every 2 --log_every 1 --lr 1e-3 --lr_lora 1e-3"
)
EVALUATE = "--data cc2017 --metrics ssim --size native --steps 1 --guidance 1 --stimuli films --seconds 2"
COMMANDS = {
    "s1": (train_stage1, f"{STAGE1} --run new"),
    "s1again": (train_stage1, STAGE1),
    "s2": (train_stage2, f"{STAGE2} --run new --stage1 full"),
    "s2again": (train_stage2, STAGE2),
    "ev": (evaluate, EVALUATE),
    "fmri": (evaluate, "--data cc2017 --fmri x.npy --steps 1"),
    "pairs": (evaluate, "--pairs pairs --metrics ssim --size native"),
    "compare": (evaluate, "--compare full --data cc2017"),
}
WORDS = "red blue a circle square grows moves".split()


def call(name: str, more: str = "") -> int:
    """The exit status of a command of COMMANDS, with more options."""
    script, words = COMMANDS[name]
    arguments = [*words.split(), *more.split()]

    def run() -> None:
        if script is evaluate:
            evaluate.main(parse_evaluate(arguments, evaluate.__doc__))
        else:
            script.main(script.parse(arguments))

    with pytest.raises(SystemExit) as end:
        door(run)
    return end.value.code


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("faults"))


def make_world(root: Path) -> Path:
    """A prepared dataset, a decoder, a finished run of both stages, its evaluation, videos, a recording."""
    rng = np.random.default_rng(0)
    write_world(root, lambda i: {"caption": " ".join(rng.choice(WORDS, 3))}, copies=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in ("s1again", "s2again", "ev"):
            assert call(name) == 0, name
        stimuli = next(Path(FULL).glob("eval*/gt"))
        for method in ("gt", "ours"):
            shutil.copytree(stimuli, Path("pairs", method))
        np.save("x.npy", np.load("data/cc2017/sub1/test/fmri.npy")[0, 0])
    return root


def hashes_of(root: Path) -> dict[str, str]:
    files = [path for room in ("data", "runs") for path in (root / room).rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): sha256(path) for path in files}


def check(stderr: str, status: int, name: str) -> None:
    """One error of at most three lines, the first of which holds `name`."""
    stderr = stderr.replace("\r", "\n")
    assert "Traceback" not in stderr
    assert status not in (0, None), stderr
    assert stderr.count("error: ") == 1, stderr
    error = stderr[stderr.index("error: ") :].strip().splitlines()
    assert len(error) <= 3 and len(error[0]) < 900, error
    assert name in error[0], error
    assert "allow_pickle" not in stderr and "weights_only" not in stderr


# ---------------------------------------------------------------- damage to files


def bytes_(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def array(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        value = change(np.load(path))
        np.save(path, value, allow_pickle=True)

    return damage


def filled(value: float) -> Callable[[Path], None]:
    def change(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float32) if x.dtype.kind not in "f" else x.copy()
        x.reshape(len(x), -1)[:, 0] = value
        return x

    return array(change)


def huge(path: Path) -> None:
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
        )
        file.write(b"\0" * 64)


def to_json(change: Callable[[object], object]) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(change(json.loads(path.read_text()))))


def line(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """The second line of a .jsonl changed."""

    def damage(path: Path) -> None:
        rows = path.read_text().splitlines()
        path.write_text("\n".join([rows[0], json.dumps(change(json.loads(rows[1]))), *rows[2:]]) + "\n")

    return damage


def without(key: str) -> Callable[[dict], dict]:
    return lambda row: {name: value for name, value in row.items() if name != key}


def with_(**changes) -> Callable[[dict], dict]:
    return lambda row: row | changes


def tensors(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda path: save_file(change(load_file(path)), path)


def state(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda path: torch.save(change(torch.load(path, weights_only=True)), path)


def first(value) -> Callable[[dict], dict]:
    def change(weights: dict) -> dict:
        name = next(iter(weights))
        return weights | {name: value(weights[name])}

    return change


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def bomb(path: Path) -> None:
    torch.save({"step": 2, "model": Bomb()}, path)


ANY = {
    "empty": bytes_(b""),
    "garbage": bytes_(b"\x93\x00garbage" * 9),
    "half": half,
    "html": bytes_(b"<html>404 Not Found</html>"),
    "folder": to_folder,
}
NPY = ANY | {
    "objects": array(lambda x: np.array([{}, None], object)),
    "text": array(lambda x: np.array(["a"] * len(x))),
    "complex": array(lambda x: x.astype(complex)),
    "huge": huge,
    "scalar": array(lambda x: np.float32(1)),
}
FLOATS = NPY | {
    "float64": array(lambda x: x.astype(np.float64)),
    "bool": array(lambda x: x > 0),
    "onedim": array(lambda x: x.ravel()),
    "fewer": array(lambda x: x[:-1]),
    "narrow": array(lambda x: x[..., :-1]),
    "nan": filled(np.nan),
    "infinite": filled(np.inf),
}
NUMBERS = {key: damage for key, damage in FLOATS.items() if key not in ("nan", "infinite", "float64")}
JSON = ANY | {
    "list": bytes_(b"[1, 2]"),
    "null": bytes_(b"null"),
    "number": bytes_(b"7"),
    "latin-1": bytes_('{"caption": "é"}'.encode("latin-1")),
}
LINES = JSON | {
    "line is a list": line(lambda row: [1]),
    "segment is a list": line(with_(segment=["seg1"])),
    "no segment": line(without("segment")),
    "no caption": line(without("caption")),
    "caption is null": line(with_(caption=None)),
    "no video": line(without("video")),
    "start is NaN": line(with_(start_s=float("nan"))),
    "start is text": line(with_(start_s="0")),
}
MEMORIES = ANY | {
    "object": bytes_(b"{}"),
    "numbers": bytes_(b"[1, 2]"),
    "null": bytes_(b"null"),
    "fewer": to_json(lambda rows: rows[1:]),
    "no caption": to_json(lambda rows: [{"id": "x"}, *rows[1:]]),
}
WEIGHTS = ANY | {
    "nan": tensors(first(lambda w: w * torch.nan)),
    "lacking": tensors(lambda weights: dict(list(weights.items())[1:])),
    "left over": tensors(lambda weights: weights | {"more": torch.ones(1)}),
    "shape": tensors(first(lambda w: w.flatten()[:1].clone())),
}
STATE = ANY | {
    "bomb": bomb,
    "no step": state(without("step")),
    "step is text": state(with_(step="2")),
    "no model": state(lambda s: {"step": 2}),
    "list": state(lambda s: [s]),
}
MISSING = {"missing": Path.unlink}
OLD = {  # settings of a run of another version of this program
    "an option that went": to_json(with_(attention_kernel="auto")),
    "an option that came": to_json(without("optimizer")),
}
STIMULI, SUBJECT, FULL = "data/cc2017/stimuli", "data/cc2017/sub1", "runs/cc2017/sub1/full-s0"
DECODED = f"{STIMULI}/train/wan"


def rows_of(
    command: str, file: str, damages: dict, name: str | None = None, but: str = ""
) -> dict[str, tuple]:
    """A row a damage. name: what the error holds, if not the file's; but: those that are no damage here."""
    title = f"{command}, {file.split('cc2017/')[-1]}"
    rows = {f"{title}, {key}": (command, file, damages[key], name or Path(file).name) for key in damages}
    return {key: row for key, row in rows.items() if key.removeprefix(f"{title}, ") not in but.split(", ")}


CASES = (
    rows_of("s1", f"{SUBJECT}/train/fmri.npy", FLOATS, but="nan")  # a showing that was not recorded is NaN
    | rows_of("s1", f"{SUBJECT}/test/fmri.npy", FLOATS, but="nan")
    | rows_of("s1", f"{STIMULI}/train/e_img.npy", FLOATS, name="e_img")
    | rows_of("s1", f"{STIMULI}/train/e_txt.npy", FLOATS, name="e_txt")
    | rows_of("s1", f"{STIMULI}/test/e_act.npy", FLOATS, name="e_act")
    | rows_of("s1", f"{STIMULI}/train/categories.npy", FLOATS, name="categories", but="bool")
    | rows_of("s1", f"{STIMULI}/train/clips.jsonl", LINES)
    | rows_of("s1", f"{STIMULI}/train/manifest.json", JSON | {
        "no classes": to_json(lambda m: m | {"categories.npy": {"recipe": {}, "inputs": {}}}),
        "classes are a number": to_json(lambda m: m | {"categories.npy": {"recipe": {"classes": 4}, "inputs": {}}}),
    })
    | rows_of("s1", f"{SUBJECT}/voxels.npz", ANY)
    | rows_of("s1", f"{SUBJECT}/train/recorded.npy", NUMBERS | MISSING, but="bool")
    | rows_of("s1", f"{STIMULI}/train/near_copies.npy", NUMBERS)
    | rows_of("s1", f"{STIMULI}/train/captions.npy", NUMBERS | MISSING, but="onedim")
    | rows_of("s1", f"{STIMULI}/test/captions.npy", NPY)
    | rows_of("ev", f"{STIMULI}/test/near_copies.npy", NPY)
    | rows_of("s1again", f"{FULL}/stage1/config.json", JSON)
    | rows_of("s1again", f"{FULL}/stage1/config.json", OLD, name="stage1 was made with")
    | rows_of("s2again", f"{FULL}/stage2/config.json", OLD, name="stage2 was made with")
    | rows_of("s2", f"{FULL}/stage1/config.json", JSON | {"no rois": to_json(without("rois")), "tau is text": to_json(with_(tau="x"))},
              name="stage1")
    | rows_of("s2", f"{FULL}/stage1/brain_model/config.json", JSON, name="brain_model")
    | rows_of("s2", f"{FULL}/stage1/brain_model/model.safetensors", WEIGHTS, name="brain_model")
    | rows_of("s2", f"{FULL}/stage1/heads/model.safetensors", WEIGHTS, name="heads")
    | rows_of("s2", f"{DECODED}/latents.npy", FLOATS, but="nan, infinite, float64, bool")
    | rows_of("s2", f"{DECODED}/text_tokens.npy", FLOATS, name="text", but="float64, bool")
    | rows_of("s2", f"{DECODED}/text_offsets.npy", NPY, name="text")
    | rows_of("s2", f"{STIMULI}/wan/empty_prompt.npy", FLOATS, but="bool")
    | rows_of("s2", "models/wan/model_index.json", JSON, name="wan")
    | rows_of("s2", "models/wan/transformer/config.json", JSON, name="wan")
    | rows_of("s2", "models/wan/transformer/diffusion_pytorch_model.safetensors", ANY, name="wan")
    | rows_of("ev", f"{FULL}/stage2/config.json", JSON | {
        "no decoder": to_json(without("decoder")), "frames are text": to_json(with_(frames="9")),
        "another subject": to_json(with_(subject=2)), "mom is text": to_json(with_(mom="yes")),
    }, name="stage2")
    | rows_of("ev", f"{FULL}/stage2/brain_model/model.safetensors", WEIGHTS, name="brain_model")
    | rows_of("ev", f"{FULL}/stage2/heads/config.json", JSON, name="heads")
    | rows_of("ev", f"{FULL}/stage2/mixture_of_memories/model.safetensors", WEIGHTS, name="mixture_of_memories")
    | rows_of("ev", f"{FULL}/stage2/lora/pytorch_lora_weights.safetensors", WEIGHTS, name="lora", but="left over")
    | rows_of("ev", f"{FULL}/stage2/memories.safetensors", WEIGHTS | MISSING)
    | rows_of("ev", f"{FULL}/stage2/memories.json", MEMORIES)
    | rows_of("ev", f"{FULL}/stage2/voxels.npz", ANY | MISSING)
    | rows_of("fmri", "x.npy", FLOATS, but="float64, bool, onedim, fewer")
    | rows_of("pairs", "pairs/ours/0000.mp4", ANY, name="0000")
    | rows_of("compare", f"{FULL}/EVAL/metrics.json", JSON | {
        "no provenance": to_json(without("provenance")), "metrics are a list": to_json(with_(metrics=[1])),
        "clips are text": to_json(with_(clips="all")),
    }, name="metrics.json")
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_damage_is_one_error_and_changes_nothing(case: str, world, tmp_path, monkeypatch, capfd):
    command, file, damage, name = CASES[case]
    root = tmp_path / "w"
    shutil.copytree(world, root)
    monkeypatch.chdir(root)
    evaluation = next((root / FULL).glob("eval*")).name
    path = root / file.replace("EVAL", evaluation)
    damage(path)
    before = hashes_of(root)
    status = call(command)
    check(capfd.readouterr().err, status, name)
    assert hashes_of(root) == before and not (root / "exploded").exists()


@pytest.mark.parametrize("damage", STATE)
def test_a_damaged_checkpoint_is_one_error(damage: str, world, tmp_path, monkeypatch, capfd):
    """Of a run that is half done."""
    root = tmp_path / "w"
    shutil.copytree(world, root)
    monkeypatch.chdir(root)
    to_json(with_(step=2))(root / FULL / "stage1" / "config.json")
    STATE[damage](root / FULL / "stage1" / "state" / "state.pt")
    before = hashes_of(root)
    status = call("s1again")
    check(capfd.readouterr().err, status, "state.pt")
    assert hashes_of(root) == before and not (root / "exploded").exists()


def test_data_of_an_older_version_are_to_be_prepared_anew(world, monkeypatch, capfd):
    monkeypatch.chdir(world)
    file = Path(STIMULI, "train", "near_copies.npy")
    file.rename("aside.npy")
    status = call("s1")
    Path("aside.npy").rename(file)
    assert status == 1 and f"{file} is not there: python data.py cc2017" in capfd.readouterr().err


# ---------------------------------------------------------------- options

BAD = "nan inf -1 x"
OPTIONS = {
    "s1": {
        "steps": "0 -4 1.5", "batch_size": "0 -4 1000", "lr": f"0 {BAD}", "tau": f"0 1e-30 {BAD}", "lambda_1": BAD, "lambda_2": BAD,
        "tokens": "0 -1", "width": "0 -2 25", "layers": "0 -1", "attention_heads": "0 -1", "rank": "0 -1", "dropout": f"1 {BAD}",
        "save_every": "0 -1", "log_every": "0 -1", "seed": "-1 1180591620717411303424", "max_norm": f"0 {BAD}",
        "weight_decay": BAD, "run": "../x a/b .hidden " + "x" * 300, "val_segments": "seg9", "rois": "nose", "subject": "0 -1 7",
        "data": "mars",
    },
    "s2": {
        "epochs": "0 -1", "batch_size": "0 -8 1000", "lr": f"0 {BAD}", "lr_fusion": BAD, "lr_lora": BAD, "K": "0 -1 1000",
        "alpha": "nan inf", "micro_batch": "0 -1", "lora_rank": "0 -1", "lora_alpha": f"0 {BAD}", "save_every": "0 -1",
        "log_every": "0 -1", "sampling_steps": "0 -1", "samples": "-1", "guidance": BAD, "run": "../x a/b", "stage1": "absent",
        "condition_dropout": f"2 {BAD}", "attention_heads": "0 5", "frames": "0 -1 10", "decoder": "absent/folder",
    },
    "ev": {
        "steps": "0 -1", "guidance": BAD, "clips": "0 -1", "fps": "0 1e9 nan", "seconds": "0 nan -1", "trials": "-1",
        "batch_size": "0", "metrics": "ssim,beauty", "size": "big 128", "subject": "0", "seed": "-1", "classifier_frames": "8", "flow": "tv-l1", "run": "absent ..", "out": "x.avi",
    },
}  # fmt: skip
OUT_OF_RANGE = []
for command, options in OPTIONS.items():
    for name, values in options.items():
        OUT_OF_RANGE += [(command, name, value) for value in values.split()]


@pytest.mark.parametrize(("command", "name", "value"), OUT_OF_RANGE)
def test_an_option_out_of_range_is_one_error(command: str, name: str, value: str, world, monkeypatch, capfd):
    monkeypatch.chdir(world)
    before = hashes_of(world)
    more = f"--{name}={value}"
    status = call("fmri" if name == "out" else command, more)
    is_place = name in ("run", "stage1", "decoder", "out", "data") and len(value) < 100
    wanted = value if is_place else name
    check(capfd.readouterr().err, status, wanted.split("/")[0] if name == "decoder" else wanted)
    assert hashes_of(world) == before


@pytest.mark.parametrize(
    ("command", "more", "name"),
    [("ev", "--split", "--split without --pairs"), ("ev", "--skip_bad", "--skip_bad without --pairs"),
     ("ev", "--out x.gif", "--out without --fmri or --pairs"), ("pairs", "--shuffle", "--shuffle with --pairs"),
     ("pairs", "--fmri x.npy", "--fmri with --pairs"), ("pairs", "--compare full", "--pairs with --compare"),
     ("pairs", "--guidance 0", "--guidance with --pairs"), ("fmri", "--clips 3", "--clips with --fmri"),
     ("s2", "--no-mom --no-integration", "--no-mom and --no-integration")],
)  # fmt: skip
def test_options_that_do_nothing_together_are_refused(command, more, name, world, monkeypatch, capfd):
    monkeypatch.chdir(world)
    status = call(command, more)
    check(capfd.readouterr().err, status, name)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("command", "more"),
    [("s1again", "--steps 12 --lambda_1 0"), ("s1again", "--lr 1"), ("s1again", "--rois visual"), ("s2again", "--K 4"),
     ("s2again", "--epochs 3"), ("s1again", "--val_segments seg3")],
)  # fmt: skip
def test_a_run_is_never_overwritten(command: str, more: str, world, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(world)
    before = hashes_of(world)
    status = call(command, more)
    check(capfd.readouterr().err, status, more.split()[0].strip("-"))
    assert hashes_of(world) == before


@pytest.mark.parametrize("command", ["s1again", "s2again", "ev"])
def test_a_finished_run_says_so_and_changes_nothing(command: str, world, monkeypatch):
    monkeypatch.chdir(world)
    before = hashes_of(world)
    assert call(command) == 0
    after = hashes_of(world)
    changed = {name for name in after if before.get(name) != after[name]}
    assert not {name for name in changed if "/eval" not in name}


@pytest.mark.parametrize("more", ["--clips 4", "--metrics psnr", "--steps 2"])
def test_a_smaller_evaluation_leaves_the_whole_one(more: str, world, tmp_path, monkeypatch):
    root = tmp_path / "w"
    shutil.copytree(world, root)
    monkeypatch.chdir(root)
    before = hashes_of(root)
    assert call("ev", more) == 0
    after = hashes_of(root)
    assert {name: after.get(name) for name in before} == before and len(after) > len(before)
