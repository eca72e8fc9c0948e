"""What was remembered of a clip (§3.2): K memories, the scores of Eq. 5, the attention of Eq. 6; a picture
and a page. Called by extras/figures.py."""

import base64
import json
import re
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from extras.runs import Run, caption_of, frames_of, judged, save_figure, video_file
from mixture_of_memories import MixtureOfMemories
from prepare.facts import SECONDS, raw_folder
from support.files import written_whole
from support.pictures import strip
from support.readers import check_keys, reading
from support.videos import read_clip, read_video, video_frames, write_for_browsers

COLOURS = {"txt": "#3b6ea5", "img": "#d98324", "act": "#4f9a5b"}  # of the modalities
PAGE = Path(__file__).with_suffix(".html")
PLAYER = PAGE.with_name("player.html")  # the shell of the pages
PICTURED = 5  # memories of a clip that a picture has room for; the page shows all


class Scores(NamedTuple):
    """Of one clip."""

    retrieved: list[int]  # its memories i_1 ... i_K
    W_r: np.ndarray  # (3,) the router's weights
    cosines: np.ndarray  # (K, 3) of q and each memory: S = cosines @ W_r, Eq. 5
    attention: np.ndarray | None  # (K, 2), of image and action; None without MoM


def attention(mom: MixtureOfMemories, f_e: Tensor, e: Tensor, S: Tensor) -> Tensor:
    """How much each memory counts in Eq. 6: the softmax over the K memories, mean over heads and tokens.

    f_e (L, D'), e (K, 3, D) and S (K,) of a clip -> (K, 2), of image and action; its columns sum to 1."""
    integration, e_mem = mom.integration, e.shape[-1] ** 0.5 * e
    log_w = (S / mom.tau).log_softmax(-1)  # (K,)
    Q = integration.W_Q(f_e).unflatten(-1, (integration.heads, -1)).transpose(0, 1)  # (heads, L, d)
    weights = []
    for m, cross_attention in enumerate((integration.img, integration.act), 1):
        keys = cross_attention.W_K(e_mem[:, m]).unflatten(-1, (integration.heads, -1)).transpose(0, 1)
        logits = Q @ keys.mT / Q.shape[-1] ** 0.5 + log_w  # (heads, L, K)
        weights.append(logits.softmax(-1).mean((0, 1)))  # (K,)
    return torch.stack(weights, -1)


class Remembered:
    """What a run remembered of these clips, {number: its group}.

    memories: lines of clips.jsonl, one a memory; lines and scores of each clip; films: the folder of the
    stimuli, by default the release's. Raises ValueError for a control, whose memories are not the clips'."""

    def __init__(self, folder: Path, groups: dict[int, str], films: Path | None = None):
        self.run = run = Run(folder, "stage2")
        if re.search("-shuffled|-no-stage2", run.evaluation.name):
            raise ValueError(f"{folder}: memories are shown of the run, not of a control: name {run.folder}")
        self.groups = groups
        self.films = films or raw_folder(run.data, run.subject) / "stimuli"
        self.size = (run.settings["frames"], run.settings["height"], run.settings["width"])
        test, clips = run.test_clips(), [*groups]
        self.lines = {clip: test.lines[clip] for clip in clips}
        brain_model, heads, mom, pool, self.memories = run.parts()
        self.scores: dict[int, Scores] = {}
        with reading(run.stage, advice="python train_stage2.py makes it anew"), torch.inference_mode():
            for clip, x in zip(clips, test.averaged()[clips], strict=True):  # (T, N)
                f_c, f_e = brain_model(x[None])  # (1, D), (1, L, D')
                q = heads.queries(f_c)  # (1, 3, D)
                recalled = mom(f_e, q, pool)
                indices, e = recalled.indices[0], pool.e[recalled.indices[0]]  # (K,), (K, 3, D)
                cosines, weights = (e * normalize(q, dim=-1)).sum(-1).numpy(), None  # (K, 3)
                if isinstance(mom, MixtureOfMemories):
                    weights = attention(mom, f_e[0], e, recalled.S[0, indices]).numpy()
                self.scores[clip] = Scores(indices.tolist(), recalled.W_r[0].numpy(), cosines, weights)

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
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rcParams["text.parse_math"] = False  # a caption may have a $
    run, n = remembered.run.evaluation, len(remembered.scores)
    K = min(PICTURED, max(len(scores.retrieved) for scores in remembered.scores.values()))
    figure = Figure(figsize=(2.6 * (K + 2), 2.5 * n), layout="constrained")
    axes = figure.subplots(2 * n, K + 2, squeeze=False, height_ratios=(3.2, 1) * n)
    for above, below, (clip, scores) in zip(axes[::2], axes[1::2], remembered.scores.items(), strict=True):
        caption = caption_of(remembered.lines[clip], remembered.groups[clip])
        draw_video(above[0], frames_of(run, "gt", clip), caption)
        draw_video(above[-1], frames_of(run, "recon", clip), "")
        draw_router(below[0], scores.W_r)
        draw_attention(below[-1], scores.attention)
        for k, i in enumerate(scores.retrieved[:K], 1):
            draw_video(above[k], remembered.film(i), remembered.memories[i]["caption"])
            draw_score(below[k], scores.W_r * scores.cosines[k - 1])
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
    text = "\n".join(textwrap.wrap(caption, 36, max_lines=3, placeholder=" ..."))
    ax.set_xlabel(text, fontsize=8, color="#444444")
    ax.spines[:].set_visible(False)


def draw_score(ax, parts: np.ndarray) -> None:
    """A memory's score S as a bar of three parts, weight x cosine (3,); a negative one is drawn back over the
    others."""
    starts = np.cumsum([0, *np.maximum(parts, 0)])[:3]
    ax.barh([0] * 3, parts, left=starts, color=[*COLOURS.values()])
    ax.set(xlim=(0, 1), ylim=(-1, 1), yticks=[], xticks=[])
    ax.text(0.99, 0.97, f"S = {parts.sum():.3f}", fontsize=8, transform=ax.transAxes, ha="right", va="top")


def draw_router(ax, W_r: np.ndarray) -> None:
    ax.bar(list(COLOURS), W_r, color=list(COLOURS.values()))
    ax.set(ylim=(0, 1), yticks=[0, 1])
    ax.set_title("router weights W_r", fontsize=8)


def draw_attention(ax, attention: np.ndarray | None) -> None:
    """Eq. 6's attention (K, 2) over the memories, the best score first; nothing without MoM."""
    if attention is None:
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
    run, (_, height, width) = remembered.run, remembered.size
    memories, clips, seen = {}, [], judged(run.evaluation)
    for i in sorted({i for scores in remembered.scores.values() for i in scores.retrieved}):
        line, video = remembered.memories[i], as_uri(remembered.film(i), SECONDS[run.data])
        memories[i] = {"caption": line["caption"], "id": line["id"], "video": video}
    for clip, scores in remembered.scores.items():
        line, group = remembered.lines[clip], remembered.groups[clip]
        texts = {"clip": clip, "id": line["id"], "caption": line["caption"], "group": group}
        videos = {kind: file_as_uri(video_file(run.evaluation, kind, clip)) for kind in ("gt", "recon")}
        values = " ".join(seen.get(f"{clip:04d}.mp4", {}).values())
        clips.append({**texts, **scores._asdict(), **videos, "seen": values and f"seen as {values}"})
    names = {"run": str(run.folder), "modalities": COLOURS, "height": height, "width": width}
    write_page(PAGE, {**names, "clips": clips, "memories": memories}, out)


def write_page(page: Path, values: dict, out: Path) -> None:
    """A page that holds all it shows: the shell, in it the page, in it these values."""
    head, main = page.read_text(encoding="utf-8").split("<main>")
    text = json.dumps(values, default=np.ndarray.tolist).replace("<", "\\u003c")  # no caption ends the script
    shell = PLAYER.read_text(encoding="utf-8").replace("<!-- HEAD -->", head)
    shell = shell.replace("<!-- MAIN -->", "<main>" + main)
    with written_whole(out) as part:
        part.write_text(shell.replace("/* RUN */ null", text), encoding="utf-8")


def file_as_uri(file: Path, rows: int = 256) -> str:
    film = read_video(file)
    return as_uri(film.frames, len(film.frames) / film.fps, rows)


def as_uri(frames: np.ndarray, seconds: float, rows: int = 256) -> str:
    """uint8 (F, H, W, 3) -> what a browser plays: its pixels are enlarged to so many rows or so."""
    _, H, W, _ = frames.shape
    k = max(1, rows // H)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.mp4")
        write_for_browsers(file, frames, seconds, (k * W + k * W % 2, k * H + k * H % 2))
        return "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()
