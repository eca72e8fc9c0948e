"""Trains the two classifiers that judge reconstructions of the toy world, and writes them beside this file.

    python -m toy.pretrain_classifiers videomae  228 classes such as "a red cross moves left" -> toy/videomae/
    python -m toy.pretrain_classifiers vit       120 classes such as "a red cross in fog"     -> toy/vit/

They judge, so they learn from all 912 combinations: one that learned from the 752 alone had learned which
shapes do not occur with a colour, an action and a background, and saw 82 % of the held-out shapes. They are
of the same transformers classes as the metrics' VideoMAE (Kinetics-400) and ViT (ImageNet); together they
name all four attributes. On one core, about six and three minutes.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, VideoMAEForVideoClassification, ViTForImageClassification

from toy.fit import HELD_OUT, HERE, SEEN, Stage, command, configured, fit, one_cycle
from toy.world import ATTRIBUTES


def class_of(combination: tuple[str, str, str, str], kind: str) -> str:
    """The caption without what the kind does not judge: of a clip its background, of a frame its action."""
    shape, colour, action, background = combination
    return f"a {colour} {shape} {action if kind == 'videomae' else background}"


def classes_of_values(names: list[str]) -> dict[str, Tensor]:
    """Of each attribute in the classes' names: which classes have which value, (classes, values)."""
    table = {}
    for attribute, values in ATTRIBUTES.items():
        holds = torch.tensor([[f" {value} " in f" {name} " for value in values] for name in names])
        if holds.any():
            table[attribute] = holds.float()
    return table


def pretrain_classifier(kind: str, out: Path, steps: int, batch: int, lr: float = 1.5e-3) -> None:
    torch.manual_seed(0)
    pool = SEEN + HELD_OUT
    config = AutoConfig.from_pretrained(HERE / kind)
    truth = torch.tensor([config.label2id[class_of(combination, kind)] for combination in pool])  # (912,)
    model = {"videomae": VideoMAEForVideoClassification, "vit": ViTForImageClassification}[kind](config)
    tables = classes_of_values(list(config.id2label.values()))
    stage = Stage(60)
    rng = np.random.default_rng(2)

    def losses() -> dict[str, Tensor]:
        i = rng.integers(len(pool), size=batch)
        x = stage.clips([pool[k] for k in i], kind == "vit")  # (B, F, 3, 64, 64)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x if kind == "videomae" else x[:, 0]).logits
        log_p = logits.float().log_softmax(-1)  # (B, classes)
        loss = F.nll_loss(log_p, truth[i])
        right = {"class": (log_p.argmax(1) == truth[i]).float().mean()}
        for attribute, table in tables.items():  # P(red) is the sum over the red classes
            p = log_p.exp() @ table  # (B, values)
            value = table[truth[i]].argmax(1)
            loss = loss + F.nll_loss(p.clamp_min(1e-6).log(), value)
            right[attribute] = (p.argmax(1) == value).float().mean()
        return {"loss": loss, **right}

    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0}]
    fit(kind, losses, [one_cycle(groups, lr, steps, warm_up=0.15, beta=0.98)], steps)
    model.half().save_pretrained(configured(out / kind, kind))


if __name__ == "__main__":
    kind, out, given = command(__doc__, ("videomae", "vit"))
    recipes = {"videomae": {"steps": 1800, "batch": 64}, "vit": {"steps": 800, "batch": 192}}
    torch.set_num_threads(1)
    pretrain_classifier(kind, out, **recipes[kind] | given)
