"""Where the fMRI falls among the memories (Eq. 5), and how loud it speaks in the prompt (Eq. 7-8), by token.
Called by extras/figures.py."""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from extras.runs import Run, save_figure
from metrics.attributes import attribute_values
from mixture_of_memories import condition

SEEN_BY = {"text": "shape", "image": "background", "action": "action"}  # the toy's attribute of a colour


def draw(folder: Path, out: Path) -> None:
    """Three maps, one a modality: dots are memories e, crosses the queries q of the held-out clips, both on
    the two directions in which the memories differ most (PCA). Beside them, by token, the norms of the two
    streams of Eq. 8. Raises ValueError for a run without MoM."""
    from matplotlib.figure import Figure

    run = Run(folder, "stage2")
    if not run.settings.get("mom", True):
        raise ValueError(f"{folder} has no Mixture-of-Memories: name a run that has one")
    brain_model, heads, mom, pool, memories = run.parts()
    test, alpha, e = run.test_clips(), mom.integration.alpha, pool.e  # (N, 3, D)
    queries, norms = [], []
    with torch.inference_mode():
        for x in test.averaged():  # (T, N); one clip at a time: z_f and z_t are large
            f_c, recalled = condition(brain_model, heads, mom, pool, x[None])
            queries.append(normalize(heads.queries(f_c), dim=-1))  # (1, 3, D)
            z_t, z_f = recalled.z_t[0], alpha * recalled.z_f[0]  # (L, D_txt)
            norms.append(torch.stack([z_t.norm(dim=-1), z_f.norm(dim=-1)]))  # (2, L)
    q = torch.cat(queries).numpy()  # (clips, 3, D)
    values = attribute_values([*memories, *test.lines])
    figure = Figure(figsize=(17, 4.4), layout="constrained")
    *axes, last = figure.subplots(1, 4)
    for m, (ax, name) in enumerate(zip(axes, SEEN_BY, strict=True)):
        draw_map(ax, e[:, m].numpy(), q[:, m], values.get(SEEN_BY[name]))
        ax.set_title(f"{name}; a colour: one {SEEN_BY[name]}" if values else name)
    draw_norms(last, torch.stack(norms).numpy())
    save_figure(out, figure)


def draw_map(ax, e: np.ndarray, q: np.ndarray, values: list[str] | None) -> None:
    """Unit vectors of memories, e (N, D), and of queries, q (clips, D); values: of both in a row, that give
    them their colours."""
    mean = e.mean(0)
    _, _, directions = np.linalg.svd(e - mean, full_matrices=False)
    colours = np.unique(values, return_inverse=True)[1] if values else np.zeros(len(e) + len(q))
    places = (np.concatenate([e, q]) - mean) @ directions[:2].T  # (N + clips, 2)
    for part, size, marker in ((slice(len(e)), 9, "."), (slice(len(e), None), 34, "x")):
        style = dict(cmap="tab10", vmin=0, vmax=9, linewidths=0.9)
        ax.scatter(*places[part].T, size, colours[part], marker=marker, **style)
    ax.set(xticks=[], yticks=[], xlabel="dots: memories e; crosses: queries q of held-out clips")


def draw_norms(ax, norms: np.ndarray) -> None:
    """norms (clips, 2, L) of z_t and α z_f: the mean over the clips, and their deviation."""
    token = np.arange(norms.shape[-1])
    for k, name in enumerate(("‖z_t‖, the caption's stream", "‖α z_f‖, the fMRI's")):
        mean, deviation = norms[:, k].mean(0), norms[:, k].std(0)
        ax.plot(token, mean, ".-", label=name)
        ax.fill_between(token, mean - deviation, mean + deviation, alpha=0.2)
    ax.set(xlabel="token of the prompt", title="the two streams of Eq. 8", ylim=(0, None))
    ax.legend(fontsize=8)
