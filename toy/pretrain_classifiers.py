"""Trains the two classifiers that judge reconstructions of the toy world, and writes them beside this file.

    python -m toy.pretrain_classifiers videomae  228 classes such as "a red cross moves left" -> toy/videomae/
    python -m toy.pretrain_classifiers vit       120 classes such as "a red cross in fog"     -> toy/vit/

They judge, so they learn from all 912 combinations: one that learned from the 752 alone had learned which
shapes do not occur with a colour, an action and a background, and saw 99 % of the shapes of new clips of
those, 82 % of held-out ones. They are tested on clips they have not seen. They are of the same transformers
classes as the metrics' VideoMAE (Kinetics-400) and ViT (ImageNet); together they name all four attributes. A
class's name is the caption without the attribute that the classifier does not judge. On one core, about six
and three minutes.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, VideoMAEForVideoClassification, ViTForImageClassification

from metrics.classes import Classifier
from toy.fit import HERE, Stage, command, configured, fit, one_cycle, rendered
from toy.world import ATTRIBUTES, combinations, random_clip


def class_of(combination: tuple[str, str, str, str], kind: str) -> str:
    """The caption, without what a clip's classifier (its background) or a frame's (its action) does not
    judge."""
    shape, colour, action, background = combination
    return f"a {colour} {shape} {action if kind == 'videomae' else background}"


def classes_of_values(names: list[str]) -> dict[str, Tensor]:
    """Of each attribute that the classes' names hold: which classes have which of its values, (classes,
    values)."""
    table = {}
    for attribute, values in ATTRIBUTES.items():
        holds = torch.tensor([[f" {value} " in f" {name} " for value in values] for name in names])
        if holds.any():
            table[attribute] = holds.float()
    return table


def pretrain_classifier(kind: str, out: Path, steps: int, batch: int, lr: float = 1.5e-3) -> None:
    torch.manual_seed(0)
    pool = [combination for part in combinations() for combination in part]
    config = AutoConfig.from_pretrained(HERE / kind)
    truth = torch.tensor([config.label2id[class_of(combination, kind)] for combination in pool])  # (912,)
    model = {"videomae": VideoMAEForVideoClassification, "vit": ViTForImageClassification}[kind](config)
    stage, rng, tables = (
        Stage(60),
        np.random.default_rng(2),
        classes_of_values(list(config.id2label.values())),
    )

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        i = rng.integers(len(pool), size=batch)
        x = stage.clips([pool[k] for k in i], kind == "vit")  # (B, F, 3, 64, 64)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x if kind == "videomae" else x[:, 0]).logits
        log_p = logits.float().log_softmax(-1)  # (B, classes)
        loss = F.nll_loss(log_p, truth[i])
        right = {"class": (log_p.argmax(1) == truth[i]).float().mean()}
        for (
            attribute,
            table,
        ) in tables.items():  # and of each attribute: P(red) is the sum over the red classes
            p, value = log_p.exp() @ table, table[truth[i]].argmax(1)
            loss = loss + F.nll_loss(p.clamp_min(1e-6).log(), value)
            right[attribute] = (p.argmax(1) == value).float().mean()
        return loss, right

    parameters = list(model.parameters())
    matrices = {"params": [p for p in parameters if p.dim() > 1]}
    rest = {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0}
    schedule = one_cycle([matrices, rest], lr, steps, warm_up=0.15, beta=0.98)
    fit(kind, parameters, loss_of, [schedule], steps)
    model.half().save_pretrained(configured(out / kind, kind))


@torch.inference_mode()
def classifier_gate(kind: str, out: Path) -> dict[str, float]:
    """What the classifier sees in 640 new clips of the held-out combinations: share of the clips whose class,
    and each attribute of it, is right."""
    judge, rng = Classifier(out / kind), np.random.default_rng(4)
    clips = [random_clip(combination, rng) for combination in combinations()[1] * 4]
    p = torch.tensor(np.stack([judge(video).mean(0) for video in rendered(clips, 16)]))  # (clips, classes)
    scores = {
        "class": [
            judge.names[i] == class_of(c.combination, kind) for i, c in zip(p.argmax(1), clips, strict=True)
        ]
    }
    for attribute, table in classes_of_values(judge.names).items():
        values = [ATTRIBUTES[attribute][i] for i in (p @ table).argmax(1)]
        scores[attribute] = [value == getattr(c, attribute) for value, c in zip(values, clips, strict=True)]
    shares = {name: float(np.mean(right)) for name, right in scores.items()}
    size = sum(file.stat().st_size for file in (out / kind).iterdir()) / 1e6
    text = (
        f"{kind}, {len(clips)} new clips of held-out combinations, {len(judge.names)} classes, {size:.2f} MB:"
    )
    print(text, ", ".join(f"{name} {share:.1%}" for name, share in shares.items()), flush=True)
    return shares


if __name__ == "__main__":
    kind, out, given = command(__doc__, ("videomae", "vit"))
    recipes = {"videomae": {"steps": 1800, "batch": 64}, "vit": {"steps": 800, "batch": 192}}
    torch.set_num_threads(1)
    pretrain_classifier(kind, out, **recipes[kind] | given)
    classifier_gate(kind, out)
