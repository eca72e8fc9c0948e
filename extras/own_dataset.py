"""A dataset of one's own: a class for your files, and a miniature of them to try it on (§4.1).

    python extras/own_dataset.py data/mine/raw    films of a coloured square, and a made-up person's fMRI
    python data.py mine --raw data/mine/raw --clip local-dir:toy/clip --viclip toy/viclip

The row "mine" of DATASETS in prepare/facts.py names the class and the sizes; docs/your-own-data.md has all
steps.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from prepare.facts import DATASETS, cc2017_splits  # noqa: E402
from prepare.release import Release, visible  # noqa: E402
from support.options import Parser  # noqa: E402
from support.readers import read_array  # noqa: E402
from support.runs import door  # noqa: E402
from support.videos import read_clip, write_video  # noqa: E402


class MyRelease(Release):
    """raw/sub1/seg1_1.npy (volumes, voxels) a showing; raw/stimuli/seg1-00.mp4 a clip; raw/captions.jsonl."""

    volumes, TR = 3, 1.0  # that a clip has for itself; seconds a volume

    def __post_init__(self):
        self.delay = 5 if self.delay is None else self.delay
        self.splits = cc2017_splits(self.train_segments, self.test_segments)  # seg1 ..., test1 ...
        _, N = read_array(self.run_file("seg1", 0), shape=(None, None)).shape
        self.voxels = np.arange(N), np.full(N, "unknown")  # with an atlas: the area of each voxel, as text

    def repeats(self, segment):
        return 3 if segment.startswith("test") else 2

    def window(self, segment):
        return self.delay, 3 * len(self.stimulus(segment))  # the film starts with volume 0

    def run_file(self, segment, repeat):
        return self.raw / f"sub{self.subject}" / f"{segment}_{repeat + 1}.npy"

    def load_run(self, segment, repeat):
        file = self.run_file(segment, repeat)
        return read_array(file, shape=(None, None)) if file.is_file() else None

    def files(self, segment):  # those that are there
        return visible(self.raw / f"sub{self.subject}", f"{segment}_*.npy")

    def stimulus(self, segment):
        return visible(self.raw / "stimuli", f"{segment}-*.mp4")

    def video(self, segment, clip):
        return self.stimulus(segment)[clip], 0.0

    def read_clips(self, segment):
        for file in self.stimulus(segment):
            yield read_clip(file, 0.0, 3.0)


def write_miniature(raw: Path, voxels: int = 500, delay: int = 5, seed: int = 0) -> None:
    """Films, captions and runs, in which voxels follow the square's colour and place. raw: a new folder."""
    raw.mkdir(parents=True)
    (raw / "sub1").mkdir()
    rng, rows = np.random.default_rng(seed), []
    weights = rng.normal(size=(5, voxels))
    splits = cc2017_splits(DATASETS["mine"].train[0], DATASETS["mine"].test[0])
    for segment in splits["train"] + splits["test"]:
        signal = np.zeros((delay + 3 * 15, 5))  # (volumes, colour and place)
        for clip in range(15):
            colour, grey, (x, y) = rng.integers(3), rng.integers(120), rng.integers(0, 24, 2)
            frames = np.full((30, 32, 32, 3), grey, np.uint8)  # 10 a second
            frames[:, y : y + 8, x : x + 8, colour] = 230
            write_video(raw / "stimuli" / f"{segment}-{clip:02d}.mp4", frames, 10)
            signal[delay + 3 * clip :][:3] = [*np.eye(3)[colour], x / 12 - 1, y / 12 - 1]
            name = ("red", "green", "blue")[colour]
            rows.append({"segment": segment, "caption": f"a {name} square", "categories": [name]})
        for showing in range(2 if segment in splits["train"] else 3):
            noise = rng.normal(size=(len(signal), voxels))
            run = 10_000 + 100 * (signal @ weights) + 20 * noise
            np.save(raw / "sub1" / f"{segment}_{showing + 1}.npy", run.astype(np.float32))
    (raw / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    parser = Parser("extras/own_dataset.py", description=__doc__)
    parser.add_argument("raw", type=Path, help="a new folder, for the miniature")
    door(lambda: write_miniature(parser.parse_args().raw))
