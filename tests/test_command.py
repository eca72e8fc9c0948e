"""The command line of data.py: a wrong one ends in one line, before anything is written. The published facts."""

import re
from pathlib import Path

import numpy as np
import pytest

from prepare import command, facts
from support.files import MissingData
from support.runs import FolderLock, door

RAW = ["--raw", "."]
GUIDE = "(?s)give --raw .the release.{1}.*data/{0} is not prepared for subject 2.*python data.py {0} --raw RAW --subject 2"
WRONG = [
    (["cc2017", *RAW, "--window", "241"], "--window 241: wanted at least 1 and at most 240"),
    (["cc2017", *RAW, "--delay", "-1"], "--delay -1: wanted at least 0"),
    (["nothing"], "--data nothing: there are toy, cc2017, cinebrain"),
    ([], "which dataset.*python data.py toy or cc2017 or cinebrain"),
    (["cinebrain", *RAW, "--subject", "7"], "--subject 7: cinebrain has subjects 1 to 6"),
    (["cinebrain", *RAW, "--test-segments", "3"], "--test_segments 3: cinebrain has 2"),
    (["cc2017", *RAW, "--captions", "a", "b", "c"], "--captions: 3 files are given, wanted one, or"),
    (["cc2017", *RAW, "--frames", "9"], "--frames without --decoder"),
    (["toy", "--height", "9"], "--height: toy does not use it"),
    (["cinebrain", "--fmri-release", "."], "--fmri_release: cinebrain does not use it"),
    (["cc2017", *RAW, "--fmri-release", "nowhere"], "nowhere is not there: give the folder"),
    (["cc2017", *RAW], "has no subject1/fmri below it, the recordings of the subject: download it"),
    (["cc2017", "--subject", "2"], GUIDE.format("cc2017", ".*--fmri-release")),
    (["cinebrain", "--subject", "2"], GUIDE.format("cinebrain", "")),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_is_asked_for_wrongly_is_one_error(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        door(lambda: command.main(options))
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error), error
    assert not [*tmp_path.iterdir()]


def test_two_at_once_do_not_prepare_one_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options in (["cc2017", *RAW], ["toy"]):
        place = f"data/{options[0]}"
        with FolderLock(Path(place)), pytest.raises(ValueError, match=f"{place}: another process works"):
            command.main(options)
    assert not [*tmp_path.iterdir()]
    (tmp_path / "results").mkdir()  # the user's own, though it is empty
    FolderLock(Path("results/.out.mp4.lock")).close()
    assert (tmp_path / "results").is_dir()


RELEASES = [
    (["cc2017", "--raw", "a"], "cc2017.PurdueRelease", ["a"], (18, 5)),
    (["cc2017", "--fmri-release", "b"], "cc2017.NeuroClipsRelease", ["b"], (18, 5)),
    (["cc2017", "--raw", "a", "--fmri-release", "b"], "cc2017.NeuroClipsWithFilms", ["b", "a"], (18, 5)),
    (["cinebrain", "--raw", "a"], "cinebrain.CineBrainRelease", ["a"], (18, 2)),
]


@pytest.mark.parametrize(("options", "kind", "folders", "sizes"), RELEASES)
def test_the_folders_say_which_release_is_read(options, kind, folders, sizes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"prepare.{kind}", lambda *args: args)
    for folder in "ab":
        Path(folder).mkdir()
    config = command.read([*options, "--subject", "2", "--delay", "3"])
    assert config.window == (5 if options[0] == "cinebrain" else 1)
    assert command.open_release(config) == (*map(Path, folders), 2, 3, *sizes)
    monkeypatch.setattr("toy.release.prepare_toy", lambda **options: toys.append(options))
    toys = []
    command.main(["toy", "--subject", "3"])
    assert toys == [{"subject": 3}]


def test_the_sizes_are_those_of_table_1_and_the_publications():
    assert facts.SIZES["cc2017"] == {"train": (18, 240), "test": (5, 240)}  # 4,320 and 1,200 clips
    assert facts.SIZES["cinebrain"] == {"train": (18, 270), "test": (2, 270)}  # 4,860 and 540
    cc2017 = (facts.SEGMENT_VOLUMES, facts.CC2017_TR, facts.CC2017_DELAY, facts.CC2017_FPS)
    assert cc2017 == (240, 2.0, 2, 30.0)
    assert (facts.EPISODE_CLIPS, facts.EPISODE_VOLUMES, facts.CLIP_VOLUMES) == (270, 1350, 5)
    assert (facts.CINEBRAIN_TR, facts.CINEBRAIN_DELAY, facts.CINEBRAIN_FPS) == (0.8, 5, 8.0)
    assert [*facts.SECONDS.values()][:3] == [2.0, 2.0, 4.125]  # cinebrain: 33 frames at 8 a second
    assert [*facts.VIDEO.values()][:3] == [(17, 64, 64), (57, 624, 624), (33, 480, 720)]
    for name, subject, end in (("toy", 1, ""), ("toy", 2, "-2"), ("cc2017", 2, ""), ("cinebrain", 3, "")):
        assert facts.stimuli_folder(name, subject) == Path(f"data/{name}/stimuli{end}")
        assert facts.raw_folder(name, subject) == Path(f"data/{name}/raw{end}")


def test_areas_are_found_with_and_without_their_hemisphere():
    areas = np.array(["L_V1", "R_V1", "L_V10", "hippocampus_left", "R_32"])
    assert facts.in_areas(areas, ["V1"]).tolist() == [True, True, False, False, False]
    assert facts.in_areas(areas, ["R_V1", "hippocampus_left"]).tolist() == [False, True, False, True, False]
    voxels = np.array(["R_4", "R_FFC", "hippocampus_right", "L_d32", "L_V1"])
    folder = Path("data/cinebrain/sub1")
    assert facts.voxels_of("mpfc,visual", voxels, folder).tolist() == [1, 3, 4]
    with pytest.raises(ValueError, match=r"--rois visual,V1: \['V1'\] unknown"):
        facts.voxels_of("visual,V1", voxels, folder)
    message = "none of the voxels of .*/sub1 lies in mpfc, they are in L_V1, R_4, R_FFC ...; prepare the"
    with pytest.raises(ValueError, match=message):
        facts.voxels_of("visual,mpfc", voxels[[0, 1, 4]], folder)


def test_a_local_decoder_is_known_by_its_files(tmp_path):
    for part in ("vae", "text_encoder"):
        (tmp_path / "wan" / part).mkdir(parents=True)
        (tmp_path / "wan" / part / "config.json").write_text("{}")
        (tmp_path / "wan" / part / "model.safetensors").write_text("weights")
    latents, text = facts.decoder_recipes(f"{tmp_path}/wan/.", (9, 32, 48))
    assert latents | {"vae": 0} == dict(decoder="wan", vae=0, frames=9, height=32, width=48)
    (tmp_path / "wan" / "vae" / "notes.txt").write_text("no weights")
    assert facts.decoder_recipes(f"{tmp_path}/wan", (9, 32, 48)) == (latents, text) and text["text_encoder"]
    (tmp_path / "wan" / "vae" / "model.safetensors").write_text("weighty")
    others, same = facts.decoder_recipes(f"{tmp_path}/wan", (9, 32, 48))
    assert others["vae"] != latents["vae"] and same == text
    assert facts.decoder_recipes("a/b", (9, 32, 48))[1] == {"decoder": "a/b", "text_encoder": None}


def test_what_is_not_prepared_is_named_with_the_way_to_it(tmp_path):
    (there := tmp_path / "fmri.npy").touch()
    gone = tmp_path / "gone.npy"
    facts.check_prepared("cc2017", 2, [there], [there])
    for name, files, derived, message in (
        ("cc2017", [there, gone], [there], "(?s)data/cc2017 is not prepared for subject 2.*gone.npy is not"),
        ("cc2017", [there], [gone], "gone.npy is not there: python data.py cc2017 .* --subject 2 makes"),
        ("toy", [gone], [], "gone.npy is not there: python data.py toy --subject 2 makes the toy world"),
        ("toy", [there], [gone], "gone.npy is not there: train_stage1.py makes it"),
    ):
        with pytest.raises(MissingData, match=message):
            facts.check_prepared(name, 2, files, derived)
    with_decoder = facts.prepare_command("cinebrain", 3, "wan")
    assert with_decoder == "python data.py cinebrain --raw DIR --subject 3 --decoder wan"
    assert facts.prepare_command("toy", 1, "wan") == "train_stage2.py"
    facts.check_batch(5, 5)
    with pytest.raises(ValueError, match="a batch of 6 clips, but only 5 clips to train on"):
        facts.check_batch(6, 5)
    assert facts.words_of(" The dog's FAST, isn't it? ") == "the dog s fast isn t it"
