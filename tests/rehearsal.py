"""The dress rehearsal, by hand (docs/tests.md): the commands of docs/cc2017.md and cinebrain.md, from end to end.

No network is needed. Weights are random, in the publishers' classes and sizes; recordings have the releases' true
layouts, few segments and a planted signal. Two clips and captions are encoded, embeddings of others are made up. A
training takes three steps (its table is of 16 clips), an evaluation three clips, judged by all metrics but MS. On a
CPU the Brain Model has four layers; 24-layers is steps without an optimiser.

DIR/rehearsal.md has a row a command, seen / planned (extras/plan.py). `RSS` is of the process, `peak` of the tensors
that live in a step. Two steps are counted, the third is timed, without AdamW's update. Ends with 1 where a command
fails or a plan is off by 15 % in memory, 5 % in disk or operations: with --small disk alone counts, on a CPU all but
the memory of preparation and evaluation. For a smaller card: --training "--micro_batch 8"."""

import argparse
import atexit
import gc
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import diffusers
import numpy as np
import open_clip
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

with patch("torch.inference_mode", torch.no_grad):  # in it operations do not come apart into those counted
    import evaluate
import mini_releases  # noqa: E402
import tiny  # noqa: E402

import train_stage1  # noqa: E402
import train_stage2  # noqa: E402
from extras import plan  # noqa: E402
from extras.counter import Counter  # noqa: E402
from metrics import retrieval  # noqa: E402
from prepare import stimuli  # noqa: E402
from prepare.viclip import ViCLIP  # noqa: E402
from support.files import write_json, written_whole  # noqa: E402
from support.pipelines import LORA_FILE, WAN  # noqa: E402
from support.runs import RunFolder, door  # noqa: E402
from video_decoder import VideoDecoder  # noqa: E402

STEPS, MEMORY, EXACT = 3, 0.15, 0.05
DEPTH = "24-layers"  # in place of a script
SAVED = ("state.pt", "model.safetensors", LORA_FILE)
RAFT = Path("torch/hub/checkpoints", Path(Raft_Large_Weights.C_T_V1.url).name)  # where torchvision looks


# ---------------------------------------------------------------- random weights of the published sizes


def write_cog(folder: Path) -> None:
    """CogVideoX-2b, whose sizes are the classes' defaults, in fp16; of its T5-XXL, as large as Wan's, two layers."""
    t5 = plan.WAN_1_3B["text_encoder"] | {"model_type": "t5", "vocab_size": 32_128, "num_layers": 2}
    with torch.device("meta"):
        text = transformers.T5EncoderModel(transformers.AutoConfig.for_model(**t5))
        dit, vae = diffusers.CogVideoXTransformer3DModel(), diffusers.AutoencoderKLCogVideoX()
    terminal = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    scheduler = diffusers.CogVideoXDDIMScheduler(**terminal, prediction_type="v_prediction")
    write_pipeline(folder, diffusers.CogVideoXPipeline(None, text, vae, dit, scheduler), 226, torch.float16)


def write_pipeline(folder: Path, pipe, tokens: int, dtype: torch.dtype = torch.float32) -> None:
    """A pipeline on "meta" with small random weights, the text encoder's in bf16 as published; its tokenizer has
    the tiny world's words and the true length. Without a text encoder: the configs."""
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = tokens
    pipe.register_modules(tokenizer=tokenizer)
    pipe.save_config(folder)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and not pipe.text_encoder:
            part.save_config(folder / name)
        elif isinstance(part, nn.Module):
            part.to(torch.bfloat16 if name == "text_encoder" else dtype).to_empty(device="cpu")
            for key, x in [*part.named_parameters(), *part.named_buffers()]:
                if x.is_floating_point():
                    nn.init.normal_(x, float(x.dim() == 1 and key.endswith(("weight", "gamma"))), 0.02)
            part.save_pretrained(folder / name)
            part.to("meta")
        elif part:
            part.save_pretrained(folder / name)


def write_weights(folder: Path, small: bool) -> None:
    """Both decoders, CLIPs, ViCLIP; VideoMAE-base of Kinetics' 400 classes, ViT-B/16 of ImageNet's 1,000, DINO, RAFT."""
    pipe, tokens = plan.fake_pipeline(WAN)
    pipe.transformer.register_to_config(num_layers=40, num_attention_heads=40, ffn_dim=13_824)  # Wan2.1 14B's
    write_pipeline(folder / "wan14", pipe, tokens)
    if small:
        tiny.cogvideox_pipeline().save_pretrained(folder / "cog")
        return
    write_pipeline(folder / "wan", *plan.fake_pipeline(WAN, text_encoder=True))
    write_cog(folder / "cog")
    for name, kind in {"clip": "ViT-L-14-quickgelu", "clip-b32": "ViT-B-32-quickgelu"}.items():
        config = {"model_cfg": open_clip.get_model_config(kind)}
        config["preprocess_cfg"] = dict(mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD)
        write_json(folder / name / "open_clip_config.json", config)
        weights = open_clip.CLIP(**config["model_cfg"]).state_dict()
        save_file(weights, folder / name / "open_clip_model.safetensors")
    torch.save({"model": ViCLIP().state_dict()}, folder / "viclip.pth")
    video, image = transformers.VideoMAEConfig(num_labels=400), transformers.ViTConfig(num_labels=1000)
    transformers.VideoMAEForVideoClassification(video).save_pretrained(folder / "videomae")
    transformers.VideoMAEImageProcessor().save_pretrained(folder / "videomae")
    for name, kind in {"vit": transformers.ViTForImageClassification, "dino": transformers.ViTModel}.items():
        kind(image).save_pretrained(folder / name)
        transformers.ViTImageProcessor().save_pretrained(folder / name)
    (folder / RAFT).parent.mkdir(parents=True)
    torch.save(raft_large().state_dict(), folder / RAFT)


def write_releases(raw: Path, small: bool) -> None:
    step = 16 if small else 1  # every so manieth visual voxel responds to the films
    mini_releases.write_purdue(raw / "cc2017", 2, step=step)
    mini_releases.write_neuroclips(raw / "neuroclips", 2, voxels=13_447, size=224)
    mini_releases.write_cinebrain(raw / "cinebrain", step=step)


# ---------------------------------------------------------------- inside the process of a command


def encode_two(encode: Callable, joined: Callable) -> Callable:
    """encode(model, inputs, ...) -> joined results: the first two different inputs are encoded, of any further
    one the result is made up."""
    results: dict[str | bytes, object] = {}

    def encoded(model, inputs, *args, **options):
        keys = [x if isinstance(x, str) else np.asarray(x).tobytes() for x in inputs]
        for i, key in enumerate(keys):
            if key not in results and len(results) < 2:
                results[key] = encode(model, inputs[i : i + 1], *args, **options)[0]
            elif key not in results:
                results[key] = made_up(next(iter(results.values())), np.random.default_rng(len(results)))
        return joined([results[key] for key in keys])

    return encoded


def made_up(like: np.ndarray | torch.Tensor, rng: np.random.Generator) -> np.ndarray | torch.Tensor:
    """An embedding (a unit vector, or one a frame) like another one; what the decoder's encoders give, scaled."""
    if isinstance(like, torch.Tensor):
        return like * rng.uniform(0.5, 1.5)
    x = rng.standard_normal(like.shape[-1:], np.float32) + 0.3 * rng.standard_normal(like.shape, np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


FEW_ENCODED = (
    (VideoDecoder, "encode_latents", torch.stack),  # the others on a CPU alone
    (VideoDecoder, "encode_text", list),
    (stimuli, "encode_images", np.stack),
    (stimuli, "encode_actions", np.stack),
)


@contextmanager
def measuring(numbers: dict) -> Iterator[None]:
    """Operations, and the peak of all tensors that live: those there are, and those that are made."""
    counter = Counter()
    for x in gc.get_objects():
        if isinstance(x, torch.Tensor) and x.device.type != "meta":
            counter._see(x)
    if cuda := torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        with counter:
            yield
        numbers["flop"] = counter.flop  # not of a script, which ends the process
    finally:
        peak = torch.cuda.max_memory_allocated() if cuda else counter.peak
        numbers["peak"] = max(peak, numbers.get("peak", 0))


def measured(call: Callable, numbers: dict) -> Callable:
    """The call; its first two times are counted, and the seconds of the last remain in `numbers`."""

    def wrapped(*args, **options):
        numbers["calls"] = numbers.get("calls", 0) + 1
        start = time.perf_counter()
        with measuring(numbers) if numbers["calls"] < STEPS else nullcontext():
            result = call(*args, **options)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            numbers["card"] = torch.cuda.get_device_name()
        numbers["seconds"] = time.perf_counter() - start
        return result

    return wrapped


def inside(script: str, argv: list[str]) -> None:
    """Run a script as the command does, but for: two contents encoded, three steps. What a step or a
    reconstruction took goes to numbers.json."""
    numbers, start, with_controls = {}, RunFolder.__init__, retrieval.with_controls
    file = Path("numbers.json").absolute()
    for place, name, joined in FEW_ENCODED[: 1 if torch.cuda.is_available() else None]:
        setattr(place, name, encode_two(getattr(place, name), joined))

    @atexit.register
    def write_numbers():  # and the highest resident memory of this process, in kB (a parent's is not in it)
        numbers["resident"] = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        file.write_text(json.dumps(numbers))

    def few_steps(run, folder, settings, total, *more):
        start(run, folder, settings, min(total, STEPS), *more)

    def of_few_clips(brain_model, heads, x, targets, far):
        """Stage 1's table of the first 16 held-out clips, each half the other's control."""
        few = targets._make(field if field is None else field[:16] for field in targets)
        halves = np.arange(16) < 8
        return with_controls(brain_model, heads, x[:16], few, halves[:, None] != halves)

    RunFolder.__init__, retrieval.with_controls = few_steps, of_few_clips
    evaluate.CineNeuron.reconstruct = measured(evaluate.CineNeuron.reconstruct, numbers)
    for module in (train_stage1, train_stage2):
        module.train_step = measured(module.train_step, numbers)
    sys.argv = [script, *argv]
    if script == DEPTH:
        full_depth(train_stage1.parse(argv))
    elif script == "evaluate.py":
        door(lambda: evaluate.main(evaluate.parse(argv, evaluate.__doc__)))
    elif script.startswith("train"):
        module = train_stage1 if "1" in script else train_stage2
        door(lambda: module.main(module.parse(argv)))
    else:
        with measuring(numbers) if script == "data.py" else nullcontext():
            runpy.run_path(str(REPO / script), run_name="__main__")


def full_depth(config: train_stage1.Config) -> None:
    """Steps of stage 1 without an optimiser: 24 layers and AdamW's moments are more than 16 GB."""
    sizes = plan.sizes_of(config, None)
    model, batch = train_stage1.build(config, sizes), plan.fake_batch(config.batch_size, sizes)
    for field in batch[1:6]:  # x, e_img, e_txt, e_act, categories
        field.uniform_()
    for _ in range(STEPS):
        train_stage1.train_step(*model, batch, config)
    assert all(p.grad.isfinite().all() for part in model for p in part.parameters())


# ---------------------------------------------------------------- the commands


FEW = "--batch_size 2 --micro_batch 1"
SIZES = {  # tokens of the decoders; options of the videos' size, of the Brain Model, of both trainings
    "paper": ({"wan": 512, "cog": 226}, "", "", ""),
    "cpu": ({"wan": 512, "cog": 226}, "--frames 9 --height 64 --width 64", "--layers 4", FEW),
    "small": ({"wan": 16, "cog": 12}, "--frames 17 --height 64 --width 64", "--width 128 --layers 2",
              f"{FEW} --attention_heads 4"),
}  # fmt: skip
HEAD = "| command | exit | seconds | RSS, GB | peak / plan, GiB | TFLOP / plan | disk / plan, GB"
HEAD += " | s a step (TFLOP/s) / plan |\n" + "|---" * 8 + "|"
FILMS = {"cc2017": "cc2017/10_4231_R71Z42KK/video_fmri_dataset/stimuli", "cinebrain": "cinebrain/videos"}


class Rehearsal:
    """Runs commands in a folder beside raw/ and weights/, and keeps a row of each."""

    def __init__(self, folder: Path, sizes: str, training: str, judges: str):
        self.folder, self.sizes, self.training, self.judges = folder, sizes, training, judges
        self.rows, self.faults = [], []
        self.environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)}
        self.environment["TORCH_HOME"] = str(folder.parent / "weights/torch")
        if sizes != "paper":
            self.environment["CUDA_VISIBLE_DEVICES"] = ""

    def run(self, script: str, options: str, plan_of: str = "", stage: Path | None = None) -> None:
        """A command. plan_of: options of extras/plan.py; stage: the folder whose size the plan foretells."""
        command, start = " ".join(f"{script} {options}".split()), time.perf_counter()
        log = self.folder / f"{len(self.rows):02d}-{Path(script).stem}.txt"
        file = self.folder / "numbers.json"
        file.unlink(missing_ok=True)
        argv = [sys.executable, __file__, "--inside", *command.split()]
        with open(log, "wb") as out:
            code = subprocess.call(argv, cwd=self.folder, env=self.environment, stdout=out, stderr=out)
        numbers = json.loads(file.read_text()) if file.exists() else {}
        if code and (code, script) != (1, "extras/check.py"):  # the films of a miniature repeat: a leak
            self.faults.append(f"{command}: exit status {code}, see {log}")
        cells = [f"{code}", f"{time.perf_counter() - start:.0f}", f"{numbers.get('resident', 0) / 2**20:.1f}"]
        with chdir(self.folder):
            cells += self.compare(command, numbers, plan_of, stage) if plan_of else [""] * 4
        self.rows.append(f"| `{command}` | {' | '.join(cells)} |")
        print(self.rows[-1], flush=True)

    def compare(self, command: str, numbers: dict, plan_of: str, stage: Path | None) -> list[str]:
        """Cells "seen / planned" of memory, operations, disk and seconds; "-" is what was not seen."""
        name, *words = plan_of.split()
        planned = plan.PLANS[name](words, 1)
        need, on_disk = planned.need, (file for file in Path(stage or "-").rglob("*") if file.name in SAVED)
        disk = need.trained + need.state if stage else sum(planned.disk.values())
        without = need.state - need.trained if command.startswith(DEPTH) else 0  # AdamW's moments
        alike = ["GB"] if self.sizes == "small" else ["GiB", "TFLOP", "GB"]
        if self.sizes == "cpu" and name in ("evaluate", "prepare"):  # fp32, and fewer at once
            alike.remove("GiB")
        cells = []
        for kind, seen, counted, tolerance, unit in (
            ("GiB", numbers.get("peak"), need.peak - without, MEMORY, plan.GIB),
            ("TFLOP", numbers.get("flop"), need.flop, EXACT, plan.TERA),
            ("GB", stage and sum(file.stat().st_size for file in on_disk), disk, EXACT, plan.GB),
        ):
            cells.append(f"{'-' if seen is None else f'{seen / unit:.3g}'} / {counted / unit:.3g}")
            if seen and kind in alike and not abs(seen - counted) <= tolerance * counted:
                self.faults.append(f"{command}: {cells[-1]} {kind} planned, more than {tolerance:.0%} off")
        seconds, counted = numbers.get("seconds"), plan.seconds_of(planned, numbers.get("card", ""))
        cells.append(f"{seconds:.3g} ({need.flop / seconds / plan.TERA:.3g})" if seconds else "")
        cells[-1] += f" / {counted:.3g}" if counted else ""
        return cells

    def subject(self, data: str, run: str, decoder: str, release: str) -> None:
        """Preparation, stage 1, stage 2 and evaluation of a subject. release: options of data.py."""
        tokens, video, brain, both = SIZES[self.sizes]
        subject, rois = (3, "--rois visual,hippocampus,mpfc") if data == "cinebrain" else (1, "")
        words = f"--decoder {decoder} {video} --train-segments 2 --test-segments 1"
        self.run("data.py", f"{data} --subject {subject} {release} {words}", f"prepare --data {data} {words}")
        who, folder = f"--data {data} --subject {subject} --run {run}", f"runs/{data}/sub{subject}/{run}-s0"
        common = f"{who} --precision bf16 {both} {self.training}"
        words = f"{common} --tokens {tokens[run]} {brain} {rois}"
        self.run("train_stage1.py", words, f"stage1 {words}", Path(folder, "stage1"))
        words = f"{common} --stage1 {run} --decoder {decoder} --sample_every 0 {video}"
        self.run("train_stage2.py", words, f"stage2 {words}", Path(folder, "stage2"))
        words = f"{who} --clips {STEPS} --steps 2 --stimuli ../raw/{FILMS[data]} {self.judges}"
        self.run("evaluate.py", words, f"evaluate {words}")
        for state in (self.folder / folder).glob("*/state"):
            shutil.rmtree(state)  # of finished stages: three quarters of their disk


def rehearse(folder: Path, sizes: str, training: str) -> int:
    small = sizes == "small"
    for name, write in {"weights": write_weights, "raw": write_releases}.items():
        if not (folder / name).exists():
            with written_whole(folder / name) as part:
                write(part, small)
    for name in ("purdue", "neuroclips"):  # the data of one would take the place of the other's
        (folder / name).mkdir(exist_ok=True)
    at = f"{REPO}/toy" if small else "../weights"
    encoders = f"--clip local-dir:{at}/clip --viclip {at}/viclip{'' if small else '.pth'}"
    judges = f"--video_classifier {at}/videomae --image_classifier {at}/vit --dino {at}/dino --metrics "
    judges += ",".join(name for name in evaluate.Config().metrics.split(",") if name != "ms")
    judges += f" --clip local-dir:{at}/clip{'' if small else '-b32'} --clip_large local-dir:{at}/clip"
    judges += " --flow farneback" if small else ""  # RAFT would take most of the time
    show, purdue = Rehearsal(folder / "purdue", sizes, training, judges), f"--raw ../raw/cc2017 {encoders}"
    for run, decoder in {"wan": f"{at}/wan", "cog": "../weights/cog"}.items():
        show.subject("cc2017", run, decoder, f"{purdue} --captions ../raw/cc2017/captions.jsonl")
    for out in (show.folder / "runs/cc2017/sub1/wan-s0").glob("eval-*"):
        show.run("evaluate.py", f"--data cc2017 --subject 1 --compare wan/{out.name} cog/{out.name}")
    show.run("extras/check.py", "--data cc2017")
    show.run("extras/delay.py", "--data cc2017 --subject 1")
    if sizes == "cpu":
        words = f"--data cc2017 --precision bf16 {FEW}"
        show.run(DEPTH, words, f"stage1 {words}")
    show.subject("cinebrain", "wan", f"{at}/wan", f"--raw ../raw/cinebrain {encoders}")
    fourteen = "stage2 --data cc2017 --decoder ../weights/wan14"
    show.run("extras/plan.py", fourteen, fourteen)
    show.folder = folder / "neuroclips"
    show.subject("cc2017", "wan", f"{at}/wan", f"{purdue} --fmri-release ../raw/neuroclips")
    gpu = [sys.executable, "-m", "pytest", "-n", "0", "-m", "gpu", "tests/test_gpu.py"]
    if sizes == "paper" and subprocess.run(gpu, cwd=REPO).returncode:
        show.faults.append("pytest -m gpu failed: results of the GPU are not the CPU's")
    (folder / "rehearsal.md").write_text("\n".join([HEAD, *show.rows, "", *show.faults, ""]))
    print("\n".join(show.faults) or "all as planned")
    return bool(show.faults)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        sys.exit(inside(sys.argv[2], sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="the toy's networks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--training", default="", help="options of both trainings")
    options = parser.parse_args()
    sizes = "small" if options.small else "paper" if options.device == "cuda" else "cpu"
    sys.exit(rehearse(options.folder.resolve(), sizes, options.training))
