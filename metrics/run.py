"""What is read of a run beside its models, and where its evaluation writes."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from metrics.pairs import find_pairs
from metrics.report import Evaluation, pictures, report
from metrics.score import score_all
from metrics.table import asked
from support.files import sha256, write_json, written_whole
from support.readers import check_keys, damaged, read_array, read_json
from support.sharing import MEND

KEYS = {"data": str, "subject": int, "decoder": str, "mom": bool, "integration": bool, "stage1_config": dict}
KEYS |= dict.fromkeys(("frames", "height", "width", "sampling_steps", "lora_rank"), int)
KEYS |= {"guidance": float, "lora_alpha": float}


def read_settings(run: Path, shared: bool = False) -> dict:
    """stage2/config.json of a run, checked; one in runs/<data>/sub<K>/ must be of that data and subject.
    Of a shared folder its config.json. Raises FileNotFoundError, ValueError."""
    if shared:
        return read_json(run / "config.json", keys=KEYS, mend=MEND)
    file, mend = run / "stage2" / "config.json", "train stage 2 anew"
    if not file.is_file():
        trained = ", ".join(sorted(folder.parent.name for folder in run.parent.glob("*/stage2"))) or "none"
        data, sub = run.absolute().parts[-3:-1]
        of = f" --data {data} --subject {sub[3:]}" if re.fullmatch(r"sub\d+", sub) else ""
        raise FileNotFoundError(
            f"{file} is not there: python train_stage2.py{of} comes first; trained here: {trained}"
        )
    settings = read_json(file, keys=KEYS, mend=mend)
    check_keys(settings["stage1_config"], f"{file}, stage1_config", {"rois": (str, type(None))}, mend)
    place, own = run.absolute().parts[-3:-1], (settings["data"], f"sub{settings['subject']}")
    if re.fullmatch(r"sub\d+", place[-1]) and place != own:
        raise damaged(
            file, f"a run of {' '.join(own)}", f"one of {' '.join(place)}", "put it into its folder"
        )
    return settings


def read_recording(file: Path, model) -> Tensor:
    """One recording, .npy -> x (1, T, N), the run's voxels of those prepared. Raises FileNotFoundError,
    ValueError. model: evaluate.CineNeuron."""
    T, N, prepared = model.brain_model.volumes, model.brain_model.voxels, model.train.fmri.shape[3]
    like, mend = f"like one clip of {model.train.fmri_file}", "prepare it with data.py"
    x = read_array(file, "fiu", mend=f"--fmri wants an array {like}, saved by np.save")
    volumes = x[None] if x.ndim == 1 else x  # (T, N)
    if volumes.shape not in ((T, N), (T, prepared)):
        shapes = [f"({T}, {n})" + f" or ({n},)" * (T == 1) for n in dict.fromkeys((prepared, N))]
        raise damaged(file, f"the shape {x.shape}", f"{' or '.join(shapes)}, {like}", mend)
    bad = np.argwhere(~np.isfinite(volumes)).tolist()
    for t, n in bad[:1]:
        found = f"{volumes[t, n]} at volume {t}, voxel {n}, {len(bad)} such values in all"
        raise damaged(file, found, "finite numbers", mend)
    if abs(x.mean()) > 3 or x.std() > 5:
        raise damaged(file, f"{x.mean():.4g} ± {x.std():.4g}", f"z-scores, about 0 ± 1, {like}", mend)
    volumes = volumes if volumes.shape[1] == N else volumes[:, model.train.voxels]
    return torch.from_numpy(volumes.astype(np.float32))[None]


def write_retrieved(model, x: Tensor, shown: dict[int, dict], file: Path) -> np.ndarray | None:
    """retrieved.jsonl of x (clips, T, N), fMRI of `shown`, {number: line of clips.jsonl}. Returns the top-1
    memories (clips,), None where nothing is sought: without integration. model: evaluate.CineNeuron."""
    parts = [model.remember(part) for part in x.split(16)]
    if parts[0].indices is None:
        return None
    indices = torch.cat([part.indices for part in parts]).cpu().numpy()  # (clips, K)
    W_r = torch.cat([part.W_r for part in parts]).cpu().numpy().astype(float).round(4)  # (clips, 3)
    with written_whole(file) as part, open(part, "w") as lines:
        for (i, clip), memory, weights in zip(shown.items(), indices.tolist(), W_r.tolist(), strict=True):
            row = {"clip": i, "id": clip["id"], "retrieved": memory, "W_r": weights}
            lines.write(json.dumps(row) + "\n")
    return indices[:, 0]


def evaluation_folder(run: Path, config, settings: dict, whole: bool, every: str) -> Path:
    """eval or eval-shuffled of a run. Fewer clips than the whole test set, other sampling than the run's
    settings and fewer metrics than `every` have a folder of their own, and so never replace the results of
    all."""
    name, names = "eval-shuffled" if config.shuffle else "eval", asked(config)
    if not whole:
        name += f"-{config.clips}-clips"
    for key, of_run in (("steps", "sampling_steps"), ("guidance", "guidance")):
        if getattr(config, key) not in (None, settings[of_run]):
            name += f"-{key}{getattr(config, key):g}"
    if set(every.split(",")) - set(names):
        digest = hashlib.sha256(",".join(names).encode()).hexdigest()[:6]
        name += "-" + ("-".join(names) if len(names) <= 3 else f"{len(names)}-metrics-{digest}")
    return run / name


def claim(out: Path, stage2: Path, config, settings: dict, write: bool) -> None:
    """out/config.json: what the videos there were made by. Raises ValueError where others would join them."""
    file, anew = out / "config.json", f"to make them anew delete the folder: rm -r {out}"
    steps = settings["sampling_steps"] if config.steps is None else config.steps
    guidance = settings["guidance"] if config.guidance is None else config.guidance
    weights = sha256(*sorted(stage2.glob("*/*.safetensors")))[:16]
    how = {"steps": steps, "guidance": guidance, "fps": config.fps, "weights": weights}
    before = read_json(file, mend=anew) if file.exists() else how
    differ = {key: (before.get(key), value) for key, value in how.items() if before.get(key) != value}
    if differ:
        raise ValueError(f"{out} has videos made otherwise (there, here): {differ}; {anew}")
    if write:
        write_json(file, how)


def evaluate_pairs(config, accelerator: Accelerator) -> int:
    """python evaluate.py --pairs DIR: score anyone's videos. Returns the exit status."""
    folder, out = Path(config.pairs), Path(config.out or Path(config.pairs, "metrics"))
    sets = find_pairs(folder, config.split, config.skip_bad, out)
    absent = score_all(sets, config, out, accelerator)
    if not accelerator.is_main_process:  # a launcher ends all processes when one fails
        return 0
    what = {"pairs": folder.resolve().name, "data": config.data}
    evaluation = Evaluation(sets, out, config, absent, what)
    results, text = report(evaluation)
    pictures(evaluation, results)
    print(f"{text}\n\nwritten: {out}/ (METHOD/metrics.json, metrics.csv, sheet.png, grid.gif, ranked.png)")
    return 3 if absent else 0
