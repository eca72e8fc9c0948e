"""Trains the toy world's encoders, of the same classes as the real ones, and writes them beside this file.

    python -m toy.pretrain clip      open_clip CLIP: a frame and its caption              -> toy/clip/
    python -m toy.pretrain viclip    ViCLIP: eight frames and their caption               -> toy/viclip/
    python -m toy.pretrain gates     what both recognise

Both learn from the 752 combinations that training clips may show and are tested on the 160 held out: which of
the captions is the clip's? A frame does not show what its object does, so CLIP is asked for shape, colour and
background only. On two cores, about five minutes each.
"""

from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from prepare.encoders import encode_actions, encode_images, load_clip
from prepare.viclip import ViCLIP
from support.readers import read_json
from toy.fit import HELD_OUT, HERE, SEEN, clips_of, command, configured, fit, one_cycle, pixels, rendered
from toy.world import ACTIONS


def contrast(video: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """CLIP's loss: InfoNCE in both directions. video, text (B, D)."""
    logits = log_scale.exp() * F.normalize(video, dim=-1) @ F.normalize(text, dim=-1).T
    diagonal = torch.arange(len(logits))
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def pick(copies: int, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of `batch` clips (of `clips_of`) of which no two show the same combination."""
    return rng.permutation(len(SEEN))[:batch] + len(SEEN) * rng.integers(0, copies, batch)


def pretrain_clip(out: Path, steps: int = 1500, batch: int = 192, lr: float = 1e-3) -> None:
    folder = configured(out / "clip", "clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(**read_json(folder / "open_clip_config.json")["model_cfg"])
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    rng = np.random.default_rng(0)
    clips = clips_of(SEEN, 6, seed=1)
    frames = rendered(clips, 8)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([clip.caption for clip in clips[: len(SEEN)]])

    def losses() -> dict[str, Tensor]:
        i = pick(6, batch, rng)
        x = pixels(frames[i, rng.integers(0, 8, batch)], mean, std)
        image, text = model.encode_image(x), model.encode_text(tokens[i % len(SEEN)])
        return {"loss": contrast(image, text, model.logit_scale)}

    fit("clip", losses, [one_cycle(model.parameters(), lr, steps)], steps)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")


def pretrain_viclip(out: Path, steps: int = 700, batch: int = 96, lr: float = 1e-3) -> None:
    """An embedding of what happens more than of how it looks, as ViCLIP is there for (§3.1): each clip is to
    find the words for its action among the eight, and, weighing less, its caption. Patches of 32: with 16 no
    training found out left from right."""
    config = ViCLIP.from_pretrained(HERE / "viclip").config
    torch.manual_seed(0)
    model = ViCLIP(config)
    # at 0 no frame is before another
    nn.init.normal_(model.vision_encoder.temporal_positional_embedding, std=0.3)
    rng = np.random.default_rng(0)
    clips = clips_of(SEEN, 12, seed=2)
    frames = rendered(clips, 8)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{HERE / 'clip'}")
    actions, captions = tokenizer(list(ACTIONS)), tokenizer([clip.caption for clip in clips[: len(SEEN)]])
    action_of = torch.tensor([ACTIONS.index(clip.action) for clip in clips])
    log_scale = nn.Parameter(torch.tensor(2.66))

    def losses() -> dict[str, Tensor]:
        i = pick(12, batch, rng)
        video = model.encode_video(pixels(frames[i], config.image_mean, config.image_std))  # (B, D)
        text = model.encode_text(torch.cat([actions, captions[i % len(SEEN)]]))  # (8 + B, D)
        action, caption = text.split([len(ACTIONS), batch])
        logits = log_scale.exp() * F.normalize(video, dim=-1) @ F.normalize(action, dim=-1).T  # (B, 8)
        return {"loss": F.cross_entropy(logits, action_of[i]) + 0.3 * contrast(video, caption, log_scale)}

    fit("viclip", losses, [one_cycle([*model.parameters(), log_scale], lr, steps)], steps)
    model.temp.data = 1 / log_scale.data.exp()
    model.save_pretrained(out / "viclip")


def gate(network: str, out: Path) -> None:
    """What an encoder recognises of the held-out combinations: how often the nearest text is right."""
    clips = clips_of(HELD_OUT, 4, seed=3)
    frames, captions = rendered(clips, 8), [clip.caption for clip in clips]
    if network == "clip":
        clip, _, tokenizer = load_clip(f"local-dir:{out / 'clip'}")
        e, encode = encode_images(clip, frames).mean(1), clip.encode_text
        looks = [(clip.shape, clip.colour, clip.background) for clip in clips]
        question = "shape, colour, background of the nearest of 160 captions right (chance 1.2%: 80 looks)"
        questions = [(question, captions[:160], looks, looks)]
    else:
        viclip = ViCLIP.from_pretrained(out / "viclip")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{HERE / 'clip'}")
        e, encode = encode_actions(viclip, frames), viclip.encode_text
        question = "all four attributes of the nearest of 160 captions right (chance 0.6%)"
        questions = [(question, captions[:160], captions, captions)]
        question, actions = "the nearest of the eight actions right (chance 12.5%)", list(ACTIONS)
        questions += [(question, actions, actions, [clip.action for clip in clips])]
    for question, texts, answers, truth in questions:
        with torch.inference_mode():
            e_text = F.normalize(encode(tokenizer(texts)), dim=-1).numpy()
        right = [truth[i] == answers[j] for i, j in enumerate((e @ e_text.T).argmax(1))]
        print(f"{network}, held-out clips: {question} in {np.mean(right):.1%}")


if __name__ == "__main__":
    network, out, recipe = command(__doc__, ("clip", "viclip", "gates"))
    for name, pretrain in {"clip": pretrain_clip, "viclip": pretrain_viclip}.items():
        if network == name:
            pretrain(out, **recipe)
        if network in (name, "gates"):
            gate(name, out)
