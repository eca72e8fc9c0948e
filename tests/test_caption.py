"""extras/caption.py: each clip gets its own caption, also after a kill; answers, good and malformed, are read; a tiny
Qwen2.5-VL of the real class looks at the right frames."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from extras import caption
from prepare.captions import read_captions
from support.videos import write_video

CHAT = (  # as Qwen2.5-VL's, for one turn
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
ANSWERS = [  # what is answered to the caption of each clip of `release`; two are no list
    '["person", "dog"]', "- car", "kite, bench", "[]", "Sure! A cat.", '["kite", "unicorn"]', '["person", "fork"',
]  # fmt: skip


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A folder that `from_pretrained` reads: a random Qwen2.5-VL of 0.1 M parameters, with a tokenizer of bytes."""
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    folder = tmp_path_factory.mktemp("qwen")
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([f"<|{name}|>" for name in SPECIAL])
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    tokenizer = hf.Qwen2TokenizerFast(tokenizer_object=words, **ends)
    pad, _, end, *others, video = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in SPECIAL])
    sizes = dict(hidden_size=32, intermediate_size=64)
    text = dict(
        vocab_size=len(tokenizer), num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        eos_token_id=end, pad_token_id=pad, bos_token_id=pad,
    )  # fmt: skip
    vision = dict(depth=2, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[1])
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id")
    special = dict(zip(names, others, strict=True), video_token_id=video)
    config = hf.Qwen2_5_VLConfig(text_config=text | sizes, vision_config=vision | sizes, **special)
    torch.manual_seed(0)
    model = hf.Qwen2_5_VLForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that an answer depends on what is shown
    model.save_pretrained(folder)
    images, videos = Qwen2VLImageProcessor(), Qwen2VLVideoProcessor()
    hf.Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHAT).save_pretrained(folder)
    return folder


def test_a_batch_answers_as_each_clip_alone(qwen, monkeypatch):
    """Sizes differ, so prompts do in length: what is padded, and whose frames are whose, must not matter."""
    monkeypatch.setattr(caption, "SIZE", dict.fromkeys(("shortest_edge", "longest_edge"), 112 * 112))
    captioner, rng = caption.Captioner(str(qwen)), np.random.default_rng(0)
    shapes = ((4, 64, 64, 3), (8, 64, 128, 3), (4, 128, 64, 3))
    clips = [rng.integers(0, 255, shape, np.uint8) for shape in shapes]
    questions = [caption.CAPTION, "What?", caption.CAPTION]
    together = captioner.ask(questions, clips, tokens=12)
    alone = [captioner.ask([q], [clip], tokens=12)[0] for q, clip in zip(questions, clips, strict=True)]
    assert together == alone and len(set(together)) == 3
    assert not any(answer.startswith("\n") for answer in together)  # as the question ends
    backwards = clips[0][::-1].copy()
    assert captioner.ask(questions[:1], [backwards], tokens=12) != together[:1]


def grey_film(file: Path, first: int, clips: int) -> None:
    """Clips of 2 s, 8 frames each; frame t of clip k is 30 k + 3 t."""
    grey = (30 * np.arange(first, first + clips)[:, None] + 3 * np.arange(8)).reshape(-1, 1, 1, 1)
    write_video(file, np.broadcast_to(grey, (8 * clips, 64, 48, 3)).astype(np.uint8), 4)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """The toy's layout: films of three and four clips."""
    folder = tmp_path_factory.mktemp("release")
    rows = [{"split": "train", "segment": "seg1"}] * 3 + [{"split": "test", "segment": "test1"}] * 4
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grey_film(folder / "stimuli" / "seg1.mp4", 0, 3)
    grey_film(folder / "stimuli" / "test1.mp4", 3, 4)
    return folder


class Model:
    """In place of Qwen: its sentence names the clip that it sees, by its grey; its list is one of ANSWERS."""

    batches: list[int] = []
    dies_after = 99  # batches

    def __init__(self, name: str):
        assert name == "grey"

    def ask(self, questions, clips=None, fps=None):
        if clips is None:
            return [ANSWERS[int(re.search(r"clip (\d)", question)[1])] for question in questions]
        Model.batches.append(len(questions))
        if len(Model.batches) > Model.dies_after:
            raise KeyboardInterrupt
        assert set(questions) == {caption.CAPTION} and fps == 2.5
        for clip in clips:  # 5 of the 8 frames: the middles of equal parts
            steps = clip.mean((1, 2, 3)) - 30 * round(clip.mean() // 30)
            np.testing.assert_allclose(steps, [0, 6, 12, 15, 21], atol=1.5)
        return [f'"clip {int(clip.mean() // 30)}"\n' for clip in clips]


@pytest.fixture(autouse=True)
def model(request, monkeypatch):
    if "qwen" not in request.fixturenames:
        monkeypatch.setattr(caption, "Captioner", Model)
    monkeypatch.setattr(Model, "batches", [])


def run(*words: object) -> None:
    caption.main([str(word) for word in ["--frames", 5, "--batch", 2, "--model", "grey", *words]])


COLUMNS = {  # of each clip of `release`
    "caption": [f"clip {k}" for k in range(7)],
    "tags": ["person dog", "car", "kite bench", "", "", "kite unicorn", ""],
    "categories": ["animal person", "vehicle", "outdoor sports", "", "", "sports", ""],
    "answer": [None] * 4 + [ANSWERS[4], None, ANSWERS[6]],
    "split": ["train"] * 3 + ["test"] * 4,
    "clip": [0, 1, 2, 0, 1, 2, 3],
}


def test_each_clip_gets_its_own_caption_also_after_a_kill(release, tmp_path, monkeypatch):
    source = ("--data", "toy", "--raw", release, "--out")
    full, out, part = ((tmp_path / name) for name in ("full.jsonl", "killed.jsonl", ".killed.part.jsonl"))
    run(*source, full)
    rows = [json.loads(line) for line in open(full)]
    for name, column in COLUMNS.items():
        values = [row.get(name) for row in rows]
        assert column == [" ".join(x) if isinstance(x, list) else x for x in values], name
    assert [row["caption"] for row in read_captions(full, ["test1"])] == [f"clip {k}" for k in range(3, 7)]
    lines = full.read_bytes().splitlines(keepends=True)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Model, "batches", [])
        patched.setattr(Model, "dies_after", 2)
        run(*source, out)
    assert not out.exists() and part.read_bytes() == b"".join(lines[:4])
    with open(part, "ab") as file:  # as if killed in the third batch: one line of two, and half the second
        file.write(lines[4] + lines[5][:20])
    stopped = part.read_bytes()
    with pytest.raises(ValueError, match=r"made with frames 5 \(now 6\): delete .*killed.part.jsonl"):
        run(*source, out, "--frames", 6)
    assert part.read_bytes() == stopped
    Model.batches.clear()
    run(*source, out)
    assert Model.batches == [2, 1]  # the third batch again, and the last clip
    assert out.read_bytes() == full.read_bytes() and not part.exists()
    with pytest.raises(ValueError, match="is there already"):
        run(*source, out)


def test_videos_become_a_list_by_name(release, tmp_path):
    """As CineBrain's captions are found: by the video's name, in one list."""
    run("--videos", release / "stimuli" / "*.mp4", "--seconds", 2, "--out", tmp_path / "captions.json")
    rows = read_captions(tmp_path / "captions.json", [])
    assert [row["caption"] for row in rows] == COLUMNS["caption"]
    assert [row["video"] for row in rows] == ["seg1.mp4"] * 3 + ["test1.mp4"] * 4
    assert "clip" not in rows[0] and not list(tmp_path.glob(".*"))
    films = caption.films_of_videos(str(release / "stimuli"), None)
    assert [(film.segment, film.clips, film.seconds) for film in films] == [("seg1", 1, 6), ("test1", 1, 8)]


def test_answers():
    for answer in ('["person", 2]', '{"objects": ["cat"]}', "", "cat\ndog", ", ".join(["cat"] * 21)):
        assert caption.parse_objects(answer) is None, answer
    for answer, names in {
        " None. ": [],
        '```json\n["person", "Traffic Light", "person"]\n```': ["person", "traffic light"],
        "- a person\n2. the dog\n": ["person", "dog"],
        "person, car, fire hydrant.": ["person", "car", "fire hydrant"],
    }.items():
        assert caption.parse_objects(answer) == names, answer


def test_a_release_without_films_and_options_that_do_not_fit_are_refused(tmp_path):
    for words, message in {
        f"--data cc2017 --raw {tmp_path}": "stimuli/seg1.mp4 is not there: download it again",
        "": "give one of --data and --videos",
        "--videos x --out y.txt": "--out y.txt: wanted a name that ends in .jsonl, or .json for --videos",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            caption.main(words.split())
    assert not list(tmp_path.iterdir())
