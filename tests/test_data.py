"""The clips of a subject and the batch of a step: what belongs to which clip, what is drawn. Damage: test_faults.py."""

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import environment
from tiny import AREAS, CLASSES, LATENT, SIZE

from data import Batch, Clips, memories, noise_generator, rng
from prepare.copies import prepare_recorded
from support.files import MissingData


def clips_of(root: Path, split: str = "train", decoder: str | None = None, size=SIZE, **options) -> Clips:
    """With decoder="wan" also what stage 2 reads."""
    folder = str(root / "models" / decoder) if decoder else None
    return Clips("cc2017", 1, split, decoder=folder, size=size, root=root / "data", **options)


@pytest.fixture
def read(tiny):
    return partial(clips_of, tiny)


@pytest.fixture
def copied(tiny, tmp_path):
    """Clips of a copy of the tiny world, to change; the folder of its data set."""
    shutil.copytree(tiny / "data", tmp_path / "data", ignore=shutil.ignore_patterns("raw"))
    (tmp_path / "models").symlink_to(tiny / "models")
    return partial(clips_of, tmp_path, decoder="wan"), tmp_path / "data" / "cc2017"


@pytest.fixture
def stored(tiny):
    return lambda name: np.load(tiny / "data" / "cc2017" / name)


FMRI, TRAIN = "sub1/train/fmri.npy", "stimuli/train"


@pytest.fixture
def recurring(copied):
    """Clips i, i + 20 and i + 40, all of other segments, have one caption."""
    read, folder = copied
    np.save(folder / TRAIN / "captions.npy", np.arange(45) % 20)
    return read


def joined(parts: list[Batch]) -> Batch:
    return Batch(*(None if fields[0] is None else torch.cat(fields) for fields in zip(*parts, strict=True)))


def equal(a: Batch, b: Batch) -> bool:
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_clips_read_what_was_prepared(read):
    train, test = read(), read("test")
    assert (len(train), len(test)) == (45, 26) and test.recall is None and test.trained is None
    assert train.sizes == {"volumes": 2, "voxels": 40, "frames": 5, "embed_dim": 20, "classes": 4}
    assert train.classes == CLASSES and train.lines[17]["id"] == "seg2-002"
    assert train.recorded.sum() == 45 + 30 and not train.recorded[30:, 1].any()
    assert test.recorded.shape == (26, 3) and test.recorded.all()
    assert test.held_out.tolist() == [*range(26)] and len(train.held_out) == 0
    assert train.index.tolist() == [*range(0, 280, 7)] and train.roi[:5].tolist() == AREAS
    assert train.latents is None


def test_a_batch_has_one_recorded_showing_of_each_clip_and_the_targets_of_that_clip(read, stored):
    train, fmri = read(batch_size=9), stored(FMRI)
    count = np.zeros((45, 2), int)
    for step in range(300):
        batch = train.batch(step)
        assert batch.x.shape == (9, 2, 40) and batch.excluded is None
        for x, clip in zip(batch.x.numpy(), batch.clips.tolist(), strict=True):
            (showing,) = (k for k in (0, 1) if np.array_equal(x, fmri[clip, k]))
            count[clip, showing] += 1
        for name in ("e_img", "e_txt", "e_act", "categories"):
            assert np.array_equal(getattr(batch, name), stored(f"{TRAIN}/{name}.npy")[batch.clips])
    assert (count.sum(1) == 60).all() and (count[:30] > 15).all()  # both showings, about as often
    assert (count[30:, 1] == 0).all()  # shown twice, but recorded once


def test_processes_and_parts_share_a_batch_without_overlap(read):
    for decoder in (None, "wan"):
        train = read(decoder=decoder, batch_size=15, voxel_dropout=0.5, condition_dropout=0.5)
        shares = [train.batch(5, process, 5) for process in range(5)]
        assert equal(train.batch(5), joined(shares)) and {len(share.x) for share in shares} == {3}
        assert len({*joined(shares).clips.tolist()}) == 15
    batch = read(batch_size=8).batch(0)
    assert batch.parts(None) == [slice(0, 8)] and batch.parts(5) == [slice(0, 5), slice(5, 10)]
    moved = batch.to("meta")
    assert {field.device.type for field in moved[:6]} == {"meta"} and moved.y is None


def test_an_epoch_shows_each_clip_once_in_an_order_of_seed_and_epoch(read):
    train, left = read(batch_size=9), set()
    epochs = [[train.clips_of_step(5 * epoch + k) for k in range(5)] for epoch in range(3)]
    assert all(sorted(np.concatenate(epoch)) == [*range(45)] for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[0][0], np.arange(9))
    assert not np.array_equal(read(batch_size=9, seed=1).clips_of_step(0), epochs[0][0])
    assert np.array_equal(read(batch_size=9).clips_of_step(7), epochs[1][2])
    train = read(batch_size=20)  # another remainder is left out in each epoch
    for epoch in range(60):
        clips = np.concatenate([train.clips_of_step(2 * epoch + k) for k in range(2)])
        assert len(set(clips)) == 40
        left |= {*range(45)} - set(clips)
    assert left == {*range(45)}
    with pytest.raises(ValueError, match="a batch of 46 clips, but only 45 .* smaller --batch_size"):
        read(batch_size=46)


def test_no_clip_of_held_out_segments_is_drawn(read):
    train, everything = read(val_segments="seg2", batch_size=4), read(val_segments="")
    drawn = {clip for step in range(40) for clip in train.batch(step).clips.tolist()}
    assert drawn == {*train.trained.tolist()} and not drawn & {*range(15, 30)}
    assert train.held_out.tolist() == [*range(15, 30)]
    assert read(val_segments="seg1,seg3").held_out.tolist() == [*range(15), *range(30, 45)]
    assert everything.trained.tolist() == [*range(45)] and len(everything.held_out) == 0
    with pytest.raises(ValueError, match="--val_segments seg1,seg9: the training segments are seg1, seg2"):
        read(val_segments="seg1,seg9")


def test_hidden_voxels_are_zero_and_the_others_scaled(read):
    options = dict(batch_size=45, seed=1)
    batch, plain = read(voxel_dropout=0.4, **options).batch(7), read(**options).batch(7)
    hidden = batch.x == 0
    assert hidden.float().mean() == pytest.approx(0.4, abs=0.03)
    torch.testing.assert_close(batch.x[~hidden], plain.x[~hidden] / 0.6)
    masks = {tuple(mask.flatten().tolist()) for clip in hidden for mask in clip}
    assert len(masks) == 90  # of each clip and volume another


@pytest.mark.parametrize("field", ["x", "noise", "u", "dropped", "excluded"])
def test_what_is_drawn_belongs_to_seed_step_and_clip_alone(recurring, field):
    """Whatever else is in the batch. Over other seeds and steps it changes."""

    def draws(batch_size: int, step: int, seed: int = 3) -> dict[int, torch.Tensor]:
        chances = dict(voxel_dropout=0.4, condition_dropout=0.4, caption_share=0.5)
        batch = recurring(batch_size=batch_size, seed=seed, **chances).batch(step)
        return dict(zip(batch.clips.tolist(), getattr(batch, field), strict=True))

    everything, few = draws(45, 0), draws(9, 0)
    assert all(torch.equal(few[clip], everything[clip]) for clip in few)
    for other in (draws(45, 1), draws(45, 0, seed=4)):
        same = [torch.equal(other[clip], everything[clip]) for clip in everything]
        assert np.mean(same) < (0.8 if field in ("dropped", "excluded") else 0.01)


def test_the_draws_of_stage_2_are_those_of_eq_9(read, stored):
    train = read(decoder="wan", batch_size=45, seed=3, condition_dropout=0.3)
    steps = [train.batch(step) for step in range(60)]
    assert np.array_equal(steps[0].y, stored("stimuli/train/wan/latents-9x32x48.npy")[steps[0].clips])
    for b, clip in enumerate(steps[1].clips.tolist()):
        generator = noise_generator(3, 1, clip)
        u, chance = torch.rand(2, generator=generator)
        assert steps[1].u[b] == u and steps[1].dropped[b] == (chance < 0.3)
        assert torch.equal(steps[1].noise[b], torch.randn(LATENT, generator=generator))
    batch = joined(steps)
    assert batch.dropped.shape == (2700, 1, 1) and batch.u.shape == (2700,)
    dropped, u = batch.dropped.flatten(), batch.u
    assert dropped.float().mean() == pytest.approx(0.3, abs=0.03)
    assert (u.mean(), u.std()) == pytest.approx((0.5, 12**-0.5), abs=0.02)
    assert u[dropped].mean() == pytest.approx(0.5, abs=0.03)  # what is dropped does not follow the time
    assert batch.noise.shape[1:] == LATENT
    assert (batch.noise.mean(), batch.noise.std()) == pytest.approx((0, 1), abs=0.01)
    assert not torch.equal(steps[0].noise[0], steps[0].noise[1])
    for share, wanted in ((0.0, False), (1.0, True)):
        assert (read(decoder="wan", batch_size=9, condition_dropout=share).batch(0).dropped == wanted).all()


def test_a_generator_belongs_to_its_numbers():
    """Of the last assertions the numbers are those of the first release: what was trained can be trained again."""
    for kind in (lambda *key: rng(*key).random(), lambda *key: noise_generator(*key).initial_seed()):
        keys = [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 2, 1)]
        draws = [kind(*key) for key in keys]
        assert draws[0] == kind(0, 1, 2) and len({*draws}) == 5
    assert rng(0, 1, 2, 1).random() != rng(0, 1, 2, 2).random()
    assert noise_generator(1).initial_seed() != noise_generator(1, 0).initial_seed()
    assert rng(0, 1, 2, 1).random() == pytest.approx(0.560892935239097, abs=1e-12)
    assert noise_generator(0, 1, 2).initial_seed() == 2839113703493860072


def test_a_step_excludes_the_clip_its_scene_and_its_copies_among_the_memories(read, stored):
    """A segment of 15 clips is one scene; the first ten clips of seg1 are those of seg3."""
    copies = np.unpackbits(stored(f"{TRAIN}/near_copies.npy"), axis=1, count=45).astype(bool)
    segment = np.repeat([0, 1, 2], 15)
    alike = copies | (segment[:, None] == segment)  # (clips, clips)
    assert copies[np.arange(10), np.arange(30, 40)].all() and not alike.all(1).any()
    for held_out in (None, "seg2"):
        train = read(decoder="wan", batch_size=10, caption_share=1.0, val_segments=held_out)
        assert held_out is None or len(train.trained) < 31
        batch = train.batch(2)
        assert np.array_equal(batch.excluded, alike[batch.clips][:, train.trained])
        itself = train.trained == batch.clips.numpy()[:, None]  # (B, memories)
        assert itself.any(1).all() and batch.excluded.numpy()[itself].all()


def test_the_own_caption_is_hidden_as_often_as_asked_for(recurring):
    """Clip by clip: what is hidden from some of a batch is not from all."""
    same = np.arange(45)[:, None] % 20 == np.arange(45) % 20
    for share in (0.0, 0.3, 1.0):
        train = recurring(batch_size=45, caption_share=share)
        batches = [train.batch(step) for step in range(80)]
        finds = [(~batch.excluded.numpy() & same[batch.clips]).any(1).mean() for batch in batches]
        assert np.mean(finds) == pytest.approx(share, abs=0.02) and np.std(finds) < 0.1


def test_averaged_is_the_mean_of_the_recorded_showings_z_scored_over_the_clips(read, stored):
    x = read().averaged().numpy()
    mean = np.nanmean(stored(FMRI), 1)
    np.testing.assert_allclose(x, (mean - mean.mean(0)) / mean.std(0), atol=1e-4)
    part = mean[28:38]  # over these clips alone
    expected = (part - part.mean(0)) / part.std(0)
    np.testing.assert_allclose(read().averaged(np.arange(28, 38)), expected, atol=1e-4)


def test_rois_restrict_the_voxels(read, stored):
    visual, hippocampus = read(rois="visual", batch_size=7), read(rois="hippocampus")
    assert [AREAS[i // 7 % 5] for i in visual.index] == ["L_V1", "R_FFC", "L_MST"] * 8
    assert set(hippocampus.roi) == {"hippocampus_left"}
    columns = [i for i in range(40) if i % 5 < 3]
    batch = visual.batch(0)
    for x, clip in zip(batch.x, batch.clips, strict=True):
        assert any(np.array_equal(x, showing) for showing in stored(FMRI)[clip][..., columns])
    np.testing.assert_allclose(visual.averaged(), read().averaged()[..., columns], atol=1e-6)
    assert read(rois="visual,hippocampus", voxel_dropout=0.5).batch(0).x.shape == (1, 2, 32)
    for rois, fault in {
        "visual,auditory": r": \['auditory'\] unknown",
        "mpfc": ": none of the voxels",
    }.items():
        with pytest.raises(ValueError, match=f"--rois {rois}{fault}"):
            read(rois=rois)


def test_memories_are_the_clips_trained_on(read):
    train = read(decoder="wan", val_segments="seg1")
    two = torch.tensor(2.0, requires_grad=True)  # no gradient flows into the memories
    e, captions = memories(train, lambda e_img: two * e_img[:, 1] + e_img[:, 3])  # no mean, no unit vector
    assert e.dtype == torch.float32 and not e.requires_grad
    assert train.trained.min() >= 15 and len(e) == len(captions) == len(train.trained) > 10
    for n, clip in enumerate(train.trained):
        e_img = 2 * train.e_img[clip, 1] + train.e_img[clip, 3]
        kinds = [train.e_txt[clip], e_img / np.linalg.norm(e_img), train.e_act[clip]]
        np.testing.assert_allclose(e[n], np.stack(kinds), atol=1e-6)
        assert np.array_equal(captions[n], train.texts[clip])


def test_a_nan_or_infinity_at_a_recorded_showing_names_clip_and_voxel(copied):
    read, folder = copied
    fmri = np.load(folder / FMRI)
    for value, voxel in ((-np.inf, 9), (np.nan, 5)):
        fmri[17, :, 1, voxel:10] = value
        np.save(folder / FMRI, fmri)
        prepare_recorded(folder / "sub1")  # a showing that is NaN in part was recorded
        place = rf"volume 1, voxel {voxel} \(source index {7 * voxel}, {AREAS[voxel % 5]}\)"
        with pytest.raises(ValueError, match=rf"fmri.npy: found {value} at clip 17 \(seg2-002\), {place}"):
            read()


def test_what_was_prepared_for_another_size_or_decoder_is_an_error(copied, tiny, tmp_path):
    read, _ = copied
    with pytest.raises(MissingData, match="latents-9x48x32.npy, .*--frames 9 --height 48 --width 32"):
        read(size=(SIZE[0], SIZE[2], SIZE[1]))
    for part, file in (("vae", "latents-9x32x48.npy"), ("text_encoder", "text_tokens.npy")):
        wan = shutil.copytree(tiny / "models" / "wan", tmp_path / part / "wan")
        (wan / part / "config.json").write_text("{}")
        with pytest.raises(ValueError, match=f"{file} was made with {part} = "):
            read(decoder=wan)


def test_reading_imports_no_encoder(tmp_path):
    """Nor do asking whether the toy world is prepared, and stage 1."""
    code = "import sys, data, prepare.command, toy.release, train_stage1; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment(), text=True)
    assert not {*loaded.split()} & {"open_clip", "diffusers"}
