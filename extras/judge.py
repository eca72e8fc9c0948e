"""How far can the toy world's judges be trusted? What they see in videos whose content is known.

    python extras/judge.py                  the test clips of the toy's first subject: a minute or two
    python extras/judge.py --subject 2      of another film

Four videos of each clip, as mp4 as those that evaluate.py judges: the stimulus; the same after the VAE's
round trip, which softens it; and what the decoder makes of the clip's own caption, with and without guidance,
no fMRI and no LoRA. What the judges get wrong in the second is theirs (or the VAE's), in the third the DiT's,
too: no reconstruction can be expected to do better.

Out: a table of each attribute, and --out as JSON, of shapes by action, too (docs/results/judges.json).
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this file sees the project
from data import noise_generator  # noqa: E402
from metrics.attributes import ATTRIBUTES, recognise, right  # noqa: E402
from metrics.table import TOY  # noqa: E402
from prepare.facts import VIDEO, raw_folder, stimuli_folder  # noqa: E402
from support.files import write_json  # noqa: E402
from support.options import option, parse  # noqa: E402
from support.pipelines import load_pipeline  # noqa: E402
from support.readers import read_json_lines  # noqa: E402
from support.runs import door  # noqa: E402
from support.videos import read_clip, video_frames, write_video  # noqa: E402
from toy.release import prepare_toy  # noqa: E402
from video_decoder import VideoDecoder  # noqa: E402

BY_KIND = "shape right, by shape and action"


@dataclass
class Config:
    data: str = option("toy", "toy, whose attributes are known")
    subject: int = option(1, "number of the toy's subject", least=1)
    decoder: str = option("toy/wan", "text-to-video model: a folder")
    clips: int | None = option(None, "so many, spread over the test clips (default: all)", least=1)
    steps: int = option(16, "of sampling", least=1)
    guidance: float = option(3.0, "classifier-free guidance", least=0)
    out: str = option("docs/results/judges.json", "where the numbers go")


@torch.inference_mode()
def write_videos(config: Config, clips: list[dict], folder: Path, batch: int = 16) -> list[str]:
    """The four videos of each clip, as folder/NAME/NNNN.mp4; returns the names."""
    films, size = raw_folder("toy", config.subject) / "stimuli", VIDEO["toy"]  # frames, height, width
    pipe, L, dit = load_pipeline(config.decoder, transformer=True, vae=True, text_encoder=True)
    decoder = VideoDecoder(pipe, L, dit, lora_rank=0)
    guidance_of = {f"guidance {config.guidance:g}": config.guidance, "no guidance": 1.0}
    for first in tqdm(range(0, len(clips), batch), desc="videos", unit="batch"):
        lines = clips[first : first + batch]
        prompts = ["", *(clip["caption"] for clip in lines)]
        tokens, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=L)
        empty, *captions = tokens.float()  # (L, D_txt) each
        real = [video_frames(read_clip(films / clip["video"], clip["start_s"]), *size) for clip in lines]
        videos = {"stimulus": torch.from_numpy(np.stack(real))}  # (B, F, H, W, 3)
        videos["VAE"] = decoder.decode_latents(decoder.encode_latents(videos["stimulus"]))
        for name, guidance in guidance_of.items():
            noise = [noise_generator(0, first + i) for i in range(len(lines))]
            frames = decoder.generate(torch.stack(captions), empty, size, noise, config.steps, guidance)
            videos[f"own caption, {name}"] = frames
        for name, frames in videos.items():
            for i, video in enumerate(frames.numpy(), first):
                write_video(folder / name / f"{i:04d}.mp4", video, 8.5)
    return list(videos)


def table(result: dict) -> str:
    """The numbers as text."""
    lines = {f"{result['clips']} clips, seen as shown": list(result["right"])}
    for attribute in result["right"]["stimulus"]:
        lines[attribute] = [f"{share[attribute]:.3f}" for share in result["right"].values()]
    return "\n".join(f"{row:<28}" + "".join(f"{cell:>28}" for cell in lines[row]) for row in lines)


def main(config: Config) -> None:
    prepare_toy(subject=config.subject)
    rows = read_json_lines(stimuli_folder("toy", config.subject) / "test" / "clips.jsonl", {"caption": str})
    spread = np.linspace(0, len(rows) - 1, config.clips or len(rows)).round().astype(int)
    clips = [rows[i] for i in np.unique(spread)]
    values = {attribute: sorted({clip[attribute] for clip in rows}) for attribute in ATTRIBUTES}
    judges = TOY["video_classifier"], TOY["image_classifier"]
    kinds = np.array([f"{clip['shape']} {clip['action']}" for clip in clips])
    result = {"clips": len(clips), "subject": config.subject, "decoder": config.decoder, "right": {}}
    result[BY_KIND] = {kind: {"clips": int((kinds == kind).sum())} for kind in np.unique(kinds).tolist()}
    with tempfile.TemporaryDirectory() as folder:
        for name in write_videos(config, clips, Path(folder)):
            files = sorted(Path(folder, name).iterdir())
            hits = right(recognise(files, judges, values), clips)  # {attribute: (clips,) bool}
            result["right"][name] = {attribute: float(hit.mean()) for attribute, hit in hits.items()}
            for kind, share in result[BY_KIND].items():
                share[name] = float(hits["shape"][kinds == kind].mean())
    write_json(Path(config.out), result)
    print(f"{table(result)}\n\nwritten: {config.out}")


if __name__ == "__main__":
    door(lambda: main(parse(Config, {"toy": {}}, __doc__, "extras/judge.py", sys.argv[1:])))
