"""Trains the tiny frozen encoders of the toy world, of the same classes as the real ones, and writes them
beside this file.

    python -m toy.pretrain clip      open_clip CLIP: a frame and its caption              -> toy/clip/
    python -m toy.pretrain viclip    ViCLIP: eight frames and their caption               -> toy/viclip/

Both learn from the 752 combinations of attributes that training clips may show and are tested on the 160 held
out: which of the captions is the clip's? A frame does not show what its object does, so CLIP is asked for
shape, colour and background only. On two cores, about five minutes each. The seed is fixed; another machine's
rounding may change the last digit.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from prepare.encoders import encode_actions, encode_images, encode_texts, load_clip
from prepare.viclip import ViCLIP, ViCLIPConfig
from support.videos import uniform_frames
from toy.world import ACTIONS, BACKGROUNDS, COLOURS, SHAPES, Clip, combinations, random_clip, render

HERE = Path(__file__).parent
CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 128, "head_width": 32, "patch_size": 16},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 40,
        "width": 64,
        "heads": 2,
        "layers": 2,
        "hf_tokenizer_name": "tokenizer.json",
    },
}
VICLIP = {
    "image_size": 64,
    "patch_size": 32,
    "vision_width": 128,
    "vision_layers": 3,
    "vision_heads": 4,
    "embed_dim": 64,
}
VICLIP_TEXT = {"text_width": 64, "text_layers": 2, "text_heads": 2, "vocab_size": 40, "context_length": 16}


def shown(pool: list[tuple], copies: int, seed: int) -> tuple[list[Clip], np.ndarray]:
    """`copies` random clips of each combination, and their eight frames, uint8 (clips, 8, 64, 64, 3)."""
    rng = np.random.default_rng(seed)
    clips = [random_clip(combination, rng) for _ in range(copies) for combination in pool]
    pick = uniform_frames(17, 8)
    return clips, np.stack([render(clip)[pick] for clip in tqdm(clips, desc="rendering")])


def contrast(video: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """CLIP's loss: InfoNCE in both directions. video, text (B, D)."""
    logits = log_scale.exp() * F.normalize(video, dim=-1) @ F.normalize(text, dim=-1).T
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train(
    parameters: list[nn.Parameter], loss_of, clips: int, combinations: int, steps: int, batch: int, lr: float
) -> None:
    """AdamW, OneCycle; a batch never has the same combination twice (the clips lie combination by
    combination, copy after copy)."""
    optimiser = torch.optim.AdamW(parameters, lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(0)
    progress = tqdm(range(steps))
    for _ in progress:
        pick = rng.permutation(combinations)[:batch] + combinations * rng.integers(
            0, clips // combinations, batch
        )
        loss = loss_of(pick, rng)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def pixels(frames: np.ndarray, mean: list[float], std: list[float]) -> torch.Tensor:
    """uint8 (..., H, W, 3) -> normalised (..., 3, H, W)."""
    x = torch.from_numpy(frames).movedim(-1, -3).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def top_1(e: np.ndarray, e_txt: np.ndarray, own: list, of_text: list) -> float:
    """Share of the clips whose most similar caption says what the clip shows."""
    return float(np.mean([own[i] == of_text[j] for i, j in enumerate((e @ e_txt.T).argmax(1))]))


def pretrain_clip(steps: int = 1500, batch: int = 192) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = HERE / "clip"
    folder.mkdir(exist_ok=True)
    words = " ".join(["a", *SHAPES, *COLOURS, *ACTIONS, *BACKGROUNDS]).split()
    vocabulary = {
        word: i for i, word in enumerate(dict.fromkeys(["<pad>", "<unk>", "<bos>", *words, "<eos>"]))
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in ("<bos>", "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    stats = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CLIP, "preprocess_cfg": stats}, indent=2) + "\n"
    )

    torch.manual_seed(0)
    model = open_clip.CLIP(**{k: dict(v) if isinstance(v, dict) else v for k, v in CLIP.items()})
    seen, unseen = combinations()
    clips, frames = shown(seen, 6, seed=1)
    encode = open_clip.get_tokenizer(f"local-dir:{HERE / 'clip'}")
    tokens = encode([clip.caption for clip in clips[: len(seen)]])

    def loss_of(pick: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        x = pixels(frames[pick, rng.integers(0, 8, len(pick))], **stats)
        return contrast(model.encode_image(x), model.encode_text(tokens[pick % len(seen)]), model.logit_scale)

    train(list(model.parameters()), loss_of, len(clips), len(seen), steps, batch, lr=1e-3)
    save_file(
        {k: v.half().contiguous() for k, v in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )


def pretrain_viclip(steps: int = 700, batch: int = 96, caption_weight: float = 0.3) -> None:
    """An embedding of what happens more than of how it looks, as ViCLIP is there for (§3.1): each clip is to
    find the words for its action among the eight, and, weighing less, its caption. Patches of 32: with 16 no
    training found out left from right."""
    torch.manual_seed(0)
    model = ViCLIP(ViCLIPConfig(**VICLIP, **VICLIP_TEXT))
    nn.init.normal_(
        model.vision_encoder.temporal_positional_embedding, std=0.3
    )  # at 0 no frame is before another
    seen, unseen = combinations()
    clips, frames = shown(seen, 12, seed=2)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{HERE / 'clip'}")
    captions, actions = tokenizer([clip.caption for clip in clips[: len(seen)]]), tokenizer(list(ACTIONS))
    own_action = torch.tensor([ACTIONS.index(clip.action) for clip in clips])
    log_scale, c = nn.Parameter(torch.tensor(2.66)), model.config

    def loss_of(pick: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        video = model.encode_video(pixels(frames[pick], c.image_mean, c.image_std))  # (B, D)
        text = model.encode_text(torch.cat([actions, captions[pick % len(seen)]]))  # (8 + B, D)
        by_action = (
            log_scale.exp() * F.normalize(video, dim=-1) @ F.normalize(text[: len(ACTIONS)], dim=-1).T
        )  # (B, 8)
        return F.cross_entropy(by_action, own_action[pick]) + caption_weight * contrast(
            video, text[len(ACTIONS) :], log_scale
        )

    train([*model.parameters(), log_scale], loss_of, len(clips), len(seen), steps, batch, lr=1e-3)
    model.temp.data = 1 / log_scale.data.exp()
    model.save_pretrained(HERE / "viclip")


def gates() -> None:
    """What the shipped encoders recognise of the held-out combinations."""
    clips, frames = shown(combinations()[1], 4, seed=3)
    clip, _, tokenizer = load_clip(f"local-dir:{HERE / 'clip'}")
    captions = [c.caption for c in clips[: len(clips) // 4]]
    looks = [(c.shape, c.colour, c.background) for c in clips]
    e_txt = encode_texts(clip, tokenizer, captions)
    frame_accuracy = top_1(encode_images(clip, frames).mean(1), e_txt, looks, looks[: len(captions)])
    print(
        f"CLIP, held-out clips: shape, colour, background of the nearest of {len(captions)} captions right "
        f"in {frame_accuracy:.1%}"
    )
    viclip = ViCLIP.from_pretrained(HERE / "viclip")
    with torch.inference_mode():
        e_text = F.normalize(viclip.encode_text(tokenizer(captions)), dim=-1).numpy()
    shows = [c.combination for c in clips]
    all_right = top_1(encode_actions(viclip, frames), e_text, shows, shows[: len(captions)])
    print(
        f"ViCLIP, held-out clips: all four attributes of the nearest of {len(captions)} captions right in "
        f"{all_right:.1%}"
    )
    with torch.inference_mode():
        e_action = F.normalize(viclip.encode_text(tokenizer(list(ACTIONS))), dim=-1).numpy()
    action_right = top_1(encode_actions(viclip, frames), e_action, [c.action for c in clips], list(ACTIONS))
    print(f"ViCLIP, held-out clips: the nearest of the eight actions right in {action_right:.1%}")
    print("chance: 1.2% (80 different looks), 0.6% and 12.5%")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("clip", "viclip", "gates"))
    what = parser.parse_args().what
    if what != "gates":
        {"clip": pretrain_clip, "viclip": pretrain_viclip}[what]()
    if what != "clip":
        gates()
