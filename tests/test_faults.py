"""Bad input: each file or option damaged is one error of at most three lines that names it, and nothing changes."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from test_bombs import Pickled
from tiny import SIZE, N, write_films

import evaluate
import train_stage1
import train_stage2
from data import Clips, memories
from evaluate import CineNeuron
from metrics.options import parse as parse_evaluate
from support.readers import read_array, read_json, read_json_lines, read_npz, read_state, read_tensors
from support.runs import FolderLock, RunFolder, door
from support.shared import PARTS

BOTH = "--data cc2017 --batch_size 8 --attention_heads 4 --save_every 2 --log_every 1"
STAGE1 = f"{BOTH} --steps 4 --tokens 12 --width 24 --layers 1"
STAGE2 = f"{BOTH} --decoder models/wan --frames 9 --height 32 --width 48 --epochs 1 --micro_batch 4"
STAGE2 += " --lora_rank 4 --sample_every 0 --lr 1e-3 --lr_lora 1e-3"
EVALUATE = "--data cc2017 --metrics ssim --size native --steps 1 --guidance 1"
COMMANDS = {
    "s1": (train_stage1, f"{STAGE1} --run new"),
    "s1again": (train_stage1, STAGE1),
    "s2": (train_stage2, f"{STAGE2} --run new --stage1 full"),
    "s2again": (train_stage2, STAGE2),
    "ev": (evaluate, EVALUATE),
    "fmri": (evaluate, "--data cc2017 --fmri x.npy --steps 1"),
    "pairs": (evaluate, "--pairs pairs --metrics ssim --size native"),
}
STIMULI, SUBJECT, RUN = "data/cc2017/stimuli", "data/cc2017/sub1", "runs/cc2017/sub1/full-s0"


def run(name: str, more: str = "") -> int | None:
    """A command of COMMANDS, with more options, in this process."""
    script, words = COMMANDS[name]
    arguments = [*words.split(), *more.split()]
    config = parse_evaluate(arguments, "") if script is evaluate else script.parse(arguments)
    return script.main(config)


def make_world(root: Path, films: bool = True) -> Path:
    """A data set, a decoder, a finished run of both stages, its evaluation, videos, a recording."""
    if films:
        write_films(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in ("s1again", "s2again", "ev"):
            run(name)
        stimuli = next(Path(RUN).glob("eval*/gt"))
        for method in ("gt", "ours"):
            shutil.copytree(stimuli, Path("pairs", method))
        np.save("x.npy", np.load(f"{SUBJECT}/test/fmri.npy")[0, 0])
    return root


@pytest.fixture(scope="module")
def module_world(tiny, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    for name in ("data", "models"):
        shutil.copytree(tiny / name, root / name)
    return make_world(root, films=False)


@pytest.fixture
def world(module_world, monkeypatch) -> Path:
    """The working directory. Whoever damages it repairs it."""
    monkeypatch.chdir(module_world)
    return module_world


def state_of(root: Path) -> dict[Path, tuple[int, int]]:
    files = [path for room in ("data", "runs") for path in (root / room).rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def error_of(action: Callable[[], object], root: Path, capfd) -> str:
    """The one error of at most three lines that an action ends in at the door, which changes nothing."""
    state = state_of(root)
    with pytest.raises(SystemExit) as end:
        door(action)
    stderr = capfd.readouterr().err.replace("\r", "\n")
    assert end.value.code in (1, 2) and stderr.count("error: ") == 1, stderr
    error = stderr[stderr.index("error: ") :].strip()
    assert len(error.splitlines()) <= 3 and len(error.splitlines()[0]) < 900, error
    assert not re.search("Traceback|allow_pickle|weights_only", stderr)
    assert state_of(root) == state and not Path("exploded").exists()
    return error


def raw(content: bytes | str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nothing(path: Path) -> None:
    pass


def npy(content: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.save(path, content, allow_pickle=True)


def array(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda path: np.save(path, change(np.load(path)))


def value(number, place=(5, 0)) -> Callable[[Path], None]:
    def change(x: np.ndarray) -> np.ndarray:
        x[place] = number
        return x

    return array(change)


def huge(path: Path) -> None:
    """A header of 1e12 numbers, and 64 bytes of them."""
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**12,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(b"\0" * 64)


def npz(**arrays) -> Callable[[Path], None]:
    """These arrays in place of those that are in it."""
    return lambda path: np.savez(path, **((dict(np.load(path)) if path.exists() else {}) | arrays))


def edit(change: Callable[[object], object]) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(change(json.loads(path.read_text()))))


def text(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace(old, new))


def setting(**changes) -> Callable[[Path], object]:
    return edit(lambda settings: settings | changes)


def without(key: str) -> Callable[[Path], object]:
    return edit(lambda settings: {name: value for name, value in settings.items() if name != key})


def tensors(**changes) -> Callable[[Path], None]:
    """Each a function of the file's tensor of that name (_: of its first), or None: it goes."""

    def damage(path: Path) -> None:
        stored = load_file(path) if path.exists() else {}
        for name, change in changes.items():
            name = next(iter(stored)) if name == "_" else name
            tensor = stored.pop(name, torch.ones(2))
            if change is not None:
                stored[name] = change(tensor).contiguous().clone()
        save_file(stored, path, {"format": "pt"})  # which transformers asks for

    return damage


def pt(content: object) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def state(**changes) -> Callable[[Path], None]:
    return lambda path: torch.save(torch.load(path, weights_only=True) | changes, path)


@contextmanager
def damaged(path: Path, damage: Callable[[Path], object]) -> Iterator[None]:
    content = path.read_bytes() if path.exists() else None
    damage(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)


def command(name: str, more: str = "") -> Callable[[Path], object]:
    return lambda path: run(name, more)


def read_clips(path: Path) -> None:
    """As stage 2 reads the training clips."""
    clips = Clips("cc2017", 1, "train", decoder="models/wan", size=SIZE)
    memories(clips, lambda e_img: e_img[:, 0])


def load_run(path: Path) -> CineNeuron:
    return CineNeuron.from_pretrained(RUN)


def go_on(path: Path) -> None:
    """A stage 1 whose state this is."""
    root = path.parents[1]
    with RunFolder(root, read_json(root / "config.json"), 4, "none", Accelerator(cpu=True)) as folder:
        folder.restore({"heads": torch.nn.Linear(2, 2)}, {})


s1, s1_again, s2, ev = (command(name) for name in ("s1", "s1again", "s2", "ev"))
read_floats = partial(read_array, shape=(None, 4), finite=True)
read_index, read_rows = partial(read_npz, kinds={"index": "iu"}), partial(read_json_lines, keys={"a": int})
read_step, read_number = (partial(read_json, keys=keys) for keys in ({"step": int}, {"x": float}))
read_pair, read_point = (
    partial(read_tensors, shapes={"w": (2,), "b": (1,)}),
    partial(read_state, keys={"step": int}),
)
FLOATS, ONES, LINEAR = np.ones((3, 4), np.float32), torch.ones(2), torch.nn.Linear(2, 2).state_dict()
TENSORS = tensors(w=torch.ones_like)
TRAIN, STAGE1_CONFIG, STATE = f"{STIMULI}/train", f"{RUN}/stage1/config.json", f"{RUN}/stage1/state/state.pt"
WAN, MODEL = f"{TRAIN}/wan", f"{RUN}/stage2"
LATENTS, TOKENS, OFFSETS = f"{WAN}/latents-9x32x48.npy", f"{WAN}/text_tokens.npy", f"{WAN}/text_offsets.npy"
EMPTY, WEIGHTS = f"{STIMULI}/wan/empty_prompt.npy", f"{MODEL}/brain_model/model.safetensors"
CONFIG, LINES, VOXELS = f"{MODEL}/config.json", f"{MODEL}/memories.json", f"{MODEL}/voxels.npz"
BRAIN, HEADS, MOM = (f"{MODEL}/{part}/config.json" for part in PARTS)
MEMORIES, SCALE = f"{MODEL}/memories.safetensors", {"rois": 1, "tau": 1, "lambda_1": 1, "lambda_2": 1}
WHOLE, CODE = "wanted a whole .npy file: delete it and make it anew", "Python objects, which could run code"


def too_long(offsets: torch.Tensor) -> torch.Tensor:
    """The offsets of captions, the first of 13 tokens."""
    return torch.cat([offsets[:1], 13 + torch.arange(len(offsets) - 2), offsets[-1:]])


TABLE = [
    # reader, file, damage, what the error says: a regular expression
    (read_floats, "a.npy", lambda path: (npy(FLOATS)(path), half(path)), WHOLE),
    (read_floats, "a.npy", huge, WHOLE),
    (read_floats, "a.npy", npy(np.array([{}, None], object)), "found .*Python objects in dtype"),
    (read_floats, "a.npy", npy(np.array([["a"] * 4])), r"found <U1 of shape .*wanted floating.*\(any, 4\)"),
    (read_floats, "a.npy", npy(FLOATS * [1, 1, np.nan, 1]), r"found nan at \(0, 2\), wanted finite"),
    (read_floats, "absent.npy", nothing, "absent.npy is not there: delete it and make it anew"),
    (read_index, "a.npz", npz(roi=np.arange(3)), "index"),
    (read_index, "a.npz", npz(index=np.ones(3)), r"a.npz\[index\]: found float64"),
    (read_index, "a.npz", npz(index=np.array([{}], object)), CODE),
    (read_json, "a.json", raw('{"a": '), "wanted JSON"),
    (read_json, "a.json", raw('{"a": "é"}'.encode("latin-1")), "wanted a file of UTF-8 text"),
    (read_json, "a.json", raw("[1]"), r"found list \[1\], wanted an object"),
    (read_step, "a.json", raw("{}"), "found no step, wanted step as int"),
    (read_step, "a.json", raw('{"step": true}'), "found step = 'True', wanted step as int"),
    (read_number, "a.json", raw('{"x": NaN}'), "found x = nan, wanted x as a finite number"),
    (read_rows, "a.jsonl", raw('{"a": 1}\nno'), "a.jsonl, line 2: found .*, wanted JSON"),
    (read_tensors, "a.safetensors", lambda path: (TENSORS(path), half(path)), "wanted a whole .safetensors"),
    (read_tensors, "a.safetensors", tensors(w=lambda w: w / torch.arange(2)), "found NaN or infinity in w"),
    (read_pair, "a.safetensors", TENSORS, r"found b missing, wanted \(1,\)"),
    (read_point, "a.pt", lambda path: (pt({"step": 1})(path), half(path)), "wanted a checkpoint"),
    (read_point, "a.pt", pt([1]), "found a list"),
    (read_point, "a.pt", pt({"a": Pickled(Path("exploded"))}), CODE),
    # what is prepared
    (s1, f"{SUBJECT}/train/recorded.npy", Path.unlink, "recorded.npy is not there: python data.py cc2017"),
    (s1, f"{TRAIN}/clips.jsonl", text('"start_s": 2.0', '"start_s": NaN'), "line 2: found start_s = nan"),
    (s1, f"{TRAIN}/manifest.json", raw("[1]"), "manifest.json: found list .*prepare it again"),
    (s2, "models/wan/transformer/config.json", raw("null"), "wan"),
    (read_clips, f"{SUBJECT}/train/fmri.npy", array(lambda x: x[..., :-1]), "fmri.npy: .*45, any, any, 40"),
    (read_clips, f"{TRAIN}/e_img.npy", value(np.nan, (5, 1, 2)), r"e_img.npy: found nan at \(5, 1, 2\)"),
    (read_clips, f"{TRAIN}/e_txt.npy", value(np.inf), r"e_txt.npy: found inf at \(5, 0\)"),
    (read_clips, f"{TRAIN}/e_act.npy", value(np.nan), r"e_act.npy: found nan at \(5, 0\)"),
    (read_clips, f"{TRAIN}/categories.npy", value(2), "categories.npy: .*wanted 0 and 1"),
    (read_clips, f"{TRAIN}/manifest.json", text('"person"', "1"), "manifest.json: .*a list of names"),
    (read_clips, LATENTS, array(lambda y: y[:-1]), "9x32x48.npy: found float16 of shape .44, 4"),
    (read_clips, TOKENS, value(np.nan), r"text_tokens.npy: found nan at \(\d, 0\)"),
    (read_clips, OFFSETS, value(0, slice(0, 2)), "text_offsets.npy: .*numbers that rise by 1 to 12, from 0"),
    (read_clips, OFFSETS, value([0, 13, 14, 15], slice(0, 4)), "text_offsets.npy: .*that rise by 1 to 12"),
    (read_clips, EMPTY, value(np.inf), "empty_prompt.npy: found inf at"),
    (read_clips, f"{TRAIN}/captions.npy", Path.unlink, "captions.npy is not there: python data.py"),
    (read_clips, LATENTS, Path.unlink, "9x32x48.npy, .*is not there: run python data.py cc2017 .* --decoder"),
    # a run; one of other settings is never continued: what is a difference, and both values
    (command("s1again", "--dropout 0.1 --lr 1 --rank 2 --tau 1 --layers 2"), STATE, nothing, r"\(now 1.0\), rank 4 "
     r"\(now 2\) and 1 more"),
    (s1_again, STAGE1_CONFIG, setting(kernel="auto"), r"kernel 'auto' \(now None\): choose another --run"),
    (s1_again, STAGE1_CONFIG, setting(step=9), "config.json: found step = 9, wanted a step of 0 to 4"),
    (go_on, STATE, half, "state.pt: found .*delete .*stage1 and train again"),
    (go_on, STATE, state(step=0, heads=LINEAR), "state.pt: found step 0, wanted a step of 1 to 4"),
    (go_on, STATE, state(heads={"weight": ONES * torch.nan}), "state.pt: found NaN or infinity in weight"),
    (s2, STAGE1_CONFIG, without("rois"), "stage1/config.json: found no rois.*train_stage1.py"),
    (s2, STAGE1_CONFIG, setting(subject=2), "stage1: found .*'subject': 2"),
    (s2, f"{RUN}/stage1/brain_model/config.json", setting(width=36), "brain_model"),
    # a finished model, and a stranger's
    (load_run, CONFIG, raw("null"), "config.json: found NoneType null.*train stage 2 anew, or download"),
    (load_run, CONFIG, setting(decoder="/elsewhere/wan"), "found decoder = '/elsewhere/wan'.*write into"),
    (load_run, CONFIG, setting(stage1_config=SCALE), "found rois = '1', wanted rois as str or NoneType"),
    (load_run, CONFIG, setting(stage1_config=SCALE | {"rois": None, "tau": 0}), "found tau = 0"),
    (load_run, CONFIG, setting(lora_rank=8), r"found lora_rank, lora_alpha = \(8, .*wanted \(4, .*as lora/"),
    (load_run, CONFIG, setting(mom=False), "mixture_of_memories: found"),
    (load_run, CONFIG, setting(height=0), "found height = 0, wanted height at least"),
    (load_run, CONFIG, setting(height=33), "config.json: found .*does not fit"),
    (load_run, CONFIG, setting(width=48 * 10**18), "/config.json: found .*does not fit: wanted at most"),
    (load_run, CONFIG, setting(sampling_steps=10**6), "/config.json: found .*1000000"),
    (ev, CONFIG, setting(subject=2), "found a run of cc2017 sub2, wanted one of cc2017 sub1"),
    (load_run, MOM, setting(K=46), "K = 46, wanted"),
    (load_run, MOM, setting(attention_heads=5), "attention_heads = 5, wanted a divisor of 24"),
    (load_run, MOM, setting(tokens=11), "tokens = 11, wanted"),
    (load_run, MOM, without("K"), f"{MOM}: found no K"),
    (load_run, BRAIN, without("attention_heads"), f"{BRAIN}: found no attention_heads"),
    (load_run, BRAIN, setting(layers=10**6), "brain_model: found 1000000 layers and .* weights"),
    (load_run, BRAIN, setting(voxels=10**9), "brain_model/model.safetensors: found .*wanted"),
    (load_run, WEIGHTS, tensors(_=lambda w: w * torch.nan), "brain_model/model.safetensors: found NaN"),
    (load_run, WEIGHTS, tensors(more=torch.ones_like), r"found more \(2,\), wanted no such tensor"),
    (load_run, HEADS, Path.unlink, "heads/config.json is not there: train stage 2 anew"),
    (load_run, MEMORIES, tensors(empty=None), "wanted e, text_tokens, text_offsets, caption, empty"),
    (load_run, MEMORIES, tensors(e=lambda e: e[1:]), "caption: found int64 of shape"),
    (load_run, MEMORIES, tensors(e=lambda e: 2 * e[..., :4]), r"e: found .*wanted .*\(any, 3, 20\)"),
    (load_run, MEMORIES, tensors(e=lambda e: torch.cat([e[:-1], 1.01 * e[-1:]])), "rows of e .*unit vectors"),
    (load_run, MEMORIES, tensors(e=torch.Tensor.double), "found torch.float64 of e.*wanted float32 or"),
    (load_run, MEMORIES, tensors(empty=lambda x: x[:, 1:]), r"empty: found .*\(12, 16\)"),
    (load_run, MEMORIES, tensors(text_offsets=lambda o: o + (o == 0)), r"found text_offsets \[1, "),
    (load_run, MEMORIES, tensors(text_offsets=too_long), "by 12 at most"),
    (load_run, MEMORIES, tensors(caption=lambda i: i + 1), "found caption [0-9]+, wanted 0 to [0-9]+"),
    (load_run, LINES, edit(lambda rows: rows[1:]), "found 44 lines, wanted one for each of the 45 memories"),
    (load_run, LINES, edit(lambda rows: [1, *rows[1:]]), "line 0: found int 1, wanted an object"),
    (load_run, LINES, edit(lambda rows: [rows[0] | {"id": 7}, *rows[1:]]), "line 0: found id = '7'"),
    (load_run, VOXELS, npz(roi=np.array(["V1"] * 39), index=np.arange(39)), "found 39 voxels, wanted the 40"),
    (load_run, VOXELS, npz(index=np.arange(39)), "found .*39.*40.*, wanted arrays of one length"),
    (load_run, VOXELS, npz(roi=np.arange(N)), r"voxels.npz\[roi\]: found int64.*wanted text"),
    (load_run, VOXELS, npz(index=np.ones((N, 2), int)), r"npz\[index\]: found int64 of shape \(40, 2\)"),
    # what evaluate.py is given
    (command("ev", "--out x.gif"), "a.npy", nothing, "--out without --fmri or --pairs"),
    (command("fmri"), "x.npy", value(np.nan, (0, 0)), r"x.npy: found nan at \(0, 0\)"),
    (command("pairs"), "pairs/ours/0000.mp4", half, "0000"),
]  # fmt: skip
NAMES = [f"{row[1][-40:]} {row[3][:40]}" for row in TABLE]


@pytest.mark.parametrize(("read", "file", "damage", "message"), TABLE, ids=NAMES)
def test_damage_is_one_error_that_names_its_file(read, file, damage, message, world, capfd):
    with damaged(Path(file), damage):
        error = error_of(lambda: read(Path(file)), world, capfd)
    assert re.search(message, error), error


OPTIONS = {  # most are refused by their range, some beside the data or the run
    "s1": {
        "steps": "0 1.5 many", "batch_size": "0 1000", "lr": "0 nan inf -1 x", "tau": "0 1e-30", "lambda_1": "-1",
        "width": "0 25", "dropout": "1 -0.1", "seed": "-1 1180591620717411303424", "run": "../x a/b", "val_segments": "seg9",
        "rois": "nose", "subject": "0 7", "data": "mars", "optimizer": "sgd", "precision": "fp16", "stepz": "3",
    },
    "s2": {
        "batch_size": "1000", "lr_lora": "-1", "K": "0 1000", "alpha": "inf", "stage1": "absent", "noise_shift": "0",
        "condition_dropout": "1.5", "attention_heads": "0 5", "frames": "0 10", "own_captions": "2", "decoder": "absent/folder",
    },
    "ev": {
        "guidance": "-1", "clips": "0", "fps": "0 1001", "metrics": "ssim,beauty", "size": "128", "subject": "0",
        "classifier_frames": "8", "flow": "tv-l1", "processes": "0", "run": "absent",
    },
    "fmri": {"out": "x.avi"},
}  # fmt: skip
PLACES = ("run", "stage1", "decoder", "out", "data")  # the error holds what was given
OUT_OF_RANGE = [(command, *row) for command, options in OPTIONS.items() for row in options.items()]


@pytest.mark.parametrize(("command", "name", "values"), OUT_OF_RANGE)
def test_an_option_out_of_range_is_one_error(command: str, name: str, values: str, world, capfd):
    for value in values.split():
        error = error_of(lambda value=value: run(command, f"--{name}={value}"), world, capfd)
        assert (value if name in PLACES and len(value) < 100 else name).split("/")[0] in error


MAY_CHANGE = "--no-checkpointing --micro_batch 2 --precision bf16 --save_every 9 --log_every 9"
FINISHED = [("s1again", MAY_CHANGE), ("s2again", f"{MAY_CHANGE} --samples 3 --sample_every 5"), ("ev", "")]


@pytest.mark.parametrize(("command", "more"), FINISHED)
def test_a_finished_run_says_so_and_changes_nothing(command: str, more: str, world, capsys):
    files = state_of(world)
    assert not run(command, more)
    changed = {path for path, value in state_of(world).items() if files.get(path) != value}
    assert not [path for path in changed if "/eval" not in str(path)]
    assert ("is finished" in capsys.readouterr().out) == (command != "ev")


def test_two_at_once_do_not_evaluate_into_one_folder_or_video(world, capfd):
    for command, place in (("ev", f"{RUN}/eval*"), ("pairs", "pairs/metrics"), ("fmri", ".out.mp4.lock")):
        folder = next(Path().glob(place), Path(place))
        with FolderLock(folder):
            error = error_of(lambda command=command: run(command), world, capfd)
        assert f"{folder}: another process works in it" in error
