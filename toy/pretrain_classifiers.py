"""Trains the two classifiers that judge reconstructions of the toy world, and writes them beside this file.

    python -m toy.pretrain_classifiers videomae  228 classes such as "a red cross moves left" -> toy/videomae/
    python -m toy.pretrain_classifiers vit       120 classes such as "a red cross in fog"     -> toy/vit/

They judge, so they learn from all combinations (`all_combinations` says why) and are tested on clips they
have not seen. They are of the same transformers classes as the metrics' VideoMAE (Kinetics-400) and ViT
(ImageNet); together they name all four attributes. A class's name is the caption without the attribute that
the classifier does not judge. On one core, about six and three minutes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from support.videos import uniform_frames
from toy.world import ACTIONS, BACKGROUNDS, COLOURS, SHAPES, SIZE, combinations, coverage, random_clip, render

HERE = Path(__file__).parent
LABELS = (SHAPES, tuple(COLOURS), ACTIONS, tuple(BACKGROUNDS))  # in the order of a combination
ATTRIBUTES = ("shape", "colour", "action", "background")


def all_combinations() -> list[tuple]:
    """All 912: a judge must not favour what the models' training showed. One that learned from the 752 alone
    had learned which shapes do not occur with a colour, an action and a background: it saw 99 % of the shapes
    of new clips of those, 82 % of held-out ones."""
    seen, unseen = combinations()
    return seen + unseen


def class_of(combination: tuple[str, str, str, str], kind: str) -> str:
    """The caption, without what a clip's classifier (its background) or a frame's (its action) does not
    judge."""
    shape, colour, action, background = combination
    return f"a {colour} {shape} {action if kind == 'videomae' else background}"


def new_classifier(kind: str) -> torch.nn.Module:
    names = list(dict.fromkeys(class_of(c, kind) for c in all_combinations()))
    labels = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "image_size": SIZE,
    }
    size = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 384,
        "initializer_range": 0.08,
    }
    if kind == "videomae":
        return VideoMAEForVideoClassification(
            VideoMAEConfig(num_frames=16, tubelet_size=4, patch_size=16, **size, **labels)
        )
    return ViTForImageClassification(ViTConfig(patch_size=16, **size, **labels))


class Stage:
    """Random clips of given combinations, faster than `render`: each shape and action is covered `copies`
    times in advance."""

    def __init__(self, copies: int, seed: int, frames: np.ndarray):
        self.rng, self.copies = np.random.default_rng(seed), copies
        self.pool = {}  # (shape, action) -> uint8 (copies, frames, 64, 64)
        for shape, action in tqdm(dict.fromkeys((c[0], c[2]) for c in all_combinations()), desc="rendering"):
            clips = [random_clip((shape, "red", action, "in fog"), self.rng) for _ in range(copies)]
            self.pool[shape, action] = np.stack(
                [(coverage(c)[frames] * 255).round().astype(np.uint8) for c in clips]
            )
        rows = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None]
        grounds = {
            name: np.array(top) + (np.array(bottom) - np.array(top)) * rows
            for name, (top, bottom) in BACKGROUNDS.items()
        }
        self.ground = {
            name: torch.from_numpy(g.T.astype(np.float32) / 255)[..., None] for name, g in grounds.items()
        }  # (3, 64, 1)

    def clips(self, chosen: list[tuple], one_frame: bool) -> torch.Tensor:
        """(B, F, 3, 64, 64), normalised; at random blurred, shifted, noisy and of another brightness, so that
        what is shown is judged and not how sharply."""
        rng, covered = self.rng, []
        for shape, _, action, _ in chosen:
            one = self.pool[shape, action][rng.integers(self.copies)]
            one = one[rng.integers(len(one), size=1)] if one_frame else one
            covered.append(np.roll(one, tuple(rng.integers(-2, 3, 2)), (1, 2)))
        alpha = torch.from_numpy(np.stack(covered)) / 255  # (B, F, 64, 64)
        if rng.random() < 0.4:
            alpha = F.avg_pool2d(alpha, 3, 1, 1, count_include_pad=False)
        ground = torch.stack([self.ground[c[3]] for c in chosen])[:, None]  # (B, 1, 3, 64, 1)
        colour = (
            torch.tensor([COLOURS[c[1]] for c in chosen])[:, None, :, None, None] / 255
        )  # (B, 1, 3, 1, 1)
        gain, offset = (torch.rand(2, len(chosen), 1, 3, 1, 1) - 0.5) * torch.tensor([0.15, 0.08]).view(
            2, 1, 1, 1, 1, 1
        )
        ground, colour = (normalise(v * (1 + gain) + offset) for v in (ground, colour))
        x = ground + alpha[:, :, None] * (colour - ground)
        return x + rng.uniform(0, 0.5) * torch.randn_like(x) if rng.random() < 0.25 else x


def normalise(x: torch.Tensor) -> torch.Tensor:
    return (x - 0.45) / 0.225


def logits_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x (B, F, 3, 64, 64), normalised -> (B, classes), or, where frames are judged one by one, (B F,
    classes)."""
    return model(x).logits if model.config.model_type == "videomae" else model(x.flatten(0, 1)).logits


def pretrain_classifier(
    kind: str, steps: int, batch: int, lr: float, copies: int = 60, out: Path = HERE
) -> None:
    torch.manual_seed(0)
    model = new_classifier(kind)
    pool = all_combinations()
    of = torch.tensor([model.config.label2id[class_of(c, kind)] for c in pool])  # (912,)
    names = list(model.config.id2label.values())
    groups = [
        torch.tensor([[f" {v} " in f" {name} " for v in values] for name in names]) for values in LABELS
    ]
    groups = [g.float() for g in groups if g.any()]  # (classes, values) of each attribute that it judges
    stage = Stage(copies, 1, uniform_frames(17, 16))
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0}], lr, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.15)
    rng = np.random.default_rng(2)
    progress = tqdm(range(steps), desc=kind, mininterval=20)
    for step in progress:
        pick = rng.integers(len(pool), size=batch)
        x = stage.clips([pool[i] for i in pick], kind == "vit")
        with torch.autocast("cpu", torch.bfloat16):
            logits = logits_of(model, x)
        log_p = logits.float().log_softmax(-1)  # (B, classes)
        loss = F.nll_loss(log_p, of[pick])
        for g in groups:  # and of each attribute: P(red) is the sum over the red classes
            p = (log_p.exp() @ g).clamp_min(1e-6).log()
            loss = loss + F.nll_loss(p, g[of[pick]].argmax(1))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 49:
            right = [(log_p.argmax(1) == of[pick]).float().mean().item()]
            right += [
                ((log_p.exp() @ g).argmax(1) == g[of[pick]].argmax(1)).float().mean().item() for g in groups
            ]
            progress.write(
                f"{kind} {step + 1} loss {loss.item():.3f} right {' '.join(f'{r:.2f}' for r in right)}"
            )
    folder = out / kind
    whole = {"height": SIZE, "width": SIZE}
    processor = (
        {"size": {"shortest_edge": SIZE}, "crop_size": whole} if kind == "videomae" else {"size": whole}
    )
    processor |= {"image_mean": [0.45] * 3, "image_std": [0.225] * 3}
    {"videomae": VideoMAEImageProcessor, "vit": ViTImageProcessor}[kind](**processor).save_pretrained(folder)
    model.half().save_pretrained(folder)


@torch.inference_mode()
def classifier_gate(kind: str, out: Path = HERE, copies: int = 4) -> dict[str, float]:
    """What the shipped classifier says of real clips of the held-out combinations."""
    model_class = {"videomae": VideoMAEForVideoClassification, "vit": ViTForImageClassification}[kind]
    model = model_class.from_pretrained(out / kind, dtype=torch.float32).eval()
    rng = np.random.default_rng(4)
    clips = [random_clip(c, rng) for _ in range(copies) for c in combinations()[1]]
    truth = [class_of(c.combination, kind) for c in clips]
    p = []
    for start in range(0, len(clips), 32):
        x = np.stack(
            [render(c)[uniform_frames(17, 16)] for c in clips[start : start + 32]]
        )  # (B, 16, 64, 64, 3)
        x = normalise(torch.from_numpy(x).movedim(-1, 2) / 255)
        one = logits_of(model, x).softmax(-1)
        p.append(one if kind == "videomae" else one.unflatten(0, (len(x), 16)).mean(1))
    p = torch.cat(p)
    names = model.config.id2label
    scores = {"class": float(np.mean([names[int(i)] == t for i, t in zip(p.argmax(1), truth, strict=True)]))}
    for k, (attribute, values) in enumerate(zip(ATTRIBUTES, LABELS, strict=True)):
        g = torch.tensor([[f" {v} " in f" {name} " for v in values] for name in names.values()]).float()
        if g.any():
            scores[attribute] = float(
                np.mean(
                    [
                        values[int(i)] == c.combination[k]
                        for i, c in zip((p @ g).argmax(1), clips, strict=True)
                    ]
                )
            )
    size = sum(f.stat().st_size for f in (out / kind).iterdir()) / 1e6
    found = ", ".join(f"{k} {v:.1%}" for k, v in scores.items())
    print(
        f"{kind}, {len(clips)} new clips of held-out combinations, {len(names)} classes, {size:.2f} MB: "
        f"{found}",
        flush=True,
    )
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("videomae", "vit"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    standard = {
        "videomae": dict(steps=1800, batch=64, lr=1.5e-3),
        "vit": dict(steps=800, batch=192, lr=1.5e-3),
    }[args.kind]
    pretrain_classifier(
        args.kind,
        **standard | {k: v for k, v in vars(args).items() if k in ("steps", "batch", "lr") and v},
        out=args.out,
    )
    classifier_gate(args.kind, args.out)
