"""What was remembered of a clip (§3.2): K memories, the scores of Eq. 5, the attention of Eq. 6; a picture
and a page. Called by extras/figures.py."""

import base64
import json
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from brain_model import BrainModel
from data import ClipDataset
from extras.runs import frames_of, save, settings_of, video_file
from heads import Stage1Heads
from mixture_of_memories import FUSED, MODALITIES, Integration, MixtureOfMemories
from prepare.facts import SECONDS, raw_folder
from support.files import written_whole
from support.pictures import strip
from support.readers import damaged, load_model, read_json_lines
from support.videos import read_clip, video_frames, write_video

COLOURS = dict(zip(MODALITIES, ("#3b6ea5", "#d98324", "#4f9a5b"), strict=True))
EVALUATE = "python evaluate.py makes it, on a run with memories (not --no-integration)"
PAGE = Path(__file__).with_suffix(".html")
PICTURED = 5  # memories of a clip that a picture has room for; the page shows all


class Scores(NamedTuple):
    """Of one clip."""

    retrieved: list[int]  # its memories i_1 ... i_K
    W_r: np.ndarray  # (3,) the router's weights
    cosines: np.ndarray  # (K, 3) of q and each memory: S = cosines @ W_r, Eq. 5
    attention: np.ndarray | None  # (K, 2), of image and action; None without MoM


@torch.inference_mode()
def attention(integration: Integration, f_e: Tensor, e_mem: Tensor, log_w: Tensor) -> Tensor:
    """How much each memory counts in Eq. 6: the softmax over the K memories, mean over heads and tokens. Of
    the arguments of `Integration.forward`; returns (B, K, len(FUSED)), whose columns sum to 1."""
    e_mem = e_mem * e_mem.shape[-1] ** 0.5  # (B, K, 3, D)
    Q, of = integration.per_head(integration.W_Q(f_e)), []  # (B, heads, L, D'/heads)
    for m in FUSED:
        K = integration.per_head(integration.W_K[m](e_mem[:, :, MODALITIES.index(m)]))
        logits = Q @ K.mT / Q.shape[-1] ** 0.5 + log_w[:, None, None]  # (B, heads, L, K)
        of.append(logits.softmax(-1).mean((1, 2)))  # (B, K)
    return torch.stack(of, -1)


def read_retrieved(file: Path, clips: list[int], n: int) -> dict[int, dict]:
    """Of each clip the line that evaluate.py wrote. n: how many training clips there are. Raises
    FileNotFoundError or ValueError."""
    keys = {"clip": int, "retrieved": list, "W_r": list}
    lines = {line["clip"]: line for line in read_json_lines(file, keys, EVALUATE)}
    if absent := sorted(set(clips) - lines.keys()):
        raise ValueError(f"{file} has no line of the clips {absent}: python evaluate.py, once more")
    for clip in clips:
        retrieved, W_r = lines[clip]["retrieved"], lines[clip]["W_r"]
        known = bool(retrieved) and all(type(i) is int and 0 <= i < n for i in retrieved)
        if not known or len(W_r) != 3 or not all(type(w) in (int, float) and 0 <= w <= 1 for w in W_r):
            wanted = f"indices of {n} memories, and three weights"
            raise damaged(file, f"clip {clip}: {retrieved} {W_r}", wanted, "delete it; python evaluate.py")
    return lines


def scores(run: Path, settings: dict, clips: list[int]) -> dict[int, Scores]:
    """What Eq. 5 compared for each clip. Raises FileNotFoundError or ValueError, also where other weights
    than the run's have retrieved the memories."""
    rois = settings["stage1_config"].get("rois")
    train = ClipDataset(settings["data"], settings["subject"], "train", rois)
    test = ClipDataset(settings["data"], settings["subject"], "test", rois)
    file = run / "eval" / "retrieved.jsonl"
    lines = read_retrieved(file, clips, len(train))
    mend = "python train_stage2.py makes it"
    brain_model = load_model(BrainModel, run / "stage2" / "brain_model", mend).eval()
    heads = load_model(Stage1Heads, run / "stage2" / "heads", mend).eval()
    mom = None
    if settings.get("mom", True):
        mom = load_model(MixtureOfMemories, run / "stage2" / "mixture_of_memories", mend).eval()
    of_clips = {}
    with torch.inference_mode():
        f_c, f_e = brain_model(test.averaged()[clips])  # (B, D) (B, L, D')
        q = normalize(heads.queries(f_c), dim=-1)  # (B, 3, D)
        for row, tokens, clip in zip(q, f_e, clips, strict=True):
            retrieved, W_r = lines[clip]["retrieved"], np.array(lines[clip]["W_r"], float)
            memory = train.targets(np.array(retrieved))
            e = torch.stack([memory["e_txt"], heads.phi_v(memory["e_img"]), memory["e_act"]], 1)
            e = normalize(e, dim=-1)  # (K, 3, D)
            cosines = (e * row).sum(-1).numpy()  # (K, 3)
            if (np.diff(cosines @ W_r) > 0.01).any():
                why = f"the scores of clip {clip} do not fall, so other weights retrieved them"
                raise ValueError(f"{file}: {why}: python evaluate.py, anew")
            attended = None
            if mom is not None:
                log_w = (torch.tensor(cosines @ W_r, dtype=e.dtype) / mom.tau).log_softmax(-1)
                attended = attention(mom.integration, tokens[None], e[None], log_w[None])[0].numpy()
            of_clips[clip] = Scores(retrieved, W_r, cosines, attended)
    return of_clips


def picture(run: Path, clips: dict[int, str], films: Path | None, out: Path) -> None:
    """A row a clip, {number: its group}: the stimulus, the first PICTURED of its K memories, each with its
    score and what each modality adds to it, the reconstruction, and the attention of Eq. 6 over all K. films:
    the folder of the stimuli, the release's where it is not given."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    settings = settings_of(run, "stage2")
    data, size = settings["data"], (settings["frames"], settings["height"], settings["width"])
    of_clips = scores(run, settings, [*clips])
    train = ClipDataset(data, settings["subject"], "train").clips
    test = ClipDataset(data, settings["subject"], "test").clips
    films = films or raw_folder(data, settings["subject"]) / "stimuli"
    K = min(PICTURED, max(len(of.retrieved) for of in of_clips.values()))
    how = {"squeeze": False, "layout": "constrained", "height_ratios": (3.2, 1) * len(clips)}
    figure, axes = plt.subplots(2 * len(clips), K + 2, figsize=(2.6 * (K + 2), 2.5 * len(clips)), **how)
    for n, (clip, of) in enumerate(of_clips.items()):
        above, below = axes[2 * n], axes[2 * n + 1]
        show(above[0], frames_of(run, "gt", clip), caption_of(test[clip], clips[clip]))
        show(above[-1], frames_of(run, "recon", clip), "")
        draw_router(below[0], of.W_r)
        draw_attention(below[-1], of.attention)
        for ax in [*above[1:-1][len(of.retrieved) :], *below[1:-1][len(of.retrieved) :]]:
            ax.axis("off")
        for k, i in enumerate(of.retrieved[:K]):
            film = read_clip(films / train[i]["video"], train[i]["start_s"], SECONDS[data])
            show(above[k + 1], video_frames(film, *size), train[i]["caption"])
            draw_score(below[k + 1], of.W_r * of.cosines[k])
    titles = ["stimulus", *(f"memory {k + 1}" for k in range(K)), "reconstruction"]
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=10)
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    save(out, figure)
    plt.close(figure)


def caption_of(clip: dict, group: str) -> str:
    return clip["caption"] + f" [{group}]" * bool(group)


def show(ax, video: np.ndarray, caption: str) -> None:
    """Three moments of a video uint8 (F, H, W, 3), its caption below."""
    picture = strip(video)
    ax.imshow(picture, interpolation="nearest" if len(picture) < 128 else "antialiased")
    ax.set(xticks=[], yticks=[])
    lines = textwrap.wrap(caption, 36, max_lines=3, placeholder=" ...")
    ax.set_xlabel("\n".join(lines), fontsize=8, color="#444444")
    ax.spines[:].set_visible(False)


def draw_score(ax, parts: np.ndarray) -> None:
    """A memory's score S as a bar of three parts, weight x cosine (3,); a negative one is drawn back over the
    others."""
    start = 0.0
    for value, colour in zip(parts, COLOURS.values(), strict=True):
        ax.barh(0, value, left=start, color=colour)
        start += max(0, value)
    ax.set(xlim=(0, 1), ylim=(-1, 1), yticks=[], xticks=[])
    at = {"ha": "right", "va": "top", "fontsize": 8, "transform": ax.transAxes}
    ax.text(0.99, 0.97, f"S = {parts.sum():.3f}", **at)


def draw_router(ax, W_r: np.ndarray) -> None:
    ax.bar(list(COLOURS), W_r, color=list(COLOURS.values()))
    ax.set(ylim=(0, 1), yticks=[0, 1])
    ax.set_title("router weights W_r", fontsize=8)


def draw_attention(ax, attention: np.ndarray | None) -> None:
    """Eq. 6's attention (K, len(FUSED)) over the memories, the best score first; off without MoM."""
    if attention is None:
        ax.axis("off")
        return
    rank = np.arange(1, len(attention) + 1)
    for m, weights in zip(FUSED, attention.T, strict=True):
        ax.plot(rank, weights, ".-", color=COLOURS[m], linewidth=0.8, markersize=3)
    ax.set(ylim=(0, None), xticks=[1, len(attention)], yticks=[])
    ax.tick_params(labelsize=7)
    ax.set_title(f"attention over the K = {len(attention)} memories", fontsize=8)


# ---------------------------------------------------------------- the page


def page(run: Path, clips: dict[int, str], films: Path | None, out: Path) -> None:
    """The same as a page, extras/memories.html, that holds all it shows: a clip at a time, films that move.
    Arguments as of `picture`."""
    settings = settings_of(run, "stage2")
    data, size = settings["data"], (settings["frames"], settings["height"], settings["width"])
    of_clips = scores(run, settings, [*clips])
    train, test = (ClipDataset(data, settings["subject"], split).clips for split in ("train", "test"))
    films = films or raw_folder(data, settings["subject"]) / "stimuli"
    remembered = {i for of in of_clips.values() for i in of.retrieved}
    memories = {}
    with tempfile.TemporaryDirectory() as folder:
        for i in sorted(remembered):
            film = read_clip(films / train[i]["video"], train[i]["start_s"], SECONDS[data])
            file = Path(folder, f"{i}.mp4")
            write_video(file, video_frames(film, *size), settings["frames"] / SECONDS[data])
            memories[i] = {"caption": train[i]["caption"], "id": train[i]["id"], "video": as_uri(file)}
    shown = []
    for clip, of in of_clips.items():
        videos = {kind: as_uri(video_file(run, kind, clip)) for kind in ("gt", "recon")}
        facts = {"clip": clip, "id": test[clip]["id"], "caption": test[clip]["caption"], "group": clips[clip]}
        facts |= {"retrieved": of.retrieved, "W_r": of.W_r.tolist(), "cosines": of.cosines.tolist()}
        facts["attention"] = None if of.attention is None else of.attention.tolist()
        shown.append(facts | videos)
    about = {"run": str(run), "modalities": MODALITIES, "fused": FUSED, "colours": COLOURS}
    about |= {"width": settings["width"], "height": settings["height"], "clips": shown, "memories": memories}
    text = json.dumps(about).replace("<", "\\u003c")  # no caption ends the script
    with written_whole(out) as part:
        part.write_text(PAGE.read_text().replace("/* RUN */ null", text))


def as_uri(file: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()
