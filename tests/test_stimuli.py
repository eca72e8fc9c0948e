"""What is prepared of recordings and films: each in its place, resumed where it stopped, and by one recipe."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tiny import LATENT, LENGTH, SEGMENTS, SIZE, Films as Bars, unit
from tqdm import tqdm

import prepare.decoder
from data import Clips
from prepare import stimuli
from prepare.decoder import prepare_decoder
from prepare.facts import VIDEO
from prepare.release import Release
from prepare.stimuli import encode_all, first_sentences, prepare_stimuli
from support.pipelines import load_pipeline
from support.videos import video_frames
from video_decoder import VideoDecoder


class Films(Release):
    """48 + 24 clips of 16 frames, each of one colour beside the frame's number; a clip's caption says its colour."""

    splits = {"train": ["seg1", "seg2"], "test": ["test1"]}
    asked: list[str] = []

    def window(self, segment):
        return 0, 24

    def stimulus(self, segment):
        (file := self.raw / f"{segment}.mp4").write_text(segment)
        return [file]

    def read_clips(self, segment):
        self.asked.append(segment)
        for k in range(24):
            clip = np.full((16, 1, 1, 3), colour_of(segment, k), np.uint8)
            clip[:, 0, 0, 0] = range(16)
            yield clip


def colour_of(segment: str, k: int) -> int:
    return 10 * k + int(segment[-1]) + 3 * segment.startswith("test")


def embedded(colour) -> np.ndarray:
    return unit(np.random.default_rng(0).normal(size=(256, 16)))[np.asarray(colour, int)]


@pytest.fixture
def films(tmp_path, monkeypatch) -> SimpleNamespace:
    """prepare(order of the captions), with encoders that read colours; `error` comes after two batches."""
    films = SimpleNamespace(source=Films(tmp_path, 1), captions=[], batches=[], error=None)

    def prepare(order: int = 1, clip="clip", viclip="viclip", sentences: int | None = None) -> Path:
        places = [(segment, k) for segment in films.source.segments for k in range(24)]
        captions = [f"{colour_of(*place)} dogs. They run. A cat sees Dr. Dog!" for place in places[::order]]
        rows = [{"segment": s, "caption": text} for (s, _), text in zip(places, captions, strict=True)]
        file = tmp_path / "captions.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        lists = {"train": file, "test": file}
        prepare_stimuli(films.source, tmp_path / "stimuli", lists, clip, viclip, sentences)
        return tmp_path / "stimuli"

    def encode_images(model, frames):
        if films.error and len(films.batches) == 2:
            raise films.error
        films.batches.append(len(frames))
        assert frames[0, :, 0, 0, 0].tolist() == [*range(1, 16, 2)]  # the middle ones of eight equal parts
        return embedded(frames[:, :, 0, 0, 1])

    def encode_texts(model, tokenizer, captions):
        films.captions.append(captions)
        return embedded([caption.split()[0] for caption in captions])

    films.prepare = prepare
    monkeypatch.setattr(stimuli, "encode_images", encode_images)
    monkeypatch.setattr(stimuli, "encode_actions", lambda model, clips: embedded(255 - clips[:, 0, 0, 0, 1]))
    monkeypatch.setattr(stimuli, "encode_texts", encode_texts)
    monkeypatch.setattr(stimuli, "load_clip", lambda name: (torch.nn.Identity(), {}, None))
    monkeypatch.setattr(stimuli.ViCLIP, "from_pretrained", lambda name: torch.nn.Identity())
    return films


def check_embeddings(folder: Path) -> None:
    for split, segments in Films.splits.items():
        colours = np.array([colour_of(segment, k) for segment in segments for k in range(24)])
        assert np.array_equal(np.load(folder / split / "e_img.npy"), embedded(colours)[:, None].repeat(8, 1))
        assert np.array_equal(np.load(folder / split / "e_act.npy"), embedded(255 - colours))
        assert np.array_equal(np.load(folder / split / "e_txt.npy"), embedded(colours))


@pytest.mark.filterwarnings("error")
def test_encodings_are_in_the_order_of_the_clips(films):
    folder = films.prepare()
    check_embeddings(folder)
    assert films.batches == [16, 16, 16, 16, 8]
    entry = json.loads((folder / "train" / "manifest.json").read_text())["e_img.npy"]
    assert entry["recipe"].keys() == {"clip", "viclip", "frames", "captions", "caption_sentences"}
    assert entry["inputs"].keys() == {"clip", "viclip", "seg1.mp4", "seg2.mp4"}
    assert films.captions[1][0].endswith("Dr. Dog!")
    line = json.loads((folder / "train" / "clips.jsonl").read_text().splitlines()[30])
    assert (line["id"], line["segment"], line["start_s"]) == ("seg2-006", "seg2", 12.0)
    assert line["video"] == "seg2.mp4" and line["categories"] == ["animal"]
    assert np.load(folder / "test" / "categories.npy").tolist() == [[1]] * 24
    assert "animal          48 100.000%" in (folder / "categories.txt").read_text()
    films.prepare()  # finished: nothing is encoded again
    assert len(films.batches) == 5


def test_an_encoding_that_stopped_goes_on_where_it_was(films):
    films.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        films.prepare()
    assert films.batches == [16, 16]
    films.error = None
    films.source.asked.clear()
    folder = films.prepare()
    assert films.batches == [16, 16, 16, 16, 8]  # 32 of the 48 training clips were not encoded again
    assert films.source.asked == ["seg2", "test1"]  # nor was their film read
    check_embeddings(folder)
    assert not list(folder.rglob(".*"))


def test_what_was_begun_with_other_captions_is_begun_anew(films):
    films.error = OSError(errno.ENOSPC, os.strerror(28))
    with pytest.raises(OSError, match="e_(img|act).npy: no room"):
        films.prepare()
    films.error = None
    train = films.source.raw / "stimuli" / "train"
    lines = (train / "clips.jsonl").read_text()
    with pytest.raises(ValueError, match="e_txt.npy was made with captions = .* is asked for; delete it"):
        films.prepare(-1)
    assert (train / "clips.jsonl").read_text() == lines
    (train / "e_txt.npy").unlink()
    with pytest.warns(UserWarning, match="may be in another order"):
        films.prepare(-1)
    assert films.batches == [16, 16, 16, 16, 16, 16, 8]
    for key in ("clip", "viclip"):
        with pytest.raises(ValueError, match=f"made with {key} = .*, but {key} = 'other' is asked for"):
            films.prepare(-1, **{key: "other"})


def test_the_first_sentences_of_a_caption_go_to_clip(films):
    folder = films.prepare(sentences=2)
    assert films.captions[1][0] == f"{colour_of('test1', 0)} dogs. They run."
    assert "Dr. Dog!" in (folder / "train" / "clips.jsonl").read_text()  # whole
    with pytest.raises(ValueError, match="caption_sentences = 2, but caption_sentences = None is asked for"):
        films.prepare()
    for caption, n, first in (
        ("A dog runs. A cat sits.", 5, "A dog runs. A cat sits."),
        ("Dr. Cooper and Mr. Wolowitz talk. They eat.", 1, "Dr. Cooper and Mr. Wolowitz talk."),
        ("Is it 3.5 m long? It is.", 1, "Is it 3.5 m long?"),
        ('A sign says "Stop." A car stops.', 1, 'A sign says "Stop."'),
        ('He waits. "Go." 2 cars go.', 2, 'He waits. "Go."'),
    ):
        assert first_sentences(caption, n) == first


def test_encode_all_counts_without_its_bar_and_wants_as_many_clips(monkeypatch):
    monkeypatch.setattr(stimuli, "tqdm", lambda **options: tqdm(**options, disable=True))
    (array,), counts, clips = np.zeros((1, 7)), [], [np.full((1, 1, 1, 3), k) for k in range(2, 7)]
    encode_all(iter(clips), lambda batch: [batch.mean((1, 2, 3, 4))], [array], 2, counts.append, "test", 3)
    assert array.tolist() == [0, 0, 2, 3, 4, 5, 6] and counts == [5, 7]
    encode_all(iter(()), None, [array], 7, counts.append, "test", 3)  # nothing is left to do
    with pytest.raises(ValueError, match="the films have 1 clips, wanted 7"):
        encode_all(iter(clips[:1]), lambda batch: [[1]], [array], 0, counts.append, "test", 3)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_latents_and_text_are_those_of_each_clip(tiny, name):
    folder = str(tiny / "models" / name)
    decoder = VideoDecoder(*load_pipeline(folder, vae=True, text_encoder=True), lora_rank=0)
    for split, length in LENGTH.items():
        clips = Clips("cc2017", 1, split, decoder=folder, size=SIZE, root=tiny / "data")
        films = [clip for segment in SEGMENTS[split] for clip in Bars(tiny).read_clips(segment)]
        for k in (0, length + 3, len(clips) - 1):
            video = torch.from_numpy(video_frames(films[k], *SIZE))
            np.testing.assert_allclose(clips.latents[k], decoder.encode_latents(video[None])[0], atol=2e-3)
            (tokens,) = decoder.encode_text([clips.lines[k]["caption"]])
            np.testing.assert_allclose(clips.texts[k], tokens, atol=2e-3)
        assert clips.latents.dtype == clips.texts[0].dtype == np.float16 and clips.empty.dtype == np.float32
        assert abs(clips.latents[0] - clips.latents[length + 3]).max() > 0.02  # or it says nothing
        assert clips.empty.shape == (decoder.text_length, decoder.text_width)


@pytest.fixture
def described(tiny, tmp_path):
    """prepare(...) of the tiny Wan for a copy of the tiny world's stimuli without what a decoder needs."""
    folder = tmp_path / "cc2017" / "stimuli"
    ignored = shutil.ignore_patterns("wan", "cogvideox")
    shutil.copytree(tiny / "data" / "cc2017" / "stimuli", folder, ignore=ignored)

    def prepare(size=SIZE, decoder: Path = tiny / "models" / "wan", **options) -> Path:
        prepare_decoder(Bars(tiny), folder, str(decoder), size, **options)
        return folder

    return prepare


def test_the_first_sentences_of_a_caption_go_to_the_text_encoder(described, tmp_path, monkeypatch):
    for file in tmp_path.rglob("clips.jsonl"):
        lines = [json.loads(line) for line in open(file)]
        texts = [line | {"caption": f"a red square. A {k}."} for k, line in enumerate(lines)]
        file.write_text("".join(json.dumps(line) + "\n" for line in texts))
    folder = described(sentences=1)
    offsets = np.load(folder / "train" / "wan" / "text_offsets.npy")
    assert (np.diff(offsets) == np.diff(offsets)[0]).all()  # "a red square.", all
    with pytest.raises(ValueError, match="caption_sentences = 1, but caption_sentences = None"):
        described()
    (folder / "wan" / "empty_prompt.npy").unlink()
    too_large = lambda self, texts: [torch.full((2, 16), 7e4)] * len(texts)  # noqa: E731
    monkeypatch.setattr(VideoDecoder, "encode_text", too_large)
    with pytest.raises(ValueError, match="wan/text_encoder gives NaN or values beyond float16"):
        described(sentences=1)


def test_latents_that_stopped_go_on_and_what_is_finished_is_left(described, tiny, tmp_path, monkeypatch):
    encode, calls = VideoDecoder.encode_latents, []

    def stop(self, video):
        calls.append(len(video))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, video)

    monkeypatch.setattr(VideoDecoder, "encode_latents", stop)
    with pytest.raises(KeyboardInterrupt):
        described()
    folder = described()
    assert calls == [16, 16, 13, 13, 16, 10]  # 32 of the 45 training clips are not encoded again
    for split in SEGMENTS:
        for name in ("latents-9x32x48.npy", "text_tokens.npy", "text_offsets.npy"):
            roots = folder, tiny / "data" / "cc2017" / "stimuli"
            assert np.array_equal(*(np.load(root / split / "wan" / name) for root in roots))
    (folder / "test" / "wan" / "text_offsets.npy").unlink()
    described()  # text alone
    assert len(calls) == 6 and (folder / "test" / "wan" / "text_offsets.npy").is_file()
    (tmp_path / "cc2017" / "sub1").symlink_to(tiny / "data" / "cc2017" / "sub1")
    described(smaller := (5, *SIZE[1:]))  # of another size, beside
    for size, shape in ((SIZE, (26, *LATENT)), (smaller, (26, 4, 2, *LATENT[2:]))):
        clips = Clips("cc2017", 1, "test", None, tiny / "models/wan", size, tmp_path)
        assert clips.latents.shape == shape and len(clips.texts) == 26


def test_presets_are_encoded_in_whole_frames(described, monkeypatch):
    load = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(prepare.decoder, "_load", load)
    monkeypatch.setattr(prepare.decoder, "is_made_for", lambda file, recipe: "latents" not in file.name)
    for size in (VIDEO["cc2017"], (81, 720, 1280)):
        with pytest.raises(KeyboardInterrupt):
            described(size)
    assert [call.kwargs["tiling"] for call in load.call_args_list] == [False, True]
