"""How far can the toy world's judges be trusted? What they see in videos whose content is known.

    python extras/judge.py                  the test clips of the toy's first subject: a minute or two
    python extras/judge.py --subject 2      of another film

Four videos of each clip, as mp4 as those that evaluate.py judges: the stimulus; the same after the VAE's
round trip, which softens it; and what the decoder makes of the clip's own caption, with and without guidance,
no fMRI and no LoRA. What the judges get wrong in the second is theirs (or the VAE's), in the third the DiT's,
too: no reconstruction can be expected to do better.

Out: a table, of each attribute and of shapes by action, and --out as JSON (docs/results/judges.json).
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this file sees the project
from support.experiment import door  # noqa: E402

from evaluate import stimulus  # noqa: E402
from metrics.attributes import ATTRIBUTES, recognise, right  # noqa: E402
from metrics.table import TOY  # noqa: E402
from prepare.command import prepare_toy  # noqa: E402
from prepare.facts import VIDEO, raw_folder, stimuli_folder  # noqa: E402
from support.files import write_json  # noqa: E402
from support.options import (
    option,  # noqa: E402
    parse as parse_options,  # noqa: E402
)
from support.readers import read_json_lines  # noqa: E402
from support.videos import write_video  # noqa: E402
from video_decoder import VideoDecoder, clip_generator  # noqa: E402


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
def write_videos(config: Config, shown: list[dict], folder: Path, batch: int = 16) -> dict[str, list[Path]]:
    """The four videos of each clip, as folder/NAME/NNNN.mp4; {NAME: paths}."""
    size = dict(zip(("frames", "height", "width"), VIDEO["toy"], strict=True))
    films = raw_folder("toy", config.subject) / "stimuli"
    decoder = VideoDecoder.from_pretrained(config.decoder, load_vae=True, load_text_encoder=True)
    L, (empty,) = decoder.text_length, decoder.encode_text([""])

    def padded(tokens: torch.Tensor) -> torch.Tensor:  # (n, D_txt) -> (L, D_txt)
        return torch.nn.functional.pad(tokens.float(), (0, 0, 0, L - len(tokens)))

    guided = f"own caption, guidance {config.guidance:g}"
    names = ("stimulus", "VAE", guided, "own caption, no guidance")
    files: dict[str, list[Path]] = {name: [] for name in names}
    for first in tqdm(range(0, len(shown), batch), desc="videos", unit="batch"):
        some = shown[first : first + batch]
        real = np.stack([stimulus(clip, films, 2.0, size) for clip in some])  # (b, F, H, W, 3)
        text = torch.stack([padded(x) for x in decoder.encode_text([clip["caption"] for clip in some])])
        videos = {"stimulus": real}
        videos["VAE"] = decoder.decode_latents(decoder.encode_latents(torch.from_numpy(real))).numpy()
        for name, guidance in ((guided, config.guidance), (names[3], 1.0)):
            noise = [clip_generator(0, first + i) for i in range(len(some))]
            how = (*size.values(), noise, config.steps, guidance)
            videos[name] = decoder.generate(text, padded(empty), *how).numpy()
        for name in names:
            for i, video in enumerate(videos[name]):
                files[name].append(folder / name / f"{first + i:04d}.mp4")
                write_video(files[name][-1], video, 8.5)
    return files


def main(config: Config) -> None:
    prepare_toy(subject=config.subject)
    rows = read_json_lines(stimuli_folder("toy", config.subject) / "test" / "clips.jsonl", {"caption": str})
    every = np.linspace(0, len(rows) - 1, config.clips or len(rows)).round().astype(int)
    shown = [rows[i] for i in np.unique(every)]
    values = {name: sorted({clip[name] for clip in rows}) for name in ATTRIBUTES}
    judges = TOY["video_classifier"], TOY["image_classifier"]
    with tempfile.TemporaryDirectory() as folder:
        files = write_videos(config, shown, Path(folder))
        hits = {name: right(recognise(of, judges, values), shown) for name, of in files.items()}
    result = {"clips": len(shown), "subject": config.subject, "decoder": config.decoder}
    result["right"] = {name: {a: float(x.mean()) for a, x in of.items()} for name, of in hits.items()}
    of_kind: dict[str, np.ndarray] = {}
    for clip in shown:
        kind = f"{clip['shape']} {clip['action']}"
        of_kind.setdefault(kind, np.array([f"{c['shape']} {c['action']}" == kind for c in shown]))
    result["shape right, by shape and action"] = {
        kind: {"clips": int(of.sum())} | {name: float(hits[name]["shape"][of].mean()) for name in hits}
        for kind, of in sorted(of_kind.items())
    }
    write_json(Path(config.out), result)
    print(f"{f'{len(shown)} clips, seen as shown':<28}" + "".join(f"{name:>28}" for name in hits))
    for attribute in next(iter(result["right"].values())):
        print(f"{attribute:<28}" + "".join(f"{of[attribute]:>28.3f}" for of in result["right"].values()))
    print("shape, by shape and action, where one is wrong in more than a tenth")
    for kind, of in result["shape right, by shape and action"].items():
        if min(of[name] for name in hits) < 0.9:
            said = f"{kind} ({of['clips']})"
            print(f"{said:<28}" + "".join(f"{of[name]:>28.3f}" for name in hits))
    print(f"\nwritten: {config.out}")


if __name__ == "__main__":
    door(lambda: main(parse_options(Config, {"toy": {}}, __doc__, "extras/judge.py", sys.argv[1:])))
