"""For the video decoder, beside the embeddings: latents, text tokens and the empty prompt (§4.1).

stimuli/{train,test}/<decoder>/latents-FxHxW.npy    float16 (clips, C, f, h, w) of videos of this size
stimuli/{train,test}/<decoder>/text_tokens.npy      float16 (rows, D_txt), the real tokens of each caption
stimuli/{train,test}/<decoder>/text_offsets.npy     int64 (clips + 1,), where each caption's rows begin
stimuli/<decoder>/empty_prompt.npy                  float32 (L, D_txt)
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from prepare.facts import decoder_recipes, is_made_for, latents_name
from prepare.release import Release
from prepare.stimuli import clips_from, encode_all, first_sentences
from support.files import hashes, resumable_arrays, writing_array
from support.pipelines import latent_shape, load_pipeline
from support.readers import read_json_lines
from support.training import device_type
from support.videos import video_frames
from video_decoder import VideoDecoder

WHOLE = 3e7  # pixels of a video that the VAE encodes at once; a larger one in tiles
AT_ONCE = 32  # captions that the text encoder reads
Size = tuple[int, int, int]  # frames, height, width


def prepare_decoder(
    source: Release, stimuli: Path, decoder: str, size: Size, sentences: int | None = None
) -> None:
    """Text tokens, empty prompt and latents of all clips, for a decoder: a folder or a name on the Hub.

    Text first, then the VAE: the two are never in memory together, and the DiT never is. size: of the videos.
    sentences: of a caption that the text encoder reads, from its first on; None for all. Raises ValueError
    for files that were made by another recipe, and where the decoder does not fit the size.
    """
    latent_recipe, text_recipe = decoder_recipes(decoder, size)
    text_recipe["caption_sentences"] = sentences
    folders = {split: stimuli / split / Path(decoder).name for split in source.splits}
    rows, captions = {}, {}
    for split, folder in folders.items():
        rows[split] = read_json_lines(stimuli / split / "clips.jsonl", {"segment": str, "caption": str})
        captions[folder] = [first_sentences(row["caption"], sentences) for row in rows[split]]
    empty = stimuli / Path(decoder).name / "empty_prompt.npy"  # written last
    names = ("text_tokens.npy", "text_offsets.npy")
    files = [empty, *(folder / name for folder in captions for name in names)]
    if not all([is_made_for(file, text_recipe) for file in files]):
        _prepare_text(decoder, captions, empty, text_recipe)
    files = {split: folder / latents_name(size) for split, folder in folders.items()}
    if not all([is_made_for(file, latent_recipe) for file in files.values()]):
        encoder = _load(decoder, vae=True, tiling=np.prod(size) > WHOLE)
        latent_recipe, _ = decoder_recipes(decoder, size)  # its files are here now
        for split in [split for split, file in files.items() if not is_made_for(file, latent_recipe)]:
            _prepare_latents(encoder, source, rows[split], files[split], latent_recipe)


def check_decoder(decoder: str, size: Size) -> None:
    """Raises ValueError where a decoder is not whole, or its videos cannot have this size: before hours."""
    latent_shape(_load(decoder, vae=True), *size)


def _load(decoder: str, **parts: bool) -> VideoDecoder:
    """Text encoder or VAE, on the GPU where there is one."""
    device = device_type()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe, text_length, config = load_pipeline(decoder, dtype, **parts)
    loaded = VideoDecoder(pipe, text_length, config).to(device)
    if device == "cpu" and loaded.pipe.vae is not None:  # convolutions are quicker there with channels last
        for layer in loaded.pipe.vae.modules():
            if isinstance(layer, torch.nn.Conv3d):
                layer.to(memory_format=torch.channels_last_3d)
    return loaded


@torch.inference_mode()
def _prepare_text(decoder: str, captions: dict[Path, list[str]], empty: Path, recipe: dict) -> None:
    """text_tokens.npy and text_offsets.npy of the captions of each folder, then empty_prompt.npy."""
    encoder = _load(decoder, text_encoder=True)
    recipe = recipe | decoder_recipes(decoder, (0, 0, 0))[1]  # its files are here now
    L, D_txt = encoder.text_length, encoder.text_width
    for folder, texts in captions.items():
        unique = list(dict.fromkeys(texts))
        encoded = []  # (n, D_txt) of each
        for i in tqdm(range(0, len(unique), AT_ONCE), f"text tokens, {folder.parent.name}", unit="batch"):
            batch = encoder.encode_text(unique[i : i + AT_ONCE])
            encoded += [e.numpy().astype(np.float16) for e in batch]
            if not all(np.isfinite(e).all() for e in encoded[i:]):
                fault = f"{decoder}/text_encoder gives NaN or values beyond float16"
                raise ValueError(f"{fault}: download it again, or choose another --decoder")
        tokens = dict(zip(unique, encoded, strict=True))
        rows = [tokens[text] for text in texts]
        offsets = np.cumsum([0, *map(len, rows)])  # (clips + 1,)
        with writing_array(folder / "text_tokens.npy", (int(offsets[-1]), D_txt), "float16", recipe) as array:
            np.concatenate(rows, out=array)
        with writing_array(folder / "text_offsets.npy", offsets.shape, "int64", recipe) as array:
            array[:] = offsets
    with writing_array(empty, (L, D_txt), "float32", recipe) as array:
        (e,) = encoder.encode_text([""])  # (n, D_txt)
        array[: len(e)] = e


def _prepare_latents(
    encoder: VideoDecoder, source: Release, rows: list[dict], file: Path, recipe: dict
) -> None:
    """`file` of the latents of a split's clips, as videos of the recipe's size."""
    size = recipe["frames"], recipe["height"], recipe["width"]
    split = file.parents[1].name
    shape = (len(rows), *latent_shape(encoder, *size))  # (clips, C, f, h, w)
    gigabytes = 2 * np.prod(shape) / 1e9
    tqdm.write(f"{split}: {'x'.join(map(str, size))} -> {shape[1:]} float16, {gigabytes:,.2f} GB")

    def encode(batch: np.ndarray) -> tuple[np.ndarray]:  # (b, F, H, W, 3) uint8
        return (encoder.encode_latents(torch.from_numpy(batch)).cpu().numpy(),)  # (b, C, f, h, w)

    at_once = min(16, max(1, 2_000_000 // int(np.prod(size))))
    inputs = hashes(map(source.stimulus, source.splits[split]))
    with resumable_arrays({file: shape}, "float16", recipe, inputs) as (arrays, done, filled):
        videos = (video_frames(clip, *size) for clip in clips_from(source, rows, done))
        encode_all(videos, encode, arrays, done, filled, f"latents, {split}", at_once)
