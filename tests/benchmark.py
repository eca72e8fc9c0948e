"""Speed and memory, each as a ratio measured in one run; by hand, not part of the tests.

python tests/benchmark.py             the quick ones, a minute or two on a laptop
python tests/benchmark.py --stream    also a whole subject of cc2017 and of CineBrain at their true size (4 GB of disk)
python tests/benchmark.py --search    Eq. 5 against the number of memories
python tests/benchmark.py --metrics   SSIM, PSNR and n-way of 1,200 pairs of 16 x 256 x 256 against the peers' loops: some minutes
python tests/benchmark.py --device cuda --out FILE    each part at the paper's size on a GPU, beside what is counted
python tests/benchmark.py --device cpu                counted alone, and the same code at the toy's size
"""

import argparse
import datetime
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from torch import nn

REPO = Path(__file__).parents[1]
sys.path[:0] = [str(REPO), str(Path(__file__).parent)]

import train_stage1  # noqa: E402
from data import Clips  # noqa: E402
from extras import plan  # noqa: E402
from extras.counter import counting  # noqa: E402
from prepare.viclip import ViCLIP, ViCLIPConfig  # noqa: E402
from support.files import add_to_manifest  # noqa: E402
from support.pipelines import WAN, latent_shape  # noqa: E402
from support.readers import read_json  # noqa: E402
from support.training import adamw_onecycle, autocast, update  # noqa: E402
from video_decoder import VideoDecoder  # noqa: E402

N, L, WIDTH = plan.PUBLISHED["cc2017"]["voxels"], 512, 2048  # the paper's sizes (§4.1)


def fastest(function, repeats: int = 5) -> float:
    """Seconds of the fastest of some calls, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@torch.inference_mode()
def voxel_regression(B: int = 1) -> None:
    """Contract N voxels to L tokens, then lift to D' (here, r = 1), against the parent's order: lift each
    voxel, then contract."""
    contract, lift, x = torch.randn(L, N) / N**0.5, torch.randn(WIDTH), torch.randn(B, N)

    def ours() -> torch.Tensor:
        return (x @ contract.T)[..., None] * lift  # (B, L, D')

    def parents() -> torch.Tensor:
        return contract @ (x[..., None] * lift)  # (B, L, D') by way of (B, N, D')

    error = float((ours() - parents()).abs().max())
    speed = fastest(parents, 2) / fastest(ours)
    work = (N * WIDTH + N * L * WIDTH) / (N * L + L * WIDTH)
    print(f"voxel regression, N = {N:,}: {work:,.0f} times fewer multiply-adds,", end=" ")
    print(f"{speed:,.0f} times faster, same output to {error:.0e}")


def preprocessing(voxels: int = 8192) -> None:
    """One run of cc2017 against np.polyfit of all voxels at once (some voxels: both take time in proportion)."""
    from prepare.fmri import preprocess_run

    rng, t = np.random.default_rng(0), np.arange(240)
    # in the order in which CIFTI files are read
    run = np.asfortranarray(10_000 + 100 * rng.standard_normal((245, voxels)), np.float32)

    def polyfit() -> np.ndarray:
        y = run[3:243].astype(np.float64)
        y -= np.polynomial.polynomial.polyval(t, np.polyfit(t, y, 4)[::-1]).T
        return (y - y.mean(0)) / y.std(0)

    error = np.abs(polyfit() - preprocess_run(run, 3, 240)).max()
    slow, fast = fastest(polyfit, 3), fastest(lambda: preprocess_run(run, 3, 240), 3)
    print(
        f"preprocessing of a run, 245 x {voxels:,}: {slow / fast:.1f} times faster than np.polyfit of all",
        end=" ",
    )
    print(f"voxels at once ({1e6 * fast / voxels:.1f} us a voxel), same to {error:.0e}")


def reading(batch: int = 144, steps: int = 60, clips: int = 4_320) -> None:
    """Batches of training clips from memory-mapped files of cc2017's size, and the first batch of a dataset
    ten times as large, whose files are sparse."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, n, filled in (("cc2017", clips, clips), ("cinebrain", 10 * clips, 4)):
            write_sparse(root / name, n, filled)
            for rois in (None, "visual"):
                start = time.perf_counter()
                train = Clips(name, 3, "train", rois, root=root, batch_size=batch)
                train.batch(0)
                text = f"first batch {time.perf_counter() - start:.2f} s"
                if name == "cc2017":
                    start = time.perf_counter()
                    for step in range(steps):
                        train.batch(step)
                    rate = steps * batch / (time.perf_counter() - start)
                    text += f", then {rate:,.0f} clips/s in batches of {batch}"
                print(f"reading {n:,} clips x {N:,} voxels, rois {rois}: {text}")


def write_sparse(root: Path, clips: int, filled: int) -> None:
    """Prepared files of subject 3; the first clips are filled."""
    rng, folder, stimuli = np.random.default_rng(0), root / "sub3", root / "stimuli"
    embeddings = {f"e_{kind}.npy": (clips, 768) for kind in ("txt", "act")}
    files = {stimuli / "train" / name: (shape, "float32") for name, shape in embeddings.items()}
    files[stimuli / "train" / "e_img.npy"] = (clips, 8, 768), "float32"
    files[folder / "train" / "fmri.npy"] = (clips, 2, 1, N), "float32"
    files[folder / "train" / "recorded.npy"] = (clips, 2), "bool"
    files[stimuli / "train" / "categories.npy"] = (clips, 12), "uint8"
    files[stimuli / "train" / "near_copies.npy"] = (clips, -(-clips // 8)), "uint8"
    files[stimuli / "train" / "captions.npy"] = (clips,), "int64"
    files[stimuli / "test" / "captions.npy"] = (1,), "int64"
    for path, (shape, dtype) in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(path, "w+", dtype=dtype, shape=shape)
        if dtype == "float32":
            for i in range(filled):
                array[i] = rng.standard_normal(1)
        elif path.name == "recorded.npy":
            array[:] = True
        elif path.name == "captions.npy":
            array[:] = np.arange(len(array))
        add_to_manifest(path, array, {"classes": ["a"] * 12}, None)
    areas = np.array(["L_V1", "R_FFC", "L_4"])[np.arange(N) % 3]
    np.savez(folder / "voxels.npz", index=np.arange(N), roi=areas)
    line = {"id": "seg1-000", "segment": "seg1", "video": "seg1.mp4", "start_s": 0.0}
    line |= {"caption": "a dog", "tags": [], "categories": []}
    (stimuli / "train" / "clips.jsonl").write_text((json.dumps(line) + "\n") * clips)


def stream() -> None:
    """86 true-size runs through prepare_fmri in a process of its own: time and highest memory."""
    from mini_releases import write_purdue

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_purdue(folder / "raw", train_segments=4, test_segments=1, test_repeats=2)
        fmri = folder / "raw" / "subject1" / "fmri"
        # the runs that a miniature lacks are links to those it has
        for split, segments, repeats in (("seg", 18, 2), ("test", 5, 10)):
            for s in range(1, segments + 1):
                for r in range(1, repeats + 1):
                    run = fmri / f"{split}{s}" / "cifti" / f"{split}{s}_{r}_Atlas.dtseries.nii"
                    run.parent.mkdir(parents=True, exist_ok=True)
                    source = f"seg{(s - 1) % 4 + 1}" if split == "seg" else "test1"
                    name = f"{source}_{(r - 1) % 2 + 1}_Atlas.dtseries.nii"
                    if not run.exists():
                        os.link(fmri / source / "cifti" / name, run)
                if not (video := folder / "raw" / "stimuli" / f"{split}{s}.mp4").exists():
                    os.link(folder / "raw" / "stimuli" / "seg1.mp4", video)
        code = (
            "import sys; from pathlib import Path; from prepare.cc2017 import PurdueRelease\n"
            "from prepare.facts import SEGMENT_VOLUMES; from prepare.fmri import prepare_fmri\n"
            "class Links(PurdueRelease):  # to runs of 245 volumes\n"
            "    def window(self, segment): return 1 + self.delay, SEGMENT_VOLUMES\n"
            "prepare_fmri(Links(Path(sys.argv[1]), 1), Path(sys.argv[2]), {})"
        )
        timed("cc2017, 86 runs of 245 x 91,282", code, folder)


def stream_cinebrain() -> None:
    """20 runs of CineBrain's true size likewise, links to one (sparse: most of its grayordinates are
    zero)."""
    from mini_releases import write_cinebrain

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        here = write_cinebrain(folder / "raw", train=1, test=0).folder / "sub_0003"
        (run,), (csv,) = here.glob("dtseries/*"), here.glob("beh_data/*")
        for r in range(2, 21):
            os.link(run, run.with_name(run.name.replace("run-1_", f"run-{r}_")))
            os.link(csv, csv.with_name(f"sub_0003_{r}.csv"))
        for clip in [*range(270, 2_700), *range(5_400, 8_100)]:
            os.link(folder / "raw" / "content0.mp4", folder / "raw" / "videos" / f"{clip:06d}.mp4")
        code = (
            "import sys; from pathlib import Path; from prepare.cinebrain import CineBrainRelease\n"
            "from prepare.fmri import prepare_fmri\n"
            "prepare_fmri(CineBrainRelease(Path(sys.argv[1]), 3), Path(sys.argv[2]), {}, 5)"
        )
        timed("CineBrain, 20 runs of 1,363 x 91,282", code, folder)


def timed(what: str, code: str, folder: Path) -> None:
    """Run code on folder/raw, folder/out in a process of its own; print its time and highest memory."""
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": sys.path[0]}
    child = subprocess.Popen([sys.executable, "-c", code, folder / "raw", folder / "out"], env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{what}: the preparation failed")
    size = np.load(folder / "out" / "train" / "fmri.npy", mmap_mode="r").shape
    seconds, memory = time.perf_counter() - start, usage.ru_maxrss / 2**20
    print(f"a subject of {what}: {seconds:.0f} s, {memory:.2f} GB at most, training fMRI {size}")


def search(D: int = 768, K: int = 5) -> None:
    """Eq. 5 and the choice of the top K for one clip and for a batch, against the number of memories."""
    from mixture_of_memories import mixture_scores

    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = [n for n in (10**3, 10**4, 10**5, 10**6) if 3 * D * 4 * n < 0.7 * free]  # one pool, sliced
    e = torch.empty(max(sizes), 3, D)
    for part in e.split(20_000):
        part.normal_().div_(part.norm(dim=-1, keepdim=True))
    for n in sizes:
        times = []
        for B in (1, 32):
            W_r, q = torch.rand(B, 3).softmax(-1), torch.randn(B, 3, D)
            times.append(1e3 * fastest(lambda W_r=W_r, q=q, n=n: mixture_scores(W_r, q, e[:n]).topk(K), 3))
        print(f"search among {n:>9,} memories: {times[0]:8.2f} ms for a clip, {times[1]:8.2f} ms for 32")


def peers_n_way(p: torch.Tensor, gt: list[int], n: int, trials: int = 100) -> float:
    """n-way top-1 by random trials, step by step as the public code of MinD-Video, NeuroClips and NEURONS
    takes it."""
    others, hits = [c for c in range(len(p)) if c not in gt], 0
    for _ in range(trials):
        drawn = p[np.random.choice(others, n - 1, replace=False)]
        hits += any(int(torch.cat([p[c][None], drawn]).argsort()[-1]) == 0 for c in gt)
    return hits / trials


def n_way(clips: int = 1200, classes: int = 400) -> float:
    """Exact accuracies against those of trials on the same logits. Returns the seconds that the trials take,
    for 2-way and 50-way."""
    from metrics.classes import n_way_top_k

    rng, total = np.random.default_rng(0), 0.0
    np.random.seed(0)
    logits = rng.normal(size=(clips, classes)).astype(np.float32)
    noise = rng.normal(size=logits.shape).astype(np.float32)
    p = torch.from_numpy(logits + noise).softmax(-1)  # predictions resemble the stimuli
    gt = logits.argsort(1)[:, -3:]
    for n in (2, 50):
        start = time.process_time()
        drawn = np.array([peers_n_way(row, classes, n) for row, classes in zip(p, gt.tolist(), strict=True)])
        slow = time.process_time() - start
        exact, fast = n_way_top_k(p, gt, n), fastest(lambda n=n: n_way_top_k(p, gt, n))
        error = np.sqrt((exact * (1 - exact)).mean() / 100 / clips)
        print(
            f"{n}-way, {clips:,} clips: {slow / fast:,.0f} times faster ({slow:.1f} s, {1e3 * fast:.1f} ms);",
            end=" ",
        )
        print(f"{exact.mean():.4f} exactly, {drawn.mean():.4f} by 100 trials, whose error is {error:.4f}")
        total += slow
    return total


def metrics(clips: int = 1200, frames: int = 16, distinct: int = 24) -> None:
    """SSIM, PSNR and n-way of pairs streamed from the disk (few are distinct, to spare it) against a loop of
    scikit-image over frames."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    trials = n_way()
    with tempfile.TemporaryDirectory() as folder:
        rng, folder, pairs = np.random.default_rng(0), Path(folder), []
        for kind in ("gt", "noisy"):
            (folder / kind).mkdir()
        for i in range(distinct):
            coarse = rng.integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8)
            gt = np.kron(coarse, np.ones((1, 8, 8, 1), np.uint8))
            pairs.append((gt, np.clip(gt + rng.normal(0, 30, gt.shape), 0, 255).astype(np.uint8)))
            for kind, video in zip(("gt", "noisy"), pairs[-1], strict=True):
                np.save(folder / kind / f"{i:04d}.npy", video)
                for k in range(i + distinct, clips, distinct):
                    os.link(folder / kind / f"{i:04d}.npy", folder / kind / f"{k:04d}.npy")

        def peers() -> float:
            start = time.process_time()
            for gt, noisy in pairs[:4]:
                for x, y in zip(gt, noisy, strict=True):
                    structural_similarity(x, y, data_range=255, channel_axis=-1)
                    peak_signal_noise_ratio(x, y, data_range=255)
            return (time.process_time() - start) * clips / 4

        code = (
            "import sys, time, torch; from pathlib import Path; from metrics.options import Config\n"
            "from metrics.pairs import find_pairs; from metrics.score import score; torch.set_num_threads(1)\n"
            "pairs = find_pairs(Path(sys.argv[1])).items()\n"
            "sets = {m: [p._replace(control=None) for p in ps] for m, ps in pairs}\n"
            "start = time.process_time()\n"
            "score(sets, Config(data='cc2017', metrics='ssim,psnr'), Path(sys.argv[1]) / 'metrics')\n"
            "print(time.process_time() - start)"
        )
        before = peers()
        environment, script = os.environ | {"PYTHONPATH": sys.path[0]}, [sys.executable, "-c", code, folder]
        done = subprocess.run(script, check=True, env=environment, stdout=subprocess.PIPE, text=True)
        slow, ours = (before + peers()) / 2 + trials * clips / 1200, float(done.stdout)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"SSIM, PSNR, n-way of {clips:,} pairs of {frames} x 256 x 256: {slow / ours:.1f} times faster",
        end=" ",
    )
    print(f"({ours:.0f} s of a core, reading too, against {slow:.0f} s, of 4 pairs extrapolated),", end=" ")
    print(f"{memory:.2f} GB at most")


# ---------------------------------------------------------------- the paper's sizes on a GPU
# What makes a row yields its modules, of "meta" tensors, and then a function that does the work once.


class Sizes(NamedTuple):
    """What the table's rows are made of."""

    stage1: str  # options of train_stage1.py
    data: dict[str, int]  # as Clips.sizes
    tokens: int  # L
    decoder: str
    video: tuple[int, int, int]  # frames, height, width
    clip: dict  # of open_clip
    viclip: ViCLIPConfig
    frames: int  # that CLIP sees at once
    films: int  # clips that ViCLIP sees at once


PAPER = Sizes(
    "", plan.PUBLISHED["cc2017"], L, WAN, (57, 624, 624),
    open_clip.get_model_config("ViT-L-14-quickgelu"), ViCLIPConfig(), 128, 16,
)  # fmt: skip
TOY = Sizes(
    "--tokens 16 --width 32 --layers 2 --attention_heads 4 --batch_size 8",
    dict(volumes=1, voxels=200, frames=8, embed_dim=64, classes=5), 16, str(REPO / "toy" / "wan"), (17, 64, 64),
    read_json(REPO / "toy" / "clip" / "open_clip_config.json")["model_cfg"],
    ViCLIP.from_pretrained(REPO / "toy" / "viclip").config, 8, 2,
)  # fmt: skip


def stage_1(size: Sizes, precision: str) -> Iterator:
    """A step of train_stage1.py (Eq. 3): forward, backward and AdamW."""
    config = train_stage1.parse(["--data", "cc2017", "--precision", precision, *size.stage1.split()])
    model = train_stage1.build(config, size.data)
    yield model
    parameters = [p for part in model for p in part.parameters()]
    optimiser, schedule = adamw_onecycle([(parameters, 1e-4)], config.optimizer, config.weight_decay, 1000)
    batch = plan.fake_batch(config.batch_size, size.data)
    for field in batch[1:6]:  # x, e_img, e_txt, e_act, categories
        field.uniform_()

    def step() -> None:
        train_stage1.train_step(*model, batch, config)
        update(optimiser, schedule, 1.0)

    yield step


def decoder(size: Sizes, precision: str) -> VideoDecoder:
    pipe, _ = plan.fake_pipeline(size.decoder)
    if precision == "fp32":
        pipe.transformer.float()
    return VideoDecoder(pipe, size.tokens, pipe.transformer.config, gradient_checkpointing=True)


def stage_2(size: Sizes, precision: str) -> Iterator:
    """Eq. 9 of a clip, forward and backward, to LoRA and f_fuse, blocks recomputed."""
    model = decoder(size, precision).train()
    yield (model.transformer,)
    y, f_fuse = a_clip(model, size)

    def step() -> None:
        with autocast(y, precision):
            loss = model.diffusion_loss(y, f_fuse.requires_grad_(), torch.randn_like(y), torch.rand(1)).sum()
        loss.backward()

    yield step


def a_clip(model: VideoDecoder, size: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """y and f_fuse of Eq. 9."""
    return torch.randn(1, *latent_shape(model, *size.video)), torch.randn(1, size.tokens, model.text_width)


def sampling(size: Sizes, precision: str) -> Iterator:
    """A step of sampling of one clip: with f_fuse and with the empty prompt."""
    model = decoder(size, precision).eval()
    yield (model.transformer,)
    y, f_fuse = a_clip(model, size)
    yield lambda: [model.predict(y, f, 1000 * torch.rand(1)) for f in (f_fuse, 0 * f_fuse)]


def latents(size: Sizes, precision: str) -> Iterator:
    """The VAE's encoding of one clip, whole."""
    model = decoder(size, precision)
    yield (model.pipe.vae,)
    video = torch.zeros(1, *size.video, 3, dtype=torch.uint8)
    yield lambda: model.encode_latents(video)


def clip_frames(size: Sizes, precision: str) -> Iterator:
    model, pixels = open_clip.CLIP(**size.clip).eval(), size.clip["vision_cfg"]["image_size"]
    yield (model,)
    yield in_autocast(model.encode_image, torch.randn(size.frames, 3, pixels, pixels), precision)


def viclip_clips(size: Sizes, precision: str) -> Iterator:
    model, pixels = ViCLIP(size.viclip).eval(), size.viclip.image_size
    yield (model,)
    films = torch.randn(size.films, size.viclip.num_frames, 3, pixels, pixels)
    yield in_autocast(model.encode_video, films, precision)


def in_autocast(encode: Callable, x: torch.Tensor, precision: str) -> Callable:
    def step() -> None:
        with autocast(x, precision):
            encode(x)

    return step


def rows_of(size: Sizes) -> dict[str, tuple[Callable, bool]]:
    """What a row measures -> what makes it, and whether it has gradients."""
    video = "x".join(map(str, size.video))
    return {
        f"stage 1: a step, {size.data['voxels']:,} voxels": (stage_1, True),
        f"stage 2: the DiT on a clip of {video}, both ways": (stage_2, True),
        f"sampling: a step of a clip of {video}, guided": (sampling, False),
        f"latents of a clip of {video}": (latents, False),
        f"CLIP, {size.frames} frames": (clip_frames, False),
        f"ViCLIP, {size.films} clips": (viclip_clips, False),
    }


def counted(make: Callable, size: Sizes, gradients: bool) -> float:
    """Operations of one call, by the shapes alone: no number is computed."""
    torch.backends.mha.set_fastpath_enabled(False)  # one operation that torch does not count
    with torch.device("meta"):
        row = make(size, "bf16")
        modules = next(row)
    with counting() as counter, torch.set_grad_enabled(gradients):
        counter.hold(*modules)
        next(row)()
        return counter.flop


def measured(make: Callable, size: Sizes, gradients: bool, device: str) -> tuple[float, float]:
    """Seconds of one call, and the peak of a GPU's memory in GiB (of a CPU's NaN)."""
    cuda = device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.device("meta"):
        row = make(size, "bf16" if cuda else "fp32")
        modules = next(row)
    for module in modules:
        module.to_empty(device=device)
        for x in (*module.parameters(), *module.buffers()):
            nn.init.normal_(x, std=0.02) if x.is_floating_point() else x.zero_()
    with torch.device(device), torch.set_grad_enabled(gradients):
        step = next(row)

        def call() -> None:
            step()
            if cuda:
                torch.cuda.synchronize()

        seconds = fastest(call, 3)
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if cuda else math.nan


def matrix_rate(device: str) -> float:
    """Multiply-adds x 2 a second of a product of matrices: 8192 x 8192 in bf16, or on a CPU 1024 in float32."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * n**3 / fastest(product, 20 if device == "cuda" else 5)


def table(size: Sizes, device: str, measure: bool) -> str:
    """Markdown: of each row the operations counted and, to measure, seconds, memory and the share of the matrix
    rate."""
    card = torch.cuda.get_device_name() if device == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    lines, rate = [f"{datetime.date.today()}, torch {torch.__version__}: counted, not measured"], 0.0
    if measure:
        rate = matrix_rate(device)
        machine = f"{datetime.date.today()}, {card}, torch {torch.__version__}"
        lines = [f"{machine}; matrices at {rate / 1e12:.3g} TFLOP/s"]
    lines += ["", "| | counted TFLOP | seconds | peak GiB | of the matrix rate |", "|---|---|---|---|---|"]
    for name, (make, gradients) in rows_of(size).items():
        flops, cells = counted(make, size, gradients), ["counted"] * 3
        if measure:
            seconds, memory = measured(make, size, gradients, device)
            peak = "-" if math.isnan(memory) else f"{memory:.1f}"
            cells = [f"{seconds:.3g}", peak, f"{flops / seconds / rate:.0%}"]
        lines.append(f"| {name} | {flops / 1e12:.4g} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("stream", "search", "metrics"):
        parser.add_argument(f"--{name}", action="store_true")
    at_hand = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", nargs="?", const=at_hand, choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help="with --device: the table into this file, too")
    args = parser.parse_args()
    if args.device:
        text = f"The paper's size.\n\n{table(PAPER, args.device, args.device == 'cuda')}\n"
        if args.device == "cpu":
            text += f"\nThe same code at the toy's size.\n\n{table(TOY, 'cpu', True)}\n"
        print(text)
        if args.out:
            args.out.write_text(text)
    elif args.search:
        search()
    elif args.metrics:
        metrics()
    else:
        voxel_regression()
        preprocessing()
        reading()
        if args.stream:
            stream()
            stream_cinebrain()
