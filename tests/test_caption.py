"""extras/caption.py: a tiny Qwen2.5-VL of the real class captions films, goes on after a kill; answers, good
and malformed, are read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO

from extras import caption
from prepare.captions import read_captions
from prepare.categories import COCO, clip_categories
from support.videos import uniform_frames, write_video
from toy import world

CC2017 = REPO.parent / "shared" / "data" / "cc2017"
CHAT = (  # as Qwen2.5-VL's, for one turn
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A folder that `from_pretrained` reads: a random Qwen2.5-VL of 0.1 M parameters and its processor, with
    a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2TokenizerFast,
    )
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    folder = tmp_path_factory.mktemp("qwen")
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    tokenizer.add_special_tokens(special)
    fast = Qwen2TokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    ids = dict(zip(special, fast.convert_tokens_to_ids(special), strict=True))
    text = {
        "vocab_size": len(fast),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text |= {
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    text |= {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    tokens = {f"{kind}_token_id": ids[f"<|{kind}_pad|>"] for kind in ("image", "video")}
    tokens |= {f"vision_{end}_token_id": ids[f"<|vision_{end}|>"] for end in ("start", "end")}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that an answer depends on what is shown
    model.save_pretrained(folder)
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), fast, Qwen2VLVideoProcessor(), chat_template=CHAT
    )
    processor.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- the model


def frames(n: int, height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (n, height, width, 3), np.uint8)


def test_a_batch_answers_as_each_clip_alone(qwen):
    """Sizes differ, so prompts do in length: what is padded, and whose frames are whose, must not matter."""
    captioner = caption.Captioner(str(qwen), 112 * 112)
    clips = [frames(4, 64, 64, 0), frames(8, 64, 128, 1), frames(4, 128, 64, 2)]
    questions = [caption.CAPTION, "What?", caption.CAPTION]
    together = captioner.ask(questions, clips, tokens=12)
    assert together == [
        captioner.ask([q], [clip], tokens=12)[0] for q, clip in zip(questions, clips, strict=True)
    ]
    assert len(set(together)) == 3 and together == captioner.ask(questions, clips, tokens=12)
    assert (
        captioner.ask(questions[:1], [clips[0][::-1].copy()], tokens=12) != together[:1]
    )  # the order of frames is seen
    assert (
        captioner.ask(["a", "a longer question"], tokens=8)[0] == captioner.ask(["a"], tokens=8)[0]
    )  # without a video


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """Two films of four and three clips, in the toy world's layout."""
    folder = tmp_path_factory.mktemp("release")
    (folder / "stimuli").mkdir()
    films = {"seg1": ("train", 4), "test1": ("test", 3)}
    with open(folder / "captions.jsonl", "w") as file:
        for segment, (split, n) in films.items():
            clips = world.film(split, 0)[:n]
            write_video(
                folder / "stimuli" / f"{segment}.mp4",
                np.concatenate([world.render(clip) for clip in clips]),
                8.5,
            )
            file.write(
                "".join(json.dumps({"split": split, "segment": segment, "clip": i}) + "\n" for i in range(n))
            )
    return folder


def run(release: Path, out: Path, qwen: Path, *more: object) -> None:
    sizes = ["--frames", 4, "--pixels", 56 * 56, "--batch", 2]
    options = ["--data", "toy", "--raw", release, "--out", out, "--model", qwen, *sizes, *more]
    caption.main([str(word) for word in options])


def test_a_run_that_was_killed_ends_as_one_that_was_not(release, qwen, tmp_path, monkeypatch, capsys):
    run(release, tmp_path / "whole.jsonl", qwen)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [(row["segment"], row["clip"], row["split"]) for row in rows] == [
        *(("seg1", k, "train") for k in range(4)),
        *(("test1", k, "test") for k in range(3)),
    ]
    assert all(row["by"] == str(qwen) for row in rows) and len({row["caption"] for row in rows}) > 1
    assert all(
        row["categories_by"] == "rules" and row["answer"] and row["tags"] == [] for row in rows
    )  # noise is no list of names
    assert "7 answers were no list of names" in capsys.readouterr().out
    told = read_captions(tmp_path / "whole.jsonl", ["test1"])
    assert [row["clip"] for row in told] == [0, 1, 2] and {"caption", "tags"} <= set(told[0])

    ask, calls = caption.Captioner.ask, []

    def killed_in_the_third_batch(self, *args, **kwargs):
        calls.append(len(args[0]))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return ask(self, *args, **kwargs)

    out, part = tmp_path / "killed.jsonl", tmp_path / ".killed.part.jsonl"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(caption.Captioner, "ask", killed_in_the_third_batch)
        run(release, out, qwen)
    assert not out.exists() and part.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    with open(
        part, "ab"
    ) as file:  # as if killed while the third batch was written: one line of two, and half the other
        file.write(whole.splitlines(keepends=True)[4] + whole.splitlines(keepends=True)[5][:20])
    with pytest.raises(
        ValueError, match=r"part.jsonl was begun with frames = 4, but frames = 6 is asked for; delete it"
    ):
        run(release, out, qwen, "--frames", 6)
    with monkeypatch.context() as patched:
        patched.setattr(
            caption.Captioner, "ask", lambda self, *a, **k: calls.append(len(a[0])) or ask(self, *a, **k)
        )
        calls.clear()
        run(release, out, qwen)
    assert out.read_bytes() == whole and not part.exists()
    assert calls == [2, 2, 1, 1]  # the third batch again, and the last clip
    with pytest.raises(ValueError, match="is there already"):
        run(release, out, qwen)


def test_recorded_answers_become_the_lines_that_data_reads(release, tmp_path, monkeypatch, capsys):
    captions = [
        "a man walks a dog",
        "two cars",
        "a kite over a beach",
        "clouds",
        '"A cat."\n',
        "a bat in a cave",
        "people dining",
    ]
    answers = [
        '["person", "dog"]',
        "- car\n- car",
        "kite, bench",
        "[]",
        "Sure! The caption names a cat.",
        '["bat"]',
        '["person", "fork"',
    ]
    recorded = iter(zip(captions, answers, strict=True))

    class Recorded:
        def __init__(self, name: str, pixels: int):
            self.waiting: list[str] = []

        def ask(self, questions, clips=None, fps=None):
            if clips is None:
                assert all(one in question for one, question in zip(self.captions, questions, strict=True))
                return self.waiting
            assert (
                len(clips) == len(questions)
                and fps == 2.0
                and all(clip.shape == (4, 64, 64, 3) for clip in clips)
            )
            self.captions, self.waiting = map(list, zip(*(next(recorded) for _ in questions), strict=True))
            self.captions = [one.strip() for one in self.captions]
            return self.captions

    monkeypatch.setattr(caption, "Captioner", Recorded)
    run(release, tmp_path / "captions.jsonl", "recorded")
    rows = read_captions(tmp_path / "captions.jsonl", ["seg1", "test1"])
    assert [row["tags"] for row in rows] == [
        ["person", "dog"],
        ["car"],
        ["kite", "bench"],
        [],
        [],
        ["bat"],
        [],
    ]
    found = ["animal person", "vehicle", "outdoor sports", "", "animal", "animal", "person"]
    assert [" ".join(row["categories"]) for row in rows] == found
    assert [row.get("answer") for row in rows] == [None] * 4 + [answers[4], None, answers[6]]
    assert (
        rows[4]["caption"] == "A cat."
        and rows[4]["categories_by"] == "rules"
        and "categories_by" not in rows[0]
    )
    said = capsys.readouterr().out
    assert "2 answers were no list of names" in said and "animal           3" in said


def test_videos_of_a_clip_each_become_a_list_by_name(release, tmp_path, monkeypatch):
    """As CineBrain's captions are found: by the video's name, in one list."""

    class Recorded:
        def __init__(self, name: str, pixels: int):
            pass

        def ask(self, questions, clips=None, fps=None):
            return ["two cats"] if clips else ['["cat"]']

    monkeypatch.setattr(caption, "Captioner", Recorded)
    out = tmp_path / "captions.json"
    caption.main(["--videos", str(release / "stimuli" / "*.mp4"), "--out", str(out), "--batch", "1"])
    rows = read_captions(out, [])
    assert [(row["video"], row["caption"], row["tags"]) for row in rows] == [
        (f"{n}.mp4", "two cats", ["cat"]) for n in ("seg1", "test1")
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["captions.json", "captions.recipe.json"]


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ('["person", "Traffic Light", "person"]', ["person", "traffic light"]),
        ('```json\n["cat"]\n```', ["cat"]),
        ('```\n["cat", "dog"]```', ["cat", "dog"]),
        ("[]", []),
        (" None. ", []),
        ("no objects", []),
        ("- a person\n- the dog\n", ["person", "dog"]),
        ("* person\n\n• **cell phone**", ["person", "cell phone"]),
        ("1. person\n2) tennis racket", ["person", "tennis racket"]),
        ("person, car, fire hydrant.", ["person", "car", "fire hydrant"]),
        ("Person", ["person"]),
        ('["person", "car"', None),  # cut off
        ('["person", 2]', None),
        ('[{"name": "cat"}]', None),
        ('{"objects": ["cat"]}', None),
        ('["<|im_end|>"]', None),
        ('[""]', None),
        ("", None),
        ("The caption names a cat and a dog.", None),
        ("I am sorry, but I cannot see it", None),
        ("Objects:\n- cat", None),
        ("cat\ndog", None),
        ("a cat,\na dog", None),
        (json.dumps([name for names in COCO.values() for name in names]), None),  # the list recited
        ("- " + " word" * 40, None),
    ],
)
def test_answers(answer, names):
    assert caption.parse_objects(answer) == names


# ---------------------------------------------------------------- which clips, and the fallback


def test_videos_a_clip_each_or_cut(release, tmp_path):
    stimuli = release / "stimuli"

    def found(videos: Path = stimuli, seconds: float | None = None) -> list[tuple]:
        films = caption.films_of(caption.Config(videos=str(videos), seconds=seconds))
        return [(film.segment, film.clips, round(film.seconds, 2)) for film in films]

    assert found() == [("seg1", 1, 8.0), ("test1", 1, 6.0)]
    assert found(seconds=2.0) == [("seg1", 4, 2.0), ("test1", 3, 2.0)]
    assert found(stimuli / "t*.mp4") == found(stimuli / "test1.mp4")
    shown = list(caption.clips_from([caption.Film("seg1", None, stimuli / "seg1.mp4", 4, 2.0)], 2, 4))
    wanted = [world.render(clip)[uniform_frames(17, 4)] for clip in world.film("train", 0)[2:4]]
    assert [k for _, k, _ in shown] == [2, 3]
    assert all(
        abs(got.astype(int) - want).mean() < 4 for (_, _, got), want in zip(shown, wanted, strict=True)
    )
    with pytest.raises(FileNotFoundError, match=r"no video of 60.0 s or more"):
        found(seconds=60.0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        found(tmp_path / "nowhere")


def test_cc2017s_films(tmp_path):
    args = caption.Config(data="cc2017", raw=tmp_path, train_segments=2, test_segments=1)
    (tmp_path / "stimuli").mkdir()
    for name in ("seg1", "seg2"):
        (tmp_path / "stimuli" / f"{name}.mp4").touch()
    with pytest.raises(FileNotFoundError, match=r"stimuli/test1.mp4 not there: download it"):
        caption.films_of(args)
    (tmp_path / "stimuli" / "test1.mp4").touch()
    films = [(film.segment, film.split, film.clips) for film in caption.films_of(args)]
    assert films == [("seg1", "train", 240), ("seg2", "train", 240), ("test1", "test", 240)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give one of --data, --videos and --rules"),
        (
            ["--rules", "a.json", "b.json", "c.json", "--out", "d.jsonl"],
            "the training and the test list; 3 files are given",
        ),
        (["--data", "cc2017"], "wants --raw"),
        (["--videos", "x"], "--out says where"),
        (["--videos", "x", "--out", "y.json", "--batch", "0"], "--batch 0: wanted at least 1"),
        (["--data", "cc2017", "--raw", "x", "--out", "y.json"], "wanted a name that ends in .jsonl"),
    ],
)
def test_wrong_options(options, said, capsys):
    with pytest.raises((SystemExit, ValueError)) as stopped:
        caption.main(options)
    assert said in f"{stopped.value} {capsys.readouterr().err}"


def test_the_rules_say_that_they_are_rules(tmp_path, capsys):
    lists = [tmp_path / "train.json", tmp_path / "test.json"]
    lists[0].write_text(
        json.dumps(["a dog on a bench"] * 240 + [{"caption": "a man", "tags": ["man", "kite"]}] * 240)
    )
    lists[1].write_text(json.dumps(["clouds"] * 240))
    caption.main(["--rules", *map(str, lists), "--out", str(tmp_path / "rules.jsonl")])
    said = capsys.readouterr()
    assert "no model has looked at any frame" in said.out + said.err
    rows = [json.loads(line) for line in open(tmp_path / "rules.jsonl")]
    assert {row["by"] for row in rows} == {"rules"} and [rows[i]["segment"] for i in (0, 240, 480)] == [
        "seg1",
        "seg2",
        "test1",
    ]
    assert (
        rows[0]["categories"] == ["animal", "outdoor"]
        and rows[240]["categories"] == ["person", "sports"]
        and rows[-1]["clip"] == 239
    )
    caption.main(["--rules", str(tmp_path / "rules.jsonl"), "--out", str(tmp_path / "again.jsonl")])
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "rules.jsonl").read_bytes()
    lists[0].write_text(json.dumps(["a dog"] * 239))
    with pytest.raises(ValueError, match="239 captions, wanted a multiple of 240"):
        caption.main(["--rules", str(lists[0]), "--out", str(tmp_path / "new.jsonl")])
    assert not list(tmp_path.glob("*new*")) and not list(tmp_path.glob(".*"))


@pytest.mark.skipif(not CC2017.is_dir(), reason="the public captions are not there")
def test_public_tags_as_answers_give_the_categories_of_the_public_file():
    """The file path (read_captions of a NEURONS-like list) and the caption path (tags as a model's answers),
    all 5,520 clips."""
    rng, film = np.random.default_rng(0), caption.Film("seg1", "train", Path("seg1.mp4"), 240, 2.0)
    write = [
        json.dumps,
        lambda tags: f"```json\n{json.dumps(tags)}\n```",
        lambda tags: "\n".join(f"- {tag}" for tag in tags),
        ", ".join,
    ]
    for split, n in (("train", 4320), ("test", 1200)):
        rows = read_captions(CC2017 / f"captions_{split}.json", [])
        assert len(rows) == n
        for k, row in enumerate(rows):
            tags = [tag for tag in row["tags"] if tag]  # nine clips have one empty tag
            answer = write[rng.integers(4)](tags) if tags else "[]"
            new = caption.answered_row(film, k, row["caption"], answer, "recorded")
            assert (
                new["categories"] == clip_categories(row["caption"], row["tags"]) and "answer" not in new
            ), (row, answer)
