"""No option that takes a folder or a file runs code that lies in it. Each bomb would only write a file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPO
from tiny import wan_pipeline

from metrics.table import LOADERS, Judging
from prepare.cc2017 import load_pt
from prepare.viclip import ViCLIP
from support.pipelines import load_pipeline
from support.runs import BAD_INPUT
from support.videos import read_all_clips

TOY = REPO / "toy"
CODE = """from pathlib import Path
Path({exploded!r}).touch()
from transformers import {kinds}
class Bomb({kinds}):
    pass
"""


class Pickled:
    """Unpickling it touches the file."""

    def __init__(self, exploded: Path):
        self.exploded = exploded

    def __reduce__(self):
        return (Path.touch, (self.exploded,))


def with_code(folder: Path, exploded: Path, config: str, kind: str, names: list[str]) -> None:
    """The folder's config asks for a class of a file beside it."""
    (folder / "bomb.py").write_text(CODE.format(exploded=str(exploded), kinds=kind))
    value = json.loads((folder / config).read_text())
    value |= {"auto_map": dict.fromkeys(names, "bomb.Bomb"), "model_type": "bomb", "architectures": ["Bomb"]}
    (folder / config).write_text(json.dumps(value))


def with_pickle(folder: Path, exploded: Path, weights: str, pickled: str) -> None:
    """Weights that need unpickling in place of the safetensors."""
    (folder / weights).unlink()
    torch.save({"weight": Pickled(exploded)}, folder / pickled)


def judge(option: str) -> Callable[[Path], object]:
    return lambda folder: LOADERS[option](str(folder), "cpu")


AUTO = ["AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoModelForVideoClassification"]
CASES = {
    f"{option}, {how}": (toy, plant, judge(option))
    for option, toy in (("video_classifier", "videomae"), ("image_classifier", "vit"), ("dino", "dino"))
    for how, plant in (
        ("code", lambda folder, exploded: with_code(folder, exploded, "config.json", "PreTrainedModel", AUTO)),
        ("code of its processor", lambda folder, exploded: with_code(
            folder, exploded, "preprocessor_config.json", "BaseImageProcessor", ["AutoImageProcessor"])),
        ("pickle", lambda folder, exploded: with_pickle(folder, exploded, "model.safetensors", "pytorch_model.bin")),
    )
} | {
    "viclip, pickle": ("viclip", lambda folder, exploded: torch.save({"model": Pickled(exploded)}, folder / "w.pth"),
                       lambda folder: ViCLIP.from_pretrained(folder / "w.pth")),
    "amt, pickle": ("dino", lambda folder, exploded: torch.save({"state_dict": Pickled(exploded)}, folder / "amt.pth"),
                    lambda folder: LOADERS["amt"](str(folder / "amt.pth"), "cpu")),
    "captions, pickle": ("dino", lambda folder, exploded: torch.save([Pickled(exploded)], folder / "c.pt"),
                         lambda folder: load_pt(folder / "c.pt")),
    "clips, pickle": ("dino", lambda folder, exploded: torch.save([Pickled(exploded)], folder / "c.pt"),
                      lambda folder: read_all_clips(folder / "c.pt")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_no_code_of_a_folder_runs(case: str, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever says yes to everything
    toy, plant, load = CASES[case]
    folder, exploded = tmp_path / "model", tmp_path / "exploded"
    shutil.copytree(TOY / toy, folder)
    plant(folder, exploded)
    try:
        load(folder)
    except BAD_INPUT as error:
        assert "model" in str(error)
    except ImportError:  # vbench is an extra
        assert case.startswith("amt")
    assert not exploded.exists()


@pytest.mark.parametrize("part", ["transformer", "vae", "tokenizer", "index", "weights"])
def test_no_code_of_a_decoder_runs(part: str, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    torch.manual_seed(0)
    folder, exploded = tmp_path / "wan", tmp_path / "exploded"
    wan_pipeline().save_pretrained(folder)
    if part in ("transformer", "vae"):
        with_code(folder / part, exploded, "config.json", "PreTrainedModel", ["AutoModel"])
    elif part == "tokenizer":
        with_code(
            folder / part, exploded, "tokenizer_config.json", "PreTrainedTokenizerFast", ["AutoTokenizer"]
        )
    elif part == "index":
        with_code(folder, exploded, "model_index.json", "PreTrainedModel", ["AutoModel"])
        value = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(value | {"transformer": ["bomb", "Bomb"]}))
        shutil.copy(folder / "bomb.py", folder / "transformer" / "bomb.py")
    else:
        with_pickle(
            folder / "transformer",
            exploded,
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.bin",
        )
    try:
        load_pipeline(str(folder), transformer=True, vae=True, text_encoder=True)
    except ValueError as error:
        assert "wan" in str(error)
    assert not exploded.exists()


def test_every_judge_that_takes_a_folder_is_among_them():
    takes = {name for name in LOADERS if name not in ("flow", "clip", "clip_large")}  # CLIP: test_encoders.py
    assert takes <= {case.split(",")[0] for case in CASES}
    assert all(hasattr(Judging(), name) for name in takes)


def test_the_bombs_are_bombs(tmp_path):
    torch.save({"weight": Pickled(tmp_path / "exploded")}, tmp_path / "w.bin")
    torch.load(tmp_path / "w.bin", weights_only=bool(0))
    assert (tmp_path / "exploded").exists()
