"""extras/caption.py: each clip gets its own caption, also after a kill; a tiny Qwen2.5-VL of the real class answers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from extras import caption
from prepare.captions import read_captions
from support.videos import write_video

CHAT = (  # of one turn
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
SPECIAL = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()


@pytest.fixture
def qwen(tmp_path) -> str:
    """A folder that `from_pretrained` reads: a random Qwen2.5-VL of 0.1 M parameters, with a tokenizer of bytes."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.add_special_tokens([f"<|{name}|>" for name in SPECIAL])
    tokenizer = hf.Qwen2TokenizerFast(tokenizer_object=words, pad_token="<|endoftext|>", unk_token=None)
    start, end, image, video = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in SPECIAL])[3:]
    sizes = dict(hidden_size=32, intermediate_size=64)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    heads = dict(num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, rope_parameters=rope)
    config = hf.Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), **heads, **sizes),
        vision_config=dict(depth=2, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[1], **sizes),
        vision_start_token_id=start, vision_end_token_id=end, image_token_id=image, video_token_id=video,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.Qwen2_5_VLForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that an answer depends on what is shown
    model.save_pretrained(tmp_path)
    images, videos = Qwen2VLImageProcessor(), Qwen2VLVideoProcessor()
    hf.Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHAT).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_batch_answers_as_each_clip_alone(qwen, monkeypatch):
    """Sizes differ, so prompts do in length: what is padded, and whose frames are whose, must not matter."""
    monkeypatch.setattr(caption, "SIZE", dict.fromkeys(("shortest_edge", "longest_edge"), 112 * 112))
    captioner, rng = caption.Captioner(qwen), np.random.default_rng(0)
    clips = [rng.integers(0, 255, shape, np.uint8) for shape in ((4, 64, 64, 3), (8, 64, 128, 3))]
    questions = [caption.CAPTION, "What?"]
    together = captioner.ask(questions, clips, tokens=12)
    alone = [captioner.ask([q], [clip], tokens=12)[0] for q, clip in zip(questions, clips, strict=True)]
    assert together == alone and len(set(together)) == 2


ANSWERS = [  # what is answered to the caption of each clip of `release`; two are no list
    '["person", "dog", "person"]', "- car", "kite, bench", "[]", "Sure! A cat.", "None.", '["person", "fork"',
]  # fmt: skip
COLUMNS = {  # of each clip of `release`
    "caption": [f"clip {k}" for k in range(7)],
    "tags": ["person dog", "car", "kite bench", "", "", "", ""],
    "categories": ["animal person", "vehicle", "outdoor sports", "", "", "", ""],
    "answer": [None] * 4 + [ANSWERS[4], None, ANSWERS[6]],
    "split": ["train"] * 3 + ["test"] * 4,
    "clip": [0, 1, 2, 0, 1, 2, 3],
}


@pytest.fixture
def release(tmp_path) -> Path:
    """The toy's layout: films of three and four clips of 2 s, 8 frames each; frame t of clip k is 30 k + 3 t."""
    rows = [{"split": "train", "segment": "seg1"}] * 3 + [{"split": "test", "segment": "test1"}] * 4
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grey = (30 * np.arange(7)[:, None] + 3 * np.arange(8)).reshape(-1, 1, 1, 1)
    frames = np.broadcast_to(grey, (56, 64, 48, 3)).astype(np.uint8)
    write_video(tmp_path / "stimuli" / "seg1.mp4", frames[:24], 4)
    write_video(tmp_path / "stimuli" / "test1.mp4", frames[24:], 4)
    return tmp_path


class Model:
    """In place of Qwen: its sentence names the clip that it sees, by its grey; its list is one of ANSWERS."""

    batches: list[int] = []
    dies_after = 99  # batches

    def __init__(self, name: str):
        self.batches.clear()

    def ask(self, questions, clips=None, fps=None):
        if clips is None:
            return [ANSWERS[int(re.search(r"clip (\d)", question)[1])] for question in questions]
        self.batches.append(len(questions))
        if len(self.batches) > self.dies_after:
            raise KeyboardInterrupt
        for clip in clips:  # 5 of the 8 frames: the middles of equal parts
            steps = clip.mean((1, 2, 3)) - 30 * round(clip.mean() // 30)
            np.testing.assert_allclose(steps, [0, 6, 12, 15, 21], atol=1.5)
        return [f'"clip {int(clip.mean() // 30)}"\n' for clip in clips]


def test_each_clip_gets_its_own_caption_also_after_a_kill(release, monkeypatch):
    def run(out: Path) -> None:
        words = ["--data", "toy", "--raw", release, "--frames", 5, "--batch", 2, "--out", out]
        caption.main([str(word) for word in words])

    monkeypatch.setattr(caption, "Captioner", Model)
    full, out, part = ((release / name) for name in ("full.jsonl", "killed.jsonl", ".killed.part.jsonl"))
    run(full)
    rows = [json.loads(line) for line in open(full)]
    for name, column in COLUMNS.items():
        values = [row.get(name) for row in rows]
        assert column == [" ".join(x) if isinstance(x, list) else x for x in values], name
    assert [row["caption"] for row in read_captions(full, ["test1"])] == [f"clip {k}" for k in range(3, 7)]
    lines = full.read_bytes().splitlines(keepends=True)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Model, "dies_after", 2)
        run(out)
    assert not out.exists() and part.read_bytes() == b"".join(lines[:4])
    with open(part, "ab") as file:  # as if killed in the third batch: one line of two, and half the second
        file.write(lines[4] + lines[5][:20])
    run(out)
    assert Model.batches == [2, 1]  # the third batch again, and the last clip
    assert out.read_bytes() == full.read_bytes() and not part.exists()
    with pytest.raises(ValueError, match="is there already"):
        run(out)
