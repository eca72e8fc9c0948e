"""Speed and memory, each as a ratio measured in one run; by hand, not part of the tests.

python tests/benchmark.py             the quick ones, a minute or two on a laptop
python tests/benchmark.py --stream    also a whole subject of cc2017 and of CineBrain at their true size (4 GB of disk)
python tests/benchmark.py --metrics   SSIM, PSNR and n-way of 1,200 pairs of 16 x 256 x 256 against the peers' loops: some minutes
python tests/benchmark.py --plan      parameters, operations and memory of a step at the paper's size: counted, not measured
python tests/benchmark.py --gpu       a step of stage 1 at the paper's size, measured on a CUDA GPU
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from brain_model import BrainModel  # noqa: E402
from heads import Stage1Heads, stage1_loss  # noqa: E402

N, L, WIDTH, BATCH, LAYERS = (
    13_447,
    512,
    2048,
    144,
    24,
)  # subject 1 of cc2017 as NeuroClips selects voxels, and the paper's sizes (§4.1)


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
    contract, lift = (
        torch.randn(L, N) / N**0.5,
        torch.randn(WIDTH),
    )  # r = 1: a token keeps one number of each volume
    x = torch.randn(B, N)

    def ours() -> torch.Tensor:
        return (x @ contract.T)[..., None] * lift  # (B, L, D')

    def parents() -> torch.Tensor:
        return contract @ (x[..., None] * lift)  # (B, L, D') by way of (B, N, D')

    error = float((ours() - parents()).abs().max())
    speed = fastest(parents, 2) / fastest(ours)
    work = (N * WIDTH + N * L * WIDTH) / (N * L + L * WIDTH)
    print(
        f"voxel regression, N = {N:,}: {work:,.0f} times fewer multiply-adds, {speed:,.0f} times faster, same output to {error:.0e}"
    )


def preprocessing(polyfit_voxels: int = 1500) -> None:
    """One run of cc2017 against np.polyfit voxel by voxel (some voxels, the time extrapolated)."""
    from prepare.facts import CORTEX
    from prepare.fmri import preprocess_run

    rng = np.random.default_rng(0)
    run = np.asfortranarray(
        10_000 + 100 * rng.standard_normal((245, CORTEX)), np.float32
    )  # the order in which CIFTI files are read
    ours, t = preprocess_run(run, 3, 240), np.arange(240)

    def loop() -> np.ndarray:
        out = np.empty((240, polyfit_voxels))
        for n in range(polyfit_voxels):
            y = run[3:243, n].astype(np.float64)
            y -= np.polyval(np.polyfit(t, y, 4), t)
            out[:, n] = (y - y.mean()) / y.std()
        return out

    start = time.perf_counter()
    error = np.abs(loop() - ours[:, :polyfit_voxels]).max()
    slow = (time.perf_counter() - start) * CORTEX / polyfit_voxels
    fast = fastest(lambda: preprocess_run(run, 3, 240), 3)
    print(
        f"preprocessing of a run, 245 x {CORTEX:,}: {slow / fast:,.0f} times faster than a polyfit loop ({fast:.2f} s), same to {error:.0e}"
    )


def reading(batch: int = 144, steps: int = 60) -> None:
    """Batches of training clips from memory-mapped files of cc2017's size, and the first batch of a dataset
    ten times as large."""
    from data import ClipDataset
    from support.files import add_to_manifest

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, clips, part in (
            ("cc2017", 4_320, 4_320),
            ("cinebrain", 43_200, 4),
        ):  # the large one is a sparse file
            here, stimuli = root / name / "sub3", root / name / "stimuli" / "train"
            shapes = {
                here / "train" / "fmri.npy": (clips, 2, 1, N),
                stimuli / "e_img.npy": (clips, 8, 768),
                stimuli / "e_txt.npy": (clips, 768),
            }
            shapes |= {stimuli / "e_act.npy": (clips, 768), stimuli / "categories.npy": (clips, 12)}
            for path, shape in shapes.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                dtype = "uint8" if path.stem == "categories" else "float32"
                array = np.lib.format.open_memmap(path, "w+", dtype=dtype, shape=shape)
                for i in range(part):
                    array[i] = 1 if path.stem == "categories" else rng.standard_normal(1)
                add_to_manifest(path, array, {"classes": ["a"] * 12}, None)
            np.savez(
                here / "voxels.npz",
                index=np.arange(N),
                roi=np.array(["L_V1", "R_FFC", "L_4"])[np.arange(N) % 3],
            )
            clip = {
                "id": "seg1-000",
                "segment": "seg1",
                "video": "seg1.mp4",
                "start_s": 0.0,
                "caption": "a dog",
                "tags": [],
                "categories": [],
            }
            (stimuli / "clips.jsonl").write_text((json.dumps(clip) + "\n") * clips)
            for rois in (None, "visual"):
                start = time.perf_counter()
                train = ClipDataset(name, 3, "train", rois, root)
                train.batch(np.arange(batch), 0, 0)
                first = time.perf_counter() - start
                order, start = rng.permutation(clips), time.perf_counter()
                for step in range(steps if name == "cc2017" else 0):
                    train.batch(order[np.arange(step * batch, (step + 1) * batch) % clips], 0, step)
                rate = steps * batch / (time.perf_counter() - start)
                speed = f", then {rate:,.0f} clips/s in batches of {batch}" if name == "cc2017" else ""
                print(
                    f"reading {clips:,} clips x {N:,} voxels, rois {rois}: first batch {first:.2f} s{speed}"
                )


def stream() -> None:
    """86 true-size runs through prepare_fmri in a process of its own: time and highest memory."""
    from mini_releases import write_purdue

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_purdue(folder / "raw", train_segments=4, test_segments=1, test_repeats=2)
        fmri = folder / "raw" / "subject1" / "fmri"
        for split, segments, repeats in (
            ("seg", 18, 2),
            ("test", 5, 10),
        ):  # the runs that a miniature lacks are links to those it has
            for s in range(1, segments + 1):
                for r in range(1, repeats + 1):
                    run = fmri / f"{split}{s}" / "cifti" / f"{split}{s}_{r}_Atlas.dtseries.nii"
                    run.parent.mkdir(parents=True, exist_ok=True)
                    source = f"seg{(s - 1) % 4 + 1}" if split == "seg" else "test1"
                    if not run.exists():
                        os.link(
                            fmri / source / "cifti" / f"{source}_{(r - 1) % 2 + 1}_Atlas.dtseries.nii", run
                        )
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


def step_operations() -> float:
    """Multiply-adds x 2 of a step of stage 1 at the paper's size, forward and backward (recomputation not
    counted)."""
    S = L + 1
    forward = N * L * 4 + L * 4 * WIDTH + LAYERS * (12 * S * WIDTH**2 + 2 * S**2 * WIDTH) + WIDTH * 768
    return 3 * 2 * BATCH * forward


def search(D: int = 768, K: int = 5) -> None:
    """Eq. 5 and the choice of the top K for one clip and for a batch, against the number of memories."""
    from mixture_of_memories import mixture_scores

    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = [
        n for n in (10**3, 10**4, 10**5, 10**6) if 3 * D * 4 * n < 0.7 * free
    ]  # one pool, made once and sliced
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
    p = torch.from_numpy(logits + rng.normal(size=logits.shape).astype(np.float32)).softmax(
        -1
    )  # predictions resemble the stimuli
    gt = logits.argsort(1)[:, -3:]
    for n in (2, 50):
        start = time.process_time()
        drawn = np.array([peers_n_way(row, classes, n) for row, classes in zip(p, gt.tolist(), strict=True)])
        slow = time.process_time() - start
        exact, fast = n_way_top_k(p, gt, n), fastest(lambda n=n: n_way_top_k(p, gt, n))
        error = np.sqrt((exact * (1 - exact)).mean() / 100 / clips)
        print(
            f"{n}-way, {clips:,} clips: {slow / fast:,.0f} times faster ({slow:.1f} s, {1e3 * fast:.1f} ms); {exact.mean():.4f} exactly, "
            f"{drawn.mean():.4f} by 100 trials, whose error is {error:.4f}"
        )
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
            gt = np.kron(
                rng.integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8), np.ones((1, 8, 8, 1), np.uint8)
            )
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
            "import sys, time, torch; from pathlib import Path; from evaluate import Config\n"
            "from metrics.pairs import find_pairs; from metrics.score import score; torch.set_num_threads(1)\n"
            "pairs = find_pairs(Path(sys.argv[1])).items()\n"
            "sets = {m: [p._replace(other=None) for p in ps] for m, ps in pairs}\n"
            "start = time.process_time()\n"
            "score(sets, Config(data='cc2017', metrics='ssim,psnr'), Path(sys.argv[1]) / 'metrics')\n"
            "print(time.process_time() - start)"
        )
        before = peers()
        environment = os.environ | {"PYTHONPATH": sys.path[0]}
        done = subprocess.run(
            [sys.executable, "-c", code, folder],
            check=True,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        slow, ours = (before + peers()) / 2 + trials * clips / 1200, float(done.stdout)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"SSIM, PSNR, n-way of {clips:,} pairs of {frames} x 256 x 256: {slow / ours:.1f} times faster ({ours:.0f} s of a core, "
        f"reading too, against {slow:.0f} s, of 4 pairs extrapolated), {memory:.2f} GB at most"
    )


def plan() -> None:
    with torch.device("meta"):
        model = BrainModel(N)
    P, GiB = sum(p.numel() for p in model.parameters()), 2**30
    tokens = BATCH * (L + 1)
    kept = (
        tokens * WIDTH * LAYERS * (14 * 2 + 2 * 4) / GiB
    )  # a token and layer keep about 14 widths in bf16 and 2 in float32
    print(
        f"stage 1: Brain Model of {P / 1e9:.3f} billion parameters; a step on {BATCH} clips is {step_operations() / 1e12:,.0f} TFLOP"
    )
    print(
        f"   memory: weights, gradients, AdamW in float32 {16 * P / GiB:.0f} GiB; activations about {kept:.0f} GiB, with --checkpointing 15"
    )
    print(
        f"   45 % of 790 TFLOP/s (a bf16 matrix rate seen on an H200) would be {step_operations() / 0.45 / 790e12:.2f} s a step"
    )

    d, ffn, layers, text = 1536, 8960, 30, 512  # Wan2.1-T2V-1.3B
    S = 15 * 39 * 39  # tokens of 57 x 624 x 624: latents 15 x 78 x 78, patches of 1 x 2 x 2
    linear = 2 * layers * (S * (6 * d**2 + 2 * d * ffn) + text * 2 * d**2)
    attention = 4 * layers * (S**2 * d + S * text * d)
    # Frozen weights need no gradient of their own: a matrix costs one product backward, and one more where it
    # is recomputed. Attention is kept; its backward pass costs 2.5 times the forward one.
    step = 3 * linear + 3.5 * attention
    lora = (
        layers * 8 * 2 * 16 * d
    )  # rank 16 on to_q, to_k, to_v, to_out of both attentions (text keys and values are d wide by then)
    # kept of a block: its input and two attentions
    blocks = (3 * layers * S * d * 2 + S * (20 * d + 4 * ffn) * 2) / GiB
    print(
        f"stage 2: Wan2.1-1.3B at 57 x 624 x 624: {S:,} tokens, {step / 1e12:,.0f} TFLOP a clip, both ways, {lora / 1e6:.1f} M in LoRA"
    )
    print(
        f"   memory: Brain Model, AdamW {16 * P / GiB:.0f} GiB, DiT 2.6 GiB in bf16, its activations with checkpointing {blocks:.0f} GiB"
    )
    print(
        f"   40 % of 790 TFLOP/s would be {step / 0.4 / 790e12:.2f} s a clip, {32 * step / 0.4 / 790e12:.0f} s a step of 32 on one GPU"
    )
    print("all counted, not measured")


def gpu() -> None:
    """A step of stage 1 on a CUDA GPU, without and with checkpointing: seconds, memory, share of the measured
    matrix rate."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def product() -> None:
        a @ b
        torch.cuda.synchronize()

    rate = 2 * 8192**3 / fastest(product, 20)
    print(f"{torch.cuda.get_device_name()}: measured bf16 matrix rate {rate / 1e12:,.0f} TFLOP/s")
    for checkpointing in (False, True):
        seconds, memory = stage1_step(checkpointing)
        share = step_operations() / seconds / rate
        print(
            f"checkpointing {checkpointing}: {seconds:.2f} s a step, {memory:.0f} GiB, {share:.0%} of the matrix rate"
        )


def stage1_step(checkpointing: bool) -> tuple[float, float]:
    """Seconds and GiB of a step of stage 1 at the paper's size on a CUDA GPU."""
    torch.cuda.reset_peak_memory_stats()
    model, heads = BrainModel(N).cuda(), Stage1Heads().cuda()
    model.gradient_checkpointing = checkpointing
    parameters = [*model.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, 1e-4)
    x, e_img = (
        torch.randn(BATCH, 1, N, device="cuda"),
        F.normalize(torch.randn(BATCH, 8, 768, device="cuda"), dim=-1),
    )
    categories = torch.ones(BATCH, 12, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = stage1_loss(heads, model(x)[0], e_img, e_img[:, 0], e_img[:, 1], categories).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        torch.cuda.synchronize()

    return fastest(step, 5), torch.cuda.max_memory_allocated() / 2**30


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("stream", "search", "metrics", "plan", "gpu"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    if args.plan or args.gpu:
        plan()
        if args.gpu:
            gpu()
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
