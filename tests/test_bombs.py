"""No option that takes a folder or a file runs code that lies in it. Each bomb would only write a file."""

import json
import shutil
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
WEIGHTS_OF = [*[(judge, "model.safetensors", "pytorch_model.bin") for judge in JUDGES]]
WEIGHTS_OF += [
    ("wan", *[f"transformer/diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "bin")])
]


@pytest.fixture
def exploded(tmp_path, monkeypatch) -> Path:
    """The file that a bomb writes: not there at the end."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever says yes to everything
    yield tmp_path / "exploded"
    assert not (tmp_path / "exploded").exists()


@pytest.fixture
def copied(tiny, tmp_path):
    """A copy of what an option takes."""

    def copy(name: str) -> Path:
        source = tiny / "models" / "wan" if name == "wan" else REPO / "toy" / JUDGES.get(name, name)
        return shutil.copytree(source, tmp_path / name)

    return copy


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
def test_no_code_of_a_folder_runs(name, part, config, kind, loaders, exploded, copied):
    folder = copied(name)
    with_code(folder / part, exploded, config, kind, loaders)
    values = json.loads((folder / part / config).read_text())
    if name == "clip":
        values |= {"tokenizer_class": "Bomb", "auto_map": {"AutoTokenizer": ["bomb.Bomb", "bomb.Bomb"]}}
    if config == "model_index.json":
        values["transformer"] = ["bomb", "Bomb"]
        shutil.copy(folder / "bomb.py", folder / "transformer" / "bomb.py")
    (folder / part / config).write_text(json.dumps(values))
    load(name, folder)


@pytest.mark.parametrize(("name", "weights", "pickled"), WEIGHTS_OF)
def test_no_weights_of_a_folder_are_unpickled(name, weights, pickled, exploded, copied):
    folder = copied(name)
    with_pickle(folder, exploded, weights, pickled)
    load(name, folder)


READERS = {  # of a pickle
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


def test_the_bombs_are_bombs_and_every_judge_gets_one(tmp_path):
    torch.save({"weight": Pickled(tmp_path / "exploded")}, tmp_path / "w.bin")
    torch.load(tmp_path / "w.bin", weights_only=bool(0))
    assert (tmp_path / "exploded").exists()
    assert {*LOADERS} == {*JUDGES, "amt", "flow", "clip", "clip_large"}
