"""The command line of data.py: what is asked for wrongly ends in one line, before anything is written."""

import pytest
from conftest import run_script

from prepare import command
from support.files import MissingData

RAW = ["--raw", "."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["cc2017", *RAW, "--window", "0"], "--window 0: wanted at least 1 and at most 240"),
        (["cc2017", *RAW, "--delay", "-1"], "--delay -1: wanted at least 0"),
        (["cc2017", *RAW, "--train-segments", "0"], "--train_segments 0: wanted at least 1"),
        (["cc2017", *RAW, "--test-segments", "two"], "argument --test_segments/--test-segments: invalid int"),
        (["cinebrain", *RAW, "--caption-sentences", "0"], "--caption_sentences 0: wanted at least 1"),
        (["nothing"], "--data nothing: there are toy, cc2017, cinebrain"),
        (["cc2017", *RAW, "--win", "2"], "unrecognized arguments: --win"),
    ],
)
def test_wrong_options_end_in_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "which dataset.*python data.py toy or cc2017 or cinebrain"),
        (["cinebrain", *RAW, "--subject", "7"], "--subject 7: cinebrain has subjects 1 to 6"),
        (["cc2017", *RAW, "--train-segments", "19"], "--train_segments 19: cc2017 has 18"),
        (["cc2017", *RAW, "--captions", "a", "b", "c"], "--captions: 3 files are given, wanted one, or"),
        (["cinebrain", "--fmri-release", "."], "--fmri_release: cinebrain does not use it"),
        (["toy", *RAW], "--raw: toy does not use it"),
    ],
)
def test_what_a_dataset_does_not_have_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        command.main(options)


@pytest.mark.parametrize(("name", "either"), [("cc2017", ".*--fmri-release"), ("cinebrain", "")])
def test_without_a_release_the_guide_is_printed(name, either):
    with pytest.raises(MissingData, match=f"(?s)give --raw{either}.*python data.py {name} --raw RAW"):
        command.main([name])


def test_help_shows_all_options(capsys):
    for argv in (["--help"], ["cinebrain", "--help"]):
        with pytest.raises(SystemExit):
            command.main(argv)
        text = " ".join(capsys.readouterr().out.split())
        assert "--caption-sentences" in text and "CLIP sees the first 77 tokens" in text
        assert "--fmri-release" in text and "cinebrain: 5]" in text


def test_bad_input_is_one_line_and_no_traceback(tmp_path):
    done = run_script("data.py", "cc2017", "--raw", tmp_path / "nowhere", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.rglob("*.npy"))
