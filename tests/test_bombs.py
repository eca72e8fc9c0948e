"""No option that takes a folder or a file runs code that lies in it. Each bomb would only write a file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPO

from metrics.table import LOADERS
from prepare.cc2017 import load_pt
from prepare.viclip import ViCLIP
from support.pipelines import load_pipeline
from support.runs import BAD_INPUT
from support.videos import read_all_clips

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


AUTO = ["AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoModelForVideoClassification"]
JUDGES = {"video_classifier": "videomae", "image_classifier": "vit", "dino": "dino"}
CODES = [  # a config, the class of its code, the classes that load it; None: weights to unpickle
    ("config.json", "PreTrainedModel", AUTO),
    ("preprocessor_config.json", "BaseImageProcessor", ["AutoImageProcessor"]),
    None,
]


@pytest.fixture
def exploded(tmp_path, monkeypatch) -> Path:
    """The file that a bomb writes: not there at the end."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever says yes to everything
    yield tmp_path / "exploded"
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("option", JUDGES)
@pytest.mark.parametrize("code", CODES)
def test_no_code_of_a_judge_runs(option, code, exploded, tmp_path):
    folder = shutil.copytree(REPO / "toy" / JUDGES[option], tmp_path / "model")
    if code:
        with_code(folder, exploded, *code)
    else:
        with_pickle(folder, exploded, "model.safetensors", "pytorch_model.bin")
    try:
        LOADERS[option](str(folder), "cpu")
    except BAD_INPUT as error:
        assert "model" in str(error)


READERS = {  # of a pickle; CLIP: test_encoders.py
    "viclip.pth": ViCLIP.from_pretrained,
    "amt.pth": lambda file: LOADERS["amt"](str(file), "cpu"),
    "captions.pt": load_pt,
    "clips.pt": read_all_clips,
}


@pytest.mark.parametrize("name", READERS)
def test_no_pickle_runs(name, exploded, tmp_path):
    for value in ({"model": Pickled(exploded), "state_dict": Pickled(exploded)}, [Pickled(exploded)]):
        torch.save(value, tmp_path / name)
        try:
            READERS[name](tmp_path / name)
        except BAD_INPUT as error:
            assert name in str(error)
        except ImportError:  # vbench is an extra
            assert name == "amt.pth"


DECODER_CODE = [  # part, its config, the class of its code, the class that loads it
    ("transformer", "config.json", "PreTrainedModel", "AutoModel"),
    ("vae", "config.json", "PreTrainedModel", "AutoModel"),
    ("tokenizer", "tokenizer_config.json", "PreTrainedTokenizerFast", "AutoTokenizer"),
    (".", "model_index.json", "PreTrainedModel", "AutoModel"),
    ("weights", "", "", ""),
]


@pytest.mark.parametrize(("part", "config", "kind", "auto"), DECODER_CODE)
def test_no_code_of_a_decoder_runs(part, config, kind, auto, exploded, tiny, tmp_path):
    folder = shutil.copytree(tiny / "models" / "wan", tmp_path / "wan")
    if part == "weights":
        name = "diffusion_pytorch_model"
        with_pickle(folder / "transformer", exploded, f"{name}.safetensors", f"{name}.bin")
    else:
        with_code(folder / part, exploded, config, kind, [auto])
    if part == ".":
        value = json.loads((folder / config).read_text())
        (folder / config).write_text(json.dumps(value | {"transformer": ["bomb", "Bomb"]}))
        shutil.copy(folder / "bomb.py", folder / "transformer" / "bomb.py")
    try:
        load_pipeline(str(folder), transformer=True, vae=True, text_encoder=True)
    except ValueError as error:
        assert "wan" in str(error)


def test_the_bombs_are_bombs_and_every_judge_gets_one(tmp_path):
    torch.save({"weight": Pickled(tmp_path / "exploded")}, tmp_path / "w.bin")
    torch.load(tmp_path / "w.bin", weights_only=bool(0))
    assert (tmp_path / "exploded").exists()
    assert {*LOADERS} == {*JUDGES, "amt", "flow", "clip", "clip_large"}
