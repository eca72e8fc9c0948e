"""ViCLIP, InternVid's video-text model (arXiv 2307.06942): its video tower makes e_act (§3.1).

Parameters are named as in the published checkpoint, so that it loads whole.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from open_clip.transformer import QuickGELU, TextTransformer, Transformer
from safetensors.torch import save_file
from torch import Tensor, nn

from prepare.facts import VICLIP_FILE, VICLIP_HUB
from support.files import write_json
from support.readers import check_keys, check_tensors, read_json, read_state, read_tensors, reading


@dataclass
class ViCLIPConfig:
    """Sizes, by default of the published L/14; mean and deviation are ImageNet's, as InternVid's."""

    image_size: int = 224
    patch_size: int = 14
    num_frames: int = 8
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    vocab_size: int = 49408
    context_length: int = 32
    embed_dim: int = 768
    image_mean: Sequence[float] = (0.485, 0.456, 0.406)
    image_std: Sequence[float] = (0.229, 0.224, 0.225)


class VideoTransformer(nn.Module):
    """The video tower: CLIP's image transformer, attending over the patches of all frames at once."""

    def __init__(self, c: ViCLIPConfig):
        super().__init__()
        W, P = c.vision_width, (c.image_size // c.patch_size) ** 2  # P: patches of a frame
        patch, scale = (1, c.patch_size, c.patch_size), W**-0.5
        self.conv1 = nn.Conv3d(3, W, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(W))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + P, W))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, c.num_frames, W))
        self.ln_pre, self.ln_post = nn.LayerNorm(W), nn.LayerNorm(W)
        self.transformer = Transformer(W, c.vision_layers, c.vision_heads, act_layer=QuickGELU)
        self.proj = nn.Parameter(scale * torch.randn(W, c.embed_dim))

    def forward(self, frames: Tensor) -> Tensor:
        """frames (B, F, 3, H, W), normalised -> (B, D). ValueError for another number of frames."""
        B, F = frames.shape[:2]  # clips, frames
        expected = self.temporal_positional_embedding.shape[1]
        if F != expected:
            raise ValueError(f"ViCLIP got {F} frames a clip, wanted {expected}: pick as uniform_frames does")
        # fmt: off
        x = self.conv1(frames.transpose(1, 2))                                         # (B, W, F, h, w)
        x = x.flatten(3).permute(0, 2, 3, 1)                                           # (B, F, P, W)
        x = x + self.positional_embedding[1:]                                          # (B, F, P, W)
        x = x + self.temporal_positional_embedding[:, :, None]                         # (B, F, P, W)
        cls = (self.class_embedding + self.positional_embedding[0]).expand(B, 1, -1)   # (B, 1, W)
        x = torch.cat([cls, x.flatten(1, 2)], dim=1)                                   # (B, 1 + F P, W)
        x = self.transformer(self.ln_pre(x))                                           # (B, 1 + F P, W)
        return self.ln_post(x[:, 0]) @ self.proj                                       # (B, D)
        # fmt: on


class ViCLIP(nn.Module):
    """Both towers and the temperature: the logits of its InfoNCE are cosine / temp."""

    def __init__(self, config: ViCLIPConfig | None = None):
        super().__init__()
        self.config = c = config or ViCLIPConfig()
        self.vision_encoder = VideoTransformer(c)
        self.text_encoder = TextTransformer(
            c.context_length,
            c.vocab_size,
            width=c.text_width,
            heads=c.text_heads,
            layers=c.text_layers,
            output_dim=c.embed_dim,
            act_layer=QuickGELU,
        )
        self.temp = nn.Parameter(torch.tensor(0.01))

    def encode_video(self, frames: Tensor) -> Tensor:
        """(B, F, 3, H, W), normalised by the config's mean and std -> (B, D)."""
        return self.vision_encoder(frames)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Ids (B, context_length) of `open_clip.get_tokenizer("ViT-L-14")(captions, 32)` -> (B, D)."""
        return self.text_encoder(tokens)

    @classmethod
    def from_pretrained(cls, path: str | Path, config: ViCLIPConfig | None = None) -> "ViCLIP":
        """A frozen fp32 ViCLIP of a folder (config.json, model.safetensors), of a file of weights (.pth or
        .safetensors; L/14 unless `config` is given), or "OpenGVLab/ViCLIP", which is downloaded.

        Raises FileNotFoundError that says what to download, and ValueError that names a damaged file.
        """
        sizes, weights = _find(Path(path))
        with reading(weights, advice="download it again"):
            with reading(sizes or weights, "the sizes of a ViCLIP"):
                if sizes:
                    values = read_json(sizes)
                    kinds = {name: list if name in ("image_mean", "image_std") else int for name in values}
                    config = ViCLIPConfig(**check_keys(values, sizes, kinds))
                with torch.device("meta"):  # what a damaged config asks for takes no memory yet
                    empty = cls(config)
            state = read_weights(weights, empty)
        model = cls(config)
        model.load_state_dict(state)
        return model.eval().requires_grad_(False)

    def save_pretrained(self, path: str | Path) -> None:
        """Write `path`/config.json and model.safetensors, in half precision."""
        write_json(Path(path, "config.json"), asdict(self.config))
        state = {name: value.half() for name, value in self.state_dict().items()}
        save_file(state, Path(path, "model.safetensors"))


def read_weights(file: Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights that `model` has, no more and no fewer: of .safetensors, or of a checkpoint of torch."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if file.suffix == ".safetensors":
        return read_tensors(file, shapes)
    state = read_state(file, {})
    state = state.get("model", state.get("module", state))  # as ViCLIP's is published
    return check_tensors(check_keys(state, file, dict.fromkeys(state, Tensor)), file, shapes)


def _find(path: Path) -> tuple[Path | None, Path]:
    """The config of a folder, if it is one, and the file of weights. Raises FileNotFoundError."""
    if path.as_posix() == VICLIP_HUB and not path.exists():
        with suppress(OSError):  # what all errors of the Hub are: no network, terms not accepted
            path = Path(hf_hub_download(VICLIP_HUB, VICLIP_FILE))
    sizes, weights = (path / "config.json", path / "model.safetensors") if path.is_dir() else (None, path)
    missing = [str(file) for file in (sizes, weights) if file and not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"ViCLIP: {', '.join(missing)} not found; wanted: a folder of config.json and model.safetensors, "
            f"or the published weights: `hf download {VICLIP_HUB} {VICLIP_FILE} --local-dir weights` (it may "
            f"ask for `hf auth login`, and that you accept its terms), then name weights/{VICLIP_FILE}"
        )
    return sizes, weights
