"""No option that takes a folder or a file runs code that lies in it. Each bomb would only write a file."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import REPO

from metrics.table import LOADERS
from prepare.cc2017 import load_pt
from prepare.encoders import load_clip
from prepare.viclip import ViCLIP
from support.pipelines import load_pipeline
from support.runs import BAD_INPUT
from support.videos import read_all_clips

CODE = """from pathlib import Path
Path({exploded!r}).touch()
from transformers import {kind}
class Bomb({kind}):
    pass
"""


class Pickled:
    """Unpickling it touches the file."""

    def __init__(self, exploded: Path):
        self.exploded = exploded

    def __reduce__(self):
        return (Path.touch, (self.exploded,))


AUTO = ["AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoModelForVideoClassification"]
TOKENIZER = ("tokenizer_config.json", "PreTrainedTokenizerFast", ["AutoTokenizer"])
MODEL = ("config.json", "PreTrainedModel", AUTO)
PROCESSOR = ("preprocessor_config.json", "BaseImageProcessor", ["AutoImageProcessor"])
JUDGES = {"video_classifier": "videomae", "image_classifier": "vit", "dino": "dino"}
CODE_OF = [  # what is loaded: its folder, a part of it, the part's config, the class of its code, who loads that
    *[(judge, ".", *code) for judge in JUDGES for code in (MODEL, PROCESSOR)],
    ("clip", ".", *TOKENIZER),
    ("wan", "transformer", *MODEL),
    ("wan", "vae", *MODEL),
    ("wan", "tokenizer", *TOKENIZER),
    ("wan", ".", "model_index.json", "PreTrainedModel", ["AutoModel"]),
]
WEIGHTS_OF = [(judge, "model.safetensors", "pytorch_model.bin") for judge in JUDGES]
WEIGHTS_OF += [
    ("wan", *[f"transformer/diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "bin")])
]
OF_PICKLES = [ViCLIP.from_pretrained, lambda file: LOADERS["amt"](str(file), "cpu"), load_pt, read_all_clips]


@pytest.fixture
def exploded(tmp_path, monkeypatch) -> Path:
    """The file that a bomb writes: not there at the end."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever says yes to everything
    yield tmp_path / "exploded"
    assert not (tmp_path / "exploded").exists()


@pytest.fixture
def folder(name, tiny, tmp_path) -> Path:
    """A copy of what an option takes."""
    source = tiny / "models" / "wan" if name == "wan" else REPO / "toy" / JUDGES.get(name, name)
    return shutil.copytree(source, tmp_path / name)


def load(name: str, folder: Path) -> None:
    """It may be loaded, without the code, or refused in an error that names it."""
    try:
        if name == "wan":
            load_pipeline(str(folder), transformer=True, vae=True, text_encoder=True)
        elif name == "clip":
            load_clip(f"local-dir:{folder}")
        else:
            LOADERS[name](str(folder), "cpu")
    except BAD_INPUT as error:
        assert name in str(error)


@pytest.mark.parametrize(("name", "part", "config", "kind", "loaders"), CODE_OF)
def test_no_code_of_a_folder_runs(name, part, config, kind, loaders, exploded, folder):
    file = folder / part / config
    values = json.loads(file.read_text())
    values |= {
        "model_type": "bomb",
        "architectures": ["Bomb"],
        "auto_map": dict.fromkeys(loaders, "bomb.Bomb"),
    }
    if name == "clip":
        values |= {"tokenizer_class": "Bomb", "auto_map": {"AutoTokenizer": ["bomb.Bomb", "bomb.Bomb"]}}
    if config == "model_index.json":
        values["transformer"] = ["bomb", "Bomb"]
    file.write_text(json.dumps(values))
    for place in {folder / part, folder / "transformer" if name == "wan" else folder}:
        (place / "bomb.py").write_text(CODE.format(exploded=str(exploded), kind=kind))
    load(name, folder)


@pytest.mark.parametrize(("name", "weights", "pickled"), WEIGHTS_OF)
def test_no_weights_of_a_folder_are_unpickled(name, weights, pickled, exploded, folder):
    (folder / weights).unlink()
    torch.save({"weight": Pickled(exploded)}, folder / pickled)
    load(name, folder)


@pytest.mark.parametrize("read", OF_PICKLES)
def test_no_pickle_runs(read, exploded, tmp_path):
    for value in ({"model": Pickled(exploded), "state_dict": Pickled(exploded)}, [Pickled(exploded)]):
        torch.save(value, tmp_path / "a.pt")
        with suppress(*BAD_INPUT, ImportError):  # vbench is an extra
            read(tmp_path / "a.pt")


def test_the_bombs_are_bombs_and_every_judge_gets_one(tmp_path):
    torch.save({"weight": Pickled(tmp_path / "exploded")}, tmp_path / "w.bin")
    torch.load(tmp_path / "w.bin", weights_only=bool(0))
    assert (tmp_path / "exploded").exists()
    assert {*LOADERS} == {*JUDGES, "amt", "flow", "clip", "clip_large"}
