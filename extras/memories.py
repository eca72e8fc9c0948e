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
from extras.runs import Run, caption_of, frames_of, save_figure, video_file
from heads import Stage1Heads
from mixture_of_memories import Integration, MixtureOfMemories
from prepare.facts import SECONDS, raw_folder
from support.files import written_whole
from support.pictures import strip
from support.readers import check_keys, damaged, load_model, read_json_lines, reading
from support.shared import read_memories
from support.videos import read_clip, video_frames, write_video

COLOURS = {"txt": "#3b6ea5", "img": "#d98324", "act": "#4f9a5b"}  # of the modalities
PAGE = Path(__file__).with_suffix(".html")
PICTURED = 5  # memories of a clip that a picture has room for; the page shows all


class Scores(NamedTuple):
    """Of one clip."""

    retrieved: list[int]  # its memories i_1 ... i_K
    W_r: np.ndarray  # (3,) the router's weights
    cosines: np.ndarray  # (K, 3) of q and each memory: S = cosines @ W_r, Eq. 5
    attention: np.ndarray | None  # (K, 2), of image and action; None without MoM


def attention(integration: Integration, f_e: Tensor, e_mem: Tensor, log_w: Tensor) -> Tensor:
    """How much each memory counts in Eq. 6: the softmax over the K memories, mean over heads and tokens.

    f_e (B, L, D'), e_mem (B, K, 3, D), log_w (B, K) as `Integration.forward` takes them -> (B, K, 2), of
    image and action; its columns sum to 1."""
    heads = integration.heads
    Q = integration.W_Q(f_e).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, L, d)
    weights = []
    for m, cross_attention in enumerate((integration.img, integration.act), 1):
        keys = cross_attention.W_K(e_mem[:, :, m]).unflatten(-1, (heads, -1)).transpose(1, 2)
        logits = Q @ keys.mT / Q.shape[-1] ** 0.5 + log_w[:, None, None]  # (B, heads, L, K)
        weights.append(logits.softmax(-1).mean((1, 2)))  # (B, K)
    return torch.stack(weights, -1)


class Remembered:
    """What a run remembered of these clips, {number: its group}.

    memories: lines of clips.jsonl, one a memory; lines and scores of each clip; films: the folder of the
    stimuli, by default the release's. Raises FileNotFoundError or ValueError, also where other weights than
    the run's have retrieved the memories."""

    def __init__(self, folder: Path, groups: dict[int, str], films: Path | None = None):
        self.run = run = Run(folder, "stage2")
        self.groups = groups
        self.films = films or raw_folder(run.data, run.subject) / "stimuli"
        self.size = (run.settings["frames"], run.settings["height"], run.settings["width"])
        test, clips = run.test_clips(), [*groups]
        self.lines = {clip: test.lines[clip] for clip in clips}
        with reading(run.stage, advice="python train_stage2.py makes it"):
            brain_model = load_model(BrainModel, run.stage / "brain_model").eval()
            D = brain_model.to_f_c.out_features
            e, _, _, self.memories = read_memories(run.stage, D)  # (N, 3, D)
            heads = load_model(Stage1Heads, run.stage / "heads").eval()
            self.mom = None
            if run.settings.get("mom", True):
                self.mom = load_model(MixtureOfMemories, run.stage / "mixture_of_memories").eval()
        self.file = run.folder / "eval" / "retrieved.jsonl"
        rows = self._read_retrieved(clips)
        self.scores: dict[int, Scores] = {}
        with torch.inference_mode():
            f_c, f_e = brain_model(test.averaged()[clips])  # (B, D), (B, L, D')
            q = normalize(heads.queries(f_c), dim=-1)  # (B, 3, D)
            for clip, query, tokens in zip(clips, q, f_e, strict=True):
                self.scores[clip] = self._compare(rows[clip], query, tokens, e)

    def _read_retrieved(self, clips: list[int]) -> dict[int, dict]:
        """Of each clip the line that evaluate.py wrote."""
        advice = "python evaluate.py makes it, on a run with memories (not --no-integration)"
        with reading(self.file, advice=advice):
            keys = {"clip": int, "retrieved": list, "W_r": list}
            rows = {row["clip"]: row for row in read_json_lines(self.file, keys)}
        missing = sorted(set(clips) - rows.keys())
        if missing:
            raise ValueError(f"{self.file} has no line of the clips {missing}: python evaluate.py, once more")
        N = len(self.memories)
        for clip in clips:
            retrieved, W_r = rows[clip]["retrieved"], rows[clip]["W_r"]
            known = retrieved and all(type(i) is int and 0 <= i < N for i in retrieved)
            weights = len(W_r) == 3 and all(type(w) in (int, float) and 0 <= w <= 1 for w in W_r)
            if not known or not weights:
                expected = f"indices of {N} memories, and three weights"
                advice = "delete it; python evaluate.py"
                raise damaged(self.file, f"clip {clip}: {retrieved} {W_r}", expected, advice)
        return rows

    def _compare(self, row: dict, query: Tensor, tokens: Tensor, e: Tensor) -> Scores:
        """row: of retrieved.jsonl; query (3, D), tokens (L, D') of the clip; e (N, 3, D)."""
        retrieved, W_r = row["retrieved"], np.array(row["W_r"], float)
        cosines = (e[retrieved] * query).sum(-1).numpy()  # (K, 3)
        S = cosines @ W_r  # (K,)  Eq. 5
        if (np.diff(S) > 0.01).any():
            reason = f"the scores of clip {row['clip']} do not fall, so other weights retrieved them"
            raise ValueError(f"{self.file}: {reason}: python evaluate.py, anew")
        if self.mom is None:
            return Scores(retrieved, W_r, cosines, None)
        e_mem = e[retrieved][None] * e.shape[-1] ** 0.5  # (1, K, 3, D) of unit RMS
        log_w = (torch.from_numpy(S).float() / self.mom.tau).log_softmax(-1)  # (K,)
        weights = attention(self.mom.integration, tokens[None], e_mem, log_w[None])
        return Scores(retrieved, W_r, cosines, weights[0].numpy())

    def film(self, i: int) -> np.ndarray:
        """The video of memory i, uint8 (F, H, W, 3)."""
        file = self.run.stage / "memories.json"
        line = check_keys(self.memories[i], f"{file}, line {i}", {"video": str, "start_s": float})
        clip = read_clip(self.films / line["video"], line["start_s"], SECONDS[self.run.data])
        return video_frames(clip, *self.size)


# ---------------------------------------------------------------- the picture


def picture(remembered: Remembered, out: Path) -> None:
    """A row a clip: the stimulus, the first PICTURED of its K memories, each with its score and what each
    modality adds to it, the reconstruction, and the attention of Eq. 6 over all K."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    run, n = remembered.run.folder, len(remembered.scores)
    K = min(PICTURED, max(len(scores.retrieved) for scores in remembered.scores.values()))
    figure = plt.figure(figsize=(2.6 * (K + 2), 2.5 * n), layout="constrained")
    axes = figure.subplots(2 * n, K + 2, squeeze=False, height_ratios=(3.2, 1) * n)
    for row, (clip, scores) in enumerate(remembered.scores.items()):
        above, below = axes[2 * row : 2 * row + 2]
        caption = caption_of(remembered.lines[clip], remembered.groups[clip])
        draw_video(above[0], frames_of(run, "gt", clip), caption)
        draw_video(above[-1], frames_of(run, "recon", clip), "")
        draw_router(below[0], scores.W_r)
        draw_attention(below[-1], scores.attention)
        for k, i in enumerate(scores.retrieved[:K]):
            draw_video(above[k + 1], remembered.film(i), remembered.memories[i]["caption"])
            draw_score(below[k + 1], scores.W_r * scores.cosines[k])
    for ax in axes.flat:
        if not ax.has_data():
            ax.axis("off")
    titles = ["stimulus", *(f"memory {k + 1}" for k in range(K)), "reconstruction"]
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=10)
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    save_figure(out, figure)


def draw_video(ax, video: np.ndarray, caption: str) -> None:
    """Three moments of a video uint8 (F, H, W, 3), its caption below."""
    moments = strip(video)
    ax.imshow(moments, interpolation="nearest" if len(moments) < 128 else "antialiased")
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
    text = ax.text(0.99, 0.97, f"S = {parts.sum():.3f}", fontsize=8, transform=ax.transAxes)
    text.set(ha="right", va="top")


def draw_router(ax, W_r: np.ndarray) -> None:
    ax.bar(list(COLOURS), W_r, color=list(COLOURS.values()))
    ax.set(ylim=(0, 1), yticks=[0, 1])
    ax.set_title("router weights W_r", fontsize=8)


def draw_attention(ax, attention: np.ndarray | None) -> None:
    """Eq. 6's attention (K, 2) over the memories, the best score first; nothing without MoM."""
    if attention is None:
        ax.axis("off")
        return
    rank = np.arange(1, len(attention) + 1)
    for m, weights in zip(("img", "act"), attention.T, strict=True):
        ax.plot(rank, weights, ".-", color=COLOURS[m], linewidth=0.8, markersize=3)
    ax.set(ylim=(0, None), xticks=[1, len(attention)], yticks=[])
    ax.tick_params(labelsize=7)
    ax.set_title(f"attention over the K = {len(attention)} memories", fontsize=8)


# ---------------------------------------------------------------- the page


def page(remembered: Remembered, out: Path) -> None:
    """The same as a page (extras/memories.html) that holds all it shows, clip by clip, with moving films."""
    run, (frames, height, width) = remembered.run, remembered.size
    memories, clips = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for i in sorted({i for scores in remembered.scores.values() for i in scores.retrieved}):
            file, line = Path(folder, f"{i}.mp4"), remembered.memories[i]
            write_video(file, remembered.film(i), frames / SECONDS[run.data])
            memories[i] = {"caption": line["caption"], "id": line["id"], "video": as_uri(file)}
    for clip, scores in remembered.scores.items():
        line, group = remembered.lines[clip], remembered.groups[clip]
        texts = {"clip": clip, "id": line["id"], "caption": line["caption"], "group": group}
        videos = {kind: as_uri(video_file(run.folder, kind, clip)) for kind in ("gt", "recon")}
        clips.append({**texts, **scores._asdict(), **videos})
    names = {"run": str(run.folder), "modalities": COLOURS, "height": height, "width": width}
    values = {**names, "clips": clips, "memories": memories}
    text = json.dumps(values, default=np.ndarray.tolist).replace("<", "\\u003c")  # no caption ends the script
    with written_whole(out) as part:
        part.write_text(PAGE.read_text().replace("/* RUN */ null", text))


def as_uri(file: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()
