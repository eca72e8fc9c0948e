"""The dress rehearsal, by hand: the commands of docs/cc2017.md and docs/cinebrain.md, once from end to end.

    python tests/rehearsal.py --folder DIR                  true sizes: 30 GB of disk, 16 GB of memory, an hour
    python tests/rehearsal.py --folder DIR --small          the toy's networks: minutes
    python tests/rehearsal.py --folder DIR --device cuda    also tests/test_gpu.py and the table of tests/benchmark.py

It needs no network. Weights are random, in the publishers' classes and sizes; recordings have the releases' true
layouts, with few segments and a planted signal. Two different clips and captions are encoded, and of any
further one the embedding is made up. Each training takes two steps and the table of stage 1 is of 16 clips, the
evaluation of two.

Prints and writes DIR/rehearsal.md, a row a command. `peak` is of the tensors that live in a step, as the plan
counts them (extras/plan.py); `RSS` is of the process. Ends with 1 where a command fails, or a plan is off by
15 % in memory, 5 % in disk or operations. The same command goes on with what is missing.
"""

import argparse
import atexit
import gc
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import mini_releases  # noqa: E402
import tiny  # noqa: E402

from extras import plan  # noqa: E402
from extras.counter import Counter  # noqa: E402

STEPS, MEMORY, EXACT = 2, 0.15, 0.05
TEXT = dict(
    d_model=4096,
    d_ff=10240,
    d_kv=64,
    num_heads=64,
    num_layers=24,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)  # fmt: skip  of T5-XXL and UMT5-XXL
LAYERS = {"wan": 24, "cog": 2}  # of the text encoder; CogVideoX's is T5-XXL, as large as Wan's


# ---------------------------------------------------------------- random weights of the published sizes


def write_random(build: Callable[[], nn.Module], folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """A model of diffusers or transformers with small random weights; one such model is in memory at a time."""
    if (folder / "config.json").exists():
        return
    with torch.device("meta"):
        model = build()
    model.to(dtype).to_empty(device="cpu")
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        gain = x.dim() == 1 and name.endswith(("weight", "gamma"))
        with torch.no_grad():
            if x.is_floating_point():
                x.normal_(1.0 if gain else 0.0, 0.02)
    model.save_pretrained(folder)


def write_wan(folder: Path) -> None:
    """Wan2.1 1.3B: DiT and VAE in fp32, UMT5 in bf16 as it is published."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    shape = {k: v for k, v in plan.WAN_1_3B["transformer"].items() if not k.startswith("_")}
    text = UMT5Config(vocab_size=256_384, **TEXT | {"num_layers": LAYERS["wan"]})
    write_random(lambda: WanTransformer3DModel(**shape), folder / "transformer")
    write_random(AutoencoderKLWan, folder / "vae")
    write_random(lambda: UMT5EncoderModel(text), folder / "text_encoder", torch.bfloat16)
    settings = {k: v for k, v in plan.WAN_1_3B["scheduler"].items() if not k.startswith("_")}
    with torch.device("meta"):
        parts = WanTransformer3DModel(**shape), AutoencoderKLWan(), UMT5EncoderModel(text)
    write_index(folder, WanPipeline, parts, UniPCMultistepScheduler(**settings), tokens=512)


def write_cog(folder: Path) -> None:
    """CogVideoX-2b in fp16."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    text = T5Config(vocab_size=32_128, **TEXT | {"num_layers": LAYERS["cog"]})
    scheduler = CogVideoXDDIMScheduler(
        snr_shift_scale=3.0, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False,
        prediction_type="v_prediction", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    )  # fmt: skip
    vae = dict(
        block_out_channels=(128, 256, 256, 512), layers_per_block=3, latent_channels=16, sample_height=480,
        sample_width=720, scaling_factor=1.15258426, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    classes = {  # whose defaults are CogVideoX-2b's DiT
        "transformer": CogVideoXTransformer3DModel,
        "vae": lambda: AutoencoderKLCogVideoX(**vae),
        "text_encoder": lambda: T5EncoderModel(text),
    }
    for part, build in classes.items():
        write_random(build, folder / part, torch.float16)
    with torch.device("meta"):
        parts = [build() for build in classes.values()]
    write_index(folder, CogVideoXPipeline, parts, scheduler, tokens=226)


def write_index(folder: Path, pipeline, parts, scheduler, tokens: int) -> None:
    """model_index.json, scheduler and tokenizer: the tiny world's words, of the true length."""
    transformer, vae, text_encoder = parts
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = tokens
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    pipeline(
        transformer=transformer, vae=vae, text_encoder=text_encoder, scheduler=scheduler, tokenizer=tokenizer
    ).save_config(folder)


def write_encoders(folder: Path) -> None:
    """CLIP ViT-L/14 for open_clip, and ViCLIP's .pth."""
    import open_clip
    from safetensors.torch import save_file

    from prepare.viclip import ViCLIP, ViCLIPConfig

    clip = folder / "clip"
    if not (clip / "open_clip_config.json").exists():
        model_cfg = open_clip.get_model_config("ViT-L-14-quickgelu")
        preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
        clip.mkdir(parents=True, exist_ok=True)
        save_file(open_clip.CLIP(**model_cfg).state_dict(), clip / "open_clip_model.safetensors")
        text = json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess})
        (clip / "open_clip_config.json").write_text(text)
    if not (folder / "viclip.pth").exists():
        torch.save({"model": ViCLIP(ViCLIPConfig()).state_dict()}, folder / "viclip.pth")


def write_releases(folder: Path) -> None:
    for name, write in {
        "cc2017": lambda raw: mini_releases.write_purdue(raw, 2, 1, as_unpacked=True),
        "neuroclips": lambda raw: mini_releases.write_neuroclips(raw, 2, 1, voxels=13_447, size=224),
        "cinebrain": lambda raw: mini_releases.write_cinebrain(raw, train=2, test=1),
    }.items():
        if not (folder / name).exists():
            shutil.rmtree(folder / f"{name}.part", ignore_errors=True)
            write(folder / f"{name}.part")
            (folder / f"{name}.part").rename(folder / name)


# ---------------------------------------------------------------- inside the process of a command


def encode_two(encode: Callable, made_up: Callable) -> Callable:
    """encode(model, inputs, ...) -> a result for each input: the first two different inputs are encoded, of any
    further one the result is made_up(one that was encoded, a generator)."""
    results: dict[bytes, object] = {}

    def encoded(model, inputs, *args, **options) -> list:
        for x in inputs:
            key = x.encode() if isinstance(x, str) else np.ascontiguousarray(x).tobytes()
            if key not in results and len(results) < 2:
                one = [x] if isinstance(x, str) else x[None]
                results[key] = encode(model, one, *args, **options)[0]
            elif key not in results:
                first = next(iter(results.values()))
                results[key] = made_up(first, np.random.default_rng(len(results)))
        keys = (x.encode() if isinstance(x, str) else np.ascontiguousarray(x).tobytes() for x in inputs)
        return [results[key] for key in keys]

    return encoded


def unit_vector(like: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(like.shape[-1:], np.float32) + 0.3 * rng.standard_normal(like.shape, np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@contextmanager
def measuring(numbers: dict) -> Iterator[None]:
    """Operations, and the peak of all tensors that live: those there are, and those that are made."""
    counter, cuda = Counter(), torch.cuda.is_available()
    for x in gc.get_objects():
        if isinstance(x, torch.Tensor) and x.device.type != "meta":
            counter._see(x)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with counter:
        yield
    peak = torch.cuda.max_memory_allocated() if cuda else counter.peak
    numbers.update(peak=max(peak, numbers.get("peak", 0)), flop=counter.flop)


def inside(script: str, argv: list[str], size: tuple[int, int, int]) -> None:
    """Run a script as the command does, but for: videos of `size`, two contents encoded, two steps. What a step
    or a reconstruction took goes to the file REHEARSAL_NUMBERS."""
    import prepare.facts
    import prepare.stimuli as stimuli
    from evaluate import CineNeuron
    from metrics import retrieval
    from support.runs import RunFolder, door
    from video_decoder import VideoDecoder

    numbers, file = {}, Path(os.environ["REHEARSAL_NUMBERS"])
    prepare.facts.VIDEO |= dict.fromkeys(("cc2017", "cinebrain"), size)
    images, actions = (encode_two(e, unit_vector) for e in (stimuli.encode_images, stimuli.encode_actions))
    stimuli.encode_images = lambda *args, **options: np.stack(images(*args, **options))
    stimuli.encode_actions = lambda *args, **options: np.stack(actions(*args, **options))
    latents = encode_two(VideoDecoder.encode_latents, lambda like, rng: like * rng.uniform(0.5, 1.5))
    VideoDecoder.encode_latents = lambda *args: torch.stack(latents(*args))
    VideoDecoder.encode_text = encode_two(
        VideoDecoder.encode_text, lambda like, rng: like * rng.uniform(0.5, 1.5)
    )
    start = RunFolder.__init__
    remember, reconstruct = (call.__wrapped__ for call in (CineNeuron.remember, CineNeuron.reconstruct))

    def short(self, folder, settings, total, *args, **options) -> None:
        start(self, folder, settings, min(total, STEPS), *args, **options)

    def measured(call: Callable) -> Callable:
        def wrapped(*args, **options):
            with measuring(numbers):
                result = call(*args, **options)
            file.write_text(json.dumps(numbers))
            return result

        return wrapped

    RunFolder.__init__, CineNeuron.reconstruct = short, measured(reconstruct)
    CineNeuron.remember = (
        remember  # in inference mode operations do not come apart into those that are counted
    )
    atexit.register(write_resident, file.with_name("resident.txt"))
    sys.argv = [script, *argv]
    if "/" in script or script == "data.py":
        runpy.run_path(str(REPO / script), run_name="__main__")
    module = importlib.import_module(script.removesuffix(".py"))
    if script.startswith("train"):
        module.train_step = measured(module.train_step)
        retrieval.with_controls = of_few_clips(retrieval.with_controls)
    if script == "evaluate.py":
        with torch.no_grad():
            door(lambda: module.main.__wrapped__(module.parse(argv, module.__doc__)))
    door(lambda: module.main(module.parse(argv)))


def of_few_clips(with_controls: Callable) -> Callable:
    """Stage 1's table of the first 16 held-out clips, each half the other's control."""

    def shortened(brain_model, heads, x, targets, far):
        n = min(16, len(x))
        few = type(targets)(*(None if field is None else field[:n] for field in targets))
        halves = np.arange(n) < n // 2
        return with_controls(brain_model, heads, x[:n], few, halves[:, None] != halves)

    return shortened


def write_resident(file: Path) -> None:
    """The highest resident memory of this process, in kB (Linux; a parent's is not in it)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    file.write_text("".join(line.split()[1] for line in lines if line.startswith("VmHWM")) or "0")


# ---------------------------------------------------------------- the commands


class Rehearsal:
    """Runs commands in a folder, and keeps a row of each."""

    def __init__(self, folder: Path, size: tuple[int, int, int], device: str, small: bool):
        self.folder, self.size, self.device, self.small = folder, size, device, small
        self.rows, self.faults = [], []
        self.environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)}
        if device == "cpu":
            self.environment["CUDA_VISIBLE_DEVICES"] = ""

    def run(
        self, script: str, options: str, plan_options: str = "", stage: Path | None = None, good: tuple = (0,)
    ) -> None:
        """A command. plan_options: of extras/plan.py; stage: the folder whose size the plan foretells; good: the
        exit statuses that are right."""
        numbers_file, resident = self.folder / "numbers.json", self.folder / "resident.txt"
        for file in (numbers_file, resident):
            file.unlink(missing_ok=True)
        argv = [sys.executable, __file__, "--inside", ",".join(map(str, self.size)), script, *options.split()]
        log = self.folder / "logs" / f"{len(self.rows):02d}-{Path(script).stem}.txt"
        log.parent.mkdir(exist_ok=True)
        environment = self.environment | {"REHEARSAL_NUMBERS": str(numbers_file)}
        start = time.perf_counter()
        with open(log, "wb") as out:
            code = subprocess.run(argv, cwd=self.folder, env=environment, stdout=out, stderr=out).returncode
        seconds, command = time.perf_counter() - start, f"{script} {options}"
        if code not in good:
            self.faults.append(f"{command}: exit status {code}, see {log}")
        numbers = json.loads(numbers_file.read_text()) if numbers_file.exists() else {}
        cells = [f"{code}", f"{seconds:.0f}", f"{int(resident.read_text()) / 2**20:.1f}"]
        cells += self.compare(command, numbers, plan_options, stage) if plan_options else ["", "", ""]
        self.rows.append(f"| `{command}` | {' | '.join(cells)} |")
        print(self.rows[-1], flush=True)

    def compare(self, command: str, numbers: dict, options: str, stage: Path | None) -> list[str]:
        """Cells "seen / planned" of memory, operations and disk."""
        name, *words = options.split()
        before, planned = Path.cwd(), None
        os.chdir(self.folder)
        try:
            planned = plan.PLANS[name](words, 1)
        finally:
            os.chdir(before)
        weights = sum(
            size for kind, size in planned.disk.items() if kind in ("of weights", "to go on (state/)")
        )
        files = [file for file in (self.folder / stage).rglob("*") if file.is_file()] if stage else []
        kept = ("state.pt", "model.safetensors", "pytorch_lora_weights.safetensors")
        disk = sum(file.stat().st_size for file in files if file.name in kept)
        pairs = {
            "memory, GiB": (numbers.get("peak", 0), planned.need.peak, MEMORY, 2**30),
            "TFLOP": (numbers.get("flop", 0), planned.need.flop, EXACT, 10**12),
            "disk, GB": (disk, weights, EXACT, 10**9),
        }
        cells = []
        for kind, (measured, counted, tolerance, unit) in pairs.items():
            if kind.startswith("disk") and not stage:
                cells.append("")
                continue
            cells.append(f"{measured / unit:.3g} / {counted / unit:.3g}")
            in_fp32 = kind.startswith("memory") and name == "evaluate" and self.device == "cpu"
            if in_fp32 or self.small and not kind.startswith("disk"):  # the plan is of a GPU's true sizes
                continue
            if not abs(measured - counted) <= tolerance * counted:
                self.faults.append(f"{command}: {kind} {cells[-1]} planned, more than {tolerance:.0%} off")
        return cells

    def report(self) -> str:
        head = "| command | exit | seconds | RSS, GB | peak / plan, GiB | TFLOP / plan | disk / plan, GB |"
        lines = [head, "|" + "---|" * 7, *self.rows, "", *self.faults]
        return "\n".join(lines) + "\n"


def train_and_evaluate(show: Rehearsal, data: str, subject: int, decoder: str, small: bool) -> None:
    """Stage 1, stage 2 and the evaluation of one subject."""
    frames, height, width = show.size
    tokens = {"wan": 16, "cog": 12} if small else {"wan": 512, "cog": 226}
    brain = f"--tokens {tokens['cog' if 'cog' in decoder else 'wan']} "
    brain += "--width 128 --layers 2 --attention_heads 4" if small else "--layers 4"
    run = "cog" if "cog" in decoder else "full"
    who = f"--data {data} --subject {subject}"
    regions = " --rois visual,hippocampus,mpfc" if data == "cinebrain" else ""
    common = f"{who} --run {run} --batch_size 2 --micro_batch 1 --precision bf16"
    folder = Path("runs", data, f"sub{subject}", f"{run}-s0")
    options = f"{common} {brain}{regions}"
    show.run("train_stage1.py", options, f"stage1 {options}", folder / "stage1")
    options = (
        f"{common} --stage1 {run} --decoder {decoder} --frames {frames} --height {height} --width {width}"
    )
    options += f" --sample_every 0 --attention_heads {4 if small else 16}"
    show.run("train_stage2.py", options, f"stage2 {options}", folder / "stage2")
    judges = "--metrics ssim,psnr,epe --flow farneback --size native --clips 2 --steps 2 --batch_size 1 --processes 1"
    options = f"{who} --run {run} {judges}"
    films = (
        "raw/cinebrain/videos"
        if data == "cinebrain"
        else "raw/cc2017/10_4231_R71Z42KK/video_fmri_dataset/stimuli"
    )
    show.run("evaluate.py", f"{options} --stimuli {films}", f"evaluate {options}")
    for out in (show.folder / folder).glob("eval-2-clips*"):
        show.run("evaluate.py", f"{who} --run {run} --compare {run}/{out.name} {run}/{out.name}")


def rehearse(folder: Path, small: bool, device: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    weights, size = folder / "weights", (17 if small else 9, 64, 64)
    wan, cog, encoders = (
        "weights/wan",
        "weights/cog",
        "--clip local-dir:weights/clip --viclip weights/viclip.pth",
    )
    if small:
        wan, encoders = f"{REPO}/toy/wan", f"--clip local-dir:{REPO}/toy/clip --viclip {REPO}/toy/viclip"
        if not (weights / "cog").exists():
            tiny.cogvideox_pipeline().save_pretrained(weights / "cog")
    else:
        write_wan(weights / "wan")
        write_cog(weights / "cog")
        write_encoders(weights)
    write_releases(folder / "raw")
    show = Rehearsal(folder, size, device, small)
    few = "--train-segments 2 --test-segments 1"
    captions = "--captions raw/cc2017/captions.jsonl"
    cc2017 = f"cc2017 --raw raw/cc2017 --subject 1 {few} {captions} {encoders}"
    for decoder in (wan, cog):
        show.run("data.py", f"{cc2017} --decoder {decoder}")
    show.run("extras/check.py", "--data cc2017", good=(0, 1))  # films repeat in a miniature: a leak, rightly
    show.run("extras/delay.py", "--data cc2017 --subject 1")
    for decoder in (wan, cog):
        train_and_evaluate(show, "cc2017", 1, decoder, small)
    show.run("data.py", f"cinebrain --raw raw/cinebrain --subject 3 {few} {encoders} --decoder {wan}")
    train_and_evaluate(show, "cinebrain", 3, wan, small)
    shutil.rmtree(folder / "data" / "cc2017", ignore_errors=True)  # NeuroClips' recordings are in its place
    release = f"--fmri-release raw/neuroclips --raw raw/cc2017 --subject 1 {few} {encoders} --decoder {wan}"
    show.run("data.py", f"cc2017 {release}")
    for part in () if small else ("brain", "wan"):  # all 24 layers, all 22,815 tokens
        show.run("tests/full_width.py", part)
    (folder / "rehearsal.md").write_text(show.report(), encoding="utf-8")
    print("\n".join(show.faults) or "all as planned")
    if device == "cuda":
        for command in (["pytest", "tests/test_gpu.py"], ["tests/benchmark.py", "--device", "cuda"]):
            command = ["-m", *command] if command[0] == "pytest" else command
            subprocess.run([sys.executable, *command], cwd=REPO, check=True)
    return bool(show.faults)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[3], sys.argv[4:], tuple(map(int, sys.argv[2].split(","))))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="the toy's networks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    sys.exit(rehearse(options.folder.resolve(), options.small, options.device))
