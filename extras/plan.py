"""What preparation, a training step or an evaluation needs, counted before anything is downloaded or run.

    python extras/plan.py prepare --data cc2017 --decoder ID        memory, hours, disk of data.py
    python extras/plan.py stage1 --data cc2017                      memory, hours, disk of train_stage1.py
    python extras/plan.py stage2 --data cc2017 --card 4090          of train_stage2.py, on a named card
    python extras/plan.py evaluate --data cc2017 --processes 8      of evaluate.py, in one of eight processes

All other options are the script's. Only sizes are read, of the run and the data where they are there, else
those published. Without --card the plan is for the GPU at hand and its free memory, or for an H100. The
scripts' own train_step runs on fake tensors (extras/counter.py), in bf16; of an evaluation one pass of DiT
and VAE; of preparation a batch of each encoder."""

import argparse
import sys
from collections.abc import Sequence
from math import ceil, prod
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import open_clip
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, this file sees the project
import evaluate  # noqa: E402
import train_stage1  # noqa: E402
import train_stage2  # noqa: E402
from brain_model import BrainModel  # noqa: E402
from data import Batch, Clips  # noqa: E402
from extras.counter import WAN_1_3B, Count, Repeated, counting, fake_pipeline  # noqa: E402, F401
from heads import Stage1Heads  # noqa: E402
from mixture_of_memories import DirectProjection, MemoryPool, MixtureOfMemories, TopTextMemory  # noqa: E402
from prepare import command  # noqa: E402
from prepare.decoder import WHOLE  # noqa: E402
from prepare.facts import SIZES  # noqa: E402
from prepare.viclip import ViCLIP  # noqa: E402
from support.files import MissingData  # noqa: E402
from support.options import Parser, settings_of, within  # noqa: E402
from support.pipelines import latent_shape  # noqa: E402
from support.readers import read_json, reading  # noqa: E402
from support.runs import door, run_folder  # noqa: E402
from support.shared import check_parts, read_settings  # noqa: E402
from support.training import check_processes  # noqa: E402
from video_decoder import VideoDecoder  # noqa: E402

GIB, GB, TERA = 1 << 30, 10**9, 10**12
# dense bf16 TFLOP/s with fp32 sums, of NVIDIA's data sheets (H100, H200 SXM: halved, since they say "with
# sparsity"; Ada and GA102 whitepapers), and GiB of memory; the first name that a card's name has counts
CARDS = {
    "H200": (989, 141), "H100": (989, 80), "A100": (312, 80),
    "L40S": (362, 48), "4090": (165, 24), "3090": (71, 24),
}  # fmt: skip
PUBLISHED = {  # what Clips.sizes will be, where no data is prepared
    # voxels: the NeuroClips release, subject 1; CineBrain's visual areas and hippocampi
    "cc2017": {"volumes": 1, "voxels": 13_447, "frames": 8, "embed_dim": 768, "classes": 12},
    "cinebrain": {"volumes": 5, "voxels": 8405 + 764 + 795, "frames": 8, "embed_dim": 768, "classes": 12},
}
SHOWINGS = {"cc2017": (2, 10), "cinebrain": (1, 1)}  # of a training and of a test clip
CAPTION = 40  # tokens of a caption (Wan's: those of CogVideoX fill the text length)


def fake_model(settings: dict, brain: dict, sizes: dict[str, int], memories: int) -> evaluate.CineNeuron:
    """As CineNeuron.from_stage1, on "meta", and with its errors. settings: of stage 2; brain: of BrainModel,
    which has the decoder's text length where `brain` does not say; sizes: of Clips."""
    pipe, L = fake_pipeline(settings["decoder"])
    D, size = sizes["embed_dim"], [settings[name] for name in ("frames", "height", "width")]
    with torch.device("meta"):
        brain_model = BrainModel(**{"tokens": L} | brain)
        width = brain_model.norm.normalized_shape[0]
        rank, alpha = settings["lora_rank"], settings["lora_alpha"]
        decoder = VideoDecoder(pipe, L, pipe.transformer.config, rank, alpha, settings["checkpointing"])
        D_txt, latents = decoder.text_width, torch.empty(memories, *latent_shape(decoder, *size))
        recall = SimpleNamespace(fewest=memories, trained=range(memories))
        clips = SimpleNamespace(sizes=sizes, recall=recall, latents=latents, empty=torch.empty(L, D_txt))
        stage1_config = {"tau": 0.07, "lambda_1": 1.0, "lambda_2": 1.0, "sizes": sizes}
        settings = settings | {"stage1_config": stage1_config}
        check_parts("stage 1", settings, clips, brain_model, decoder)
        if not settings["integration"]:
            mom = DirectProjection(width, D_txt)
        elif not settings["mom"]:
            mom = TopTextMemory(L, settings["K"])
        else:
            mom = MixtureOfMemories(L, width, D, D_txt, settings["K"], settings["attention_heads"])
        caption = torch.empty(1, D_txt, device="cpu")  # one for all: captions take no memory of the GPU
        return evaluate.CineNeuron(
            settings=settings,
            brain_model=brain_model,
            heads=Stage1Heads(D, sizes["frames"], sizes["classes"]),
            mom=mom,
            pool=MemoryPool(torch.empty(memories, 3, D), [caption] * memories),
            decoder=decoder,
            empty=clips.empty,
            lines=[],
            voxels={},
        )


def fake_batch(B: int, sizes: dict[str, int]) -> Batch:
    """A step of stage 1, of B clips."""
    D = sizes["embed_dim"]
    return Batch(
        clips=torch.empty(B, dtype=torch.long),
        x=torch.empty(B, sizes["volumes"], sizes["voxels"]),
        e_img=torch.empty(B, sizes["frames"], D),
        e_txt=torch.empty(B, D),
        e_act=torch.empty(B, D),
        categories=torch.empty(B, sizes["classes"]),
    )


def count_stage1(config: train_stage1.Config, sizes: dict[str, int], processes: int = 1) -> Count:
    """A step of train_stage1.py, in one of the processes."""
    config.precision = "bf16"
    clips = ceil(config.batch_size / processes)
    few = min(clips, 3 * (config.micro_batch or clips))  # parts beyond the third are as the third
    with torch.device("meta"):
        model = train_stage1.build(config, sizes)
    with counting() as counter:
        counter.hold(*model)
        counter.train(model, config.optimizer == "adamw8bit")
        train_stage1.train_step(*model, fake_batch(few, sizes), config)
        need = counter.count()
    return need._replace(flop=need.flop * clips // few)


def count_stage2(
    model: evaluate.CineNeuron, config: train_stage2.Config, sizes: dict[str, int], processes: int = 1
) -> Count:
    """A step of train_stage2.py, in one of the processes. model: of `fake_model`."""
    config.precision = "bf16"
    B, latents = ceil(config.batch_size / processes), latent_shape(model.decoder, *model.size)
    vae = [model.decoder.pipe.vae] if config.sample_every else []  # it shows samples
    with counting() as counter:
        counter.hold(model, *vae)
        counter.train([model.brain_model], config.optimizer == "adamw8bit")
        counter.train([model.mom, model.decoder], False)
        for p in filter(lambda p: p.requires_grad, model.decoder.parameters()):
            p.grad = torch.empty_like(p)  # as from the second part on
        once = Repeated(model.decoder.diffusion_loss, lambda y, f, *_: f.float().mean((1, 2)), counter)
        model.decoder.diffusion_loss = once
        batch = fake_batch(B, sizes)._replace(
            excluded=torch.zeros(B, len(model.pool.e), dtype=torch.bool),
            y=torch.empty(B, *latents, dtype=torch.float16),
            noise=torch.empty(B, *latents),
            u=torch.empty(B),
            dropped=torch.zeros(B, 1, 1, dtype=torch.bool),
        )
        train_stage2.train_step(model, batch, config)
        once.finish()
        return counter.count()


def count_evaluation(model: evaluate.CineNeuron, config: evaluate.Config, sizes: dict[str, int]) -> Count:
    """A clip of evaluate.py, in its batch: Brain Model and memories, the DiT in each step, the VAE."""
    steps = model.settings["sampling_steps"] if config.steps is None else config.steps
    guidance = model.settings["guidance"] if config.guidance is None else config.guidance
    passes = 2 if guidance > 1 else 1  # a step: with the prompt, and with the empty one
    B, vae, latents = config.batch_size, model.decoder.pipe.vae, latent_shape(model.decoder, *model.size)
    together = 1 if model.decoder.is_wan else passes  # CogVideoX has both passes in one batch
    if model.size[1] > 256:  # as evaluate.load_decoder
        vae.enable_tiling()
        vae.enable_slicing()
    with counting() as counter, torch.no_grad():
        counter.hold(model, vae)
        _, recalled = model(torch.empty(B, sizes["volumes"], sizes["voxels"]))
        prompt = recalled.f_fuse.repeat(together, 1, 1)  # (B or 2 B, L, D_txt)
        start = counter.flop
        model.decoder.predict(torch.empty(len(prompt), *latents), prompt, torch.empty(len(prompt)))
        counter.flop += (counter.flop - start) * (steps * passes // together - 1)
        at_once, start = 1 if vae.use_slicing else B, counter.flop
        others = torch.empty(B - at_once, 3, *model.size, dtype=vae.dtype)  # sliced, each of B costs the same
        vae.decode(torch.empty(at_once, *latents, dtype=vae.dtype), return_dict=False)
        counter.flop += (counter.flop - start) * (B // at_once - 1)
        need = counter.count()
        del others
    return need._replace(flop=need.flop // B)


def count_preparation(config: command.Config, decoder: VideoDecoder | None) -> dict[str, Count]:
    """The encoders of data.py, one after the other, of as many clips or captions at once as on a CPU."""
    kind, wanted = config.clip.partition("/")[0], "open_clip's MODEL/PRETRAINED, in a plan"
    with reading(config.clip, wanted, "choose another --clip"), torch.device("meta"):
        clip, viclip = open_clip.CLIP(**open_clip.get_model_config(kind)), ViCLIP()

    def encode(name: str, n: int) -> None:
        if name == "text encoder":
            decoder.pipe.text_encoder(torch.empty(n, decoder.text_length, dtype=torch.long))
        elif name == "VAE":
            decoder.encode_latents(torch.empty(n, *config.size, 3, dtype=torch.uint8))
        else:
            images = torch.empty(n, 8, 3, *clip.visual.image_size)
            with torch.autocast("cpu", torch.bfloat16):
                clip.encode_image(images.flatten(0, 1))
                viclip.encode_video(torch.empty(n, 8, 3, 224, 224))

    encoders, needs = {"CLIP and ViCLIP": (16, clip, viclip)}, {}
    if decoder:
        encoders |= {"text encoder": (32, decoder.pipe.text_encoder.eval()), "VAE": (1, decoder.pipe.vae)}
        decoder.pipe.vae.use_tiling = prod(config.size) > WHOLE
    for name, (n, *models) in encoders.items():
        with counting() as counter, torch.no_grad():
            counter.hold(*models)
            encode(name, n)
            need = counter.count()
        needs[name] = need._replace(flop=need.flop // n)
    return needs


# ---------------------------------------------------------------- the plans


class Plan(NamedTuple):
    title: str
    need: Count  # of one process
    unit: str  # what is counted: a step, a clip
    number: int  # of them, of one process
    share: float  # of a card's matrix rate that is taken to be reached
    disk: dict[str, float]  # bytes


def sizes_of(config, rois: str | None) -> dict[str, int]:
    """The sizes of the data where it is prepared, else those published. Raises MissingData where none is."""
    try:
        return Clips(config.data, config.subject, "train", rois).sizes
    except MissingData:
        if config.data not in PUBLISHED:
            raise
        return PUBLISHED[config.data]


def stage1_of(config: train_stage2.Config) -> tuple[dict, dict[str, int]]:
    """The options of the Brain Model that stage 2 starts from, and the sizes of its data."""
    run = Path("runs", config.data, f"sub{config.subject}", f"{config.stage1}-s{config.seed}")
    for folder in (run / "stage1", Path(config.stage1) / "stage1"):
        if (folder / "brain_model" / "config.json").is_file():
            sizes = read_json(folder / "config.json", keys={"sizes": dict})["sizes"]
            return read_json(folder / "brain_model" / "config.json"), sizes
    sizes = sizes_of(config, None)
    return {name: sizes[name] for name in ("voxels", "volumes", "embed_dim")}, sizes


def plan_preparation(options: list[str], processes: int) -> Plan:
    config, decoder = command.read(options), None
    if config.data not in SHOWINGS or processes > 1:
        raise ValueError(f"{config.data} in {processes} processes: wanted {' or '.join(SHOWINGS)}, in one")
    sizes, segments = sizes_of(config, None), (config.train_segments, config.test_segments)
    of_split = [n * clips for n, (_, clips) in zip(segments, SIZES[config.data].values(), strict=True)]
    showings = sum(n * shown for n, shown in zip(of_split, SHOWINGS[config.data], strict=True))
    clips, disk = sum(of_split), {"of fMRI, a subject": 4 * showings * config.window * sizes["voxels"]}
    disk["of embeddings"] = 4 * clips * (sizes["frames"] + 2) * sizes["embed_dim"]
    title = f"preparation of {config.data}, {clips:,} clips"
    if config.decoder:
        pipe, L = fake_pipeline(config.decoder, text_encoder=True)
        decoder = VideoDecoder(pipe, L, pipe.transformer.config, 0)
        disk["of latents, fp16"] = 2 * clips * prod(latent_shape(decoder, *config.size))
        tokens = CAPTION if decoder.is_wan else L
        disk[f"of text, {tokens} tokens a caption"] = 2 * clips * tokens * decoder.text_width
        title += " of {} x {} x {} by {}".format(*config.size, config.decoder)
    needs = count_preparation(config, decoder)
    largest = max(needs, key=lambda name: needs[name].peak)
    need = needs[largest]._replace(flop=sum(need.flop for need in needs.values()))
    return Plan(f"{title}, most memory by the {largest}", need, "clip", clips, 0.40, disk)


def plan_stage1(options: list[str], processes: int) -> Plan:
    config = train_stage1.parse(options)
    check_processes(config.batch_size, SimpleNamespace(num_processes=processes))
    sizes = sizes_of(config, config.rois)
    need, fmri = count_stage1(config, sizes, processes), f"{sizes['volumes']} x {sizes['voxels']:,} voxels"
    title = f"stage 1 of {config.data}, {fmri}, {config.batch_size} clips a step"
    disk = {"of weights": need.trained, "to go on (state/)": need.state}
    return Plan(title, need, "step", config.steps, 0.45, disk)


def plan_stage2(options: list[str], processes: int) -> Plan:
    config = train_stage2.parse(options)
    check_processes(config.batch_size, SimpleNamespace(num_processes=processes))
    brain, sizes = stage1_of(config)
    train, test = prod(SIZES[config.data]["train"]), prod(SIZES[config.data]["test"])
    model = fake_model(settings_of(config), brain, sizes, train)
    need = count_stage2(model, config, sizes, processes)
    steps = config.epochs * (train // config.batch_size)
    gifs = 1 + (steps - 1) // config.sample_every if config.sample_every else 0
    disk = {
        "of weights": need.trained,
        "to go on (state/)": need.state,
        "of latents (data/), fp16": 2.0 * (train + test) * prod(latent_shape(model.decoder, *model.size)),
        "of samples, at most": gifs * config.samples * config.frames * 2 * 128 * 128,  # a byte a pixel
    }
    video = f"{config.frames} x {config.height} x {config.width} by {config.decoder}"
    title = f"stage 2 of {config.data}, {video}, {config.batch_size} clips a step"
    return Plan(title, need, "step", steps, 0.40, disk)


def plan_evaluation(options: list[str], processes: int, stage2: Sequence[str] = ()) -> Plan:
    """stage2: options of train_stage2.py, for a run that is not there."""
    config = evaluate.parse(options, evaluate.__doc__)
    folder = run_folder(config.data, config.subject, config.run, config.seed) / "stage2"
    if (folder / "config.json").is_file():
        settings = read_settings(folder)
        brain, sizes = read_json(folder / "brain_model" / "config.json"), settings["sizes"]
    else:
        untrained = train_stage2.parse([*stage2, "--data", config.data, "--subject", str(config.subject)])
        settings, (brain, sizes) = settings_of(untrained), stage1_of(untrained)
    train, test = (prod(SIZES[config.data][split]) for split in ("train", "test"))
    model = fake_model(settings, brain, sizes, train)
    clips = min(config.clips or test, test)
    video = "{} x {} x {} by {}".format(*model.size, settings["decoder"])
    title = f"evaluation of {config.data}, {clips:,} clips of {video}"
    disk = {"of videos, at most": 2 * clips * prod(model.size)}  # a byte a pixel: H.264 takes less
    need = count_evaluation(model, config, sizes)
    return Plan(title, need, "clip", ceil(clips / processes), 0.40, disk)


PLANS = dict(prepare=plan_preparation, stage1=plan_stage1, stage2=plan_stage2, evaluate=plan_evaluation)


def card_of(name: str | None) -> tuple[str, float, str]:
    """The card that is named, the GPU at hand, or an H100: its name, free bytes, and a remark."""
    if name:
        return name, CARDS[name][1] * GIB, ""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0], ""
    return "H100", CARDS["H100"][1] * GIB, " (no GPU is at hand: one of 80 GB)"


def seconds_of(plan: Plan, name: str) -> float | None:
    """Of a unit on a card of this name; None where its rate is not known."""
    rate = next((CARDS[known][0] for known in CARDS if known in name), None)
    return rate and plan.need.flop / TERA / rate / plan.share


def report(plan: Plan, card: str | None, processes: int) -> str:
    """Memory, time and disk of a plan on a card."""
    name, free, remark = card_of(card)
    tera, gib = plan.need.flop / TERA, plan.need.peak / GIB
    a_unit = f"a {plan.unit}".ljust(15)
    fit = "fits" if plan.need.peak <= free else "DOES NOT FIT"
    extent = " a process, recomputation included" if plan.unit == "step" else ""
    lines = [
        f"{plan.title}: counted, not measured, for {processes} x {name}{remark}",
        f"peak memory    {gib:8.1f} GiB a process: {fit} in {free / GIB:.1f}",
        f"{a_unit}{tera:8,.1f} TFLOP{extent}",
    ]
    if known := next((known for known in CARDS if known in name), None):
        rate, seconds = CARDS[known][0], seconds_of(plan, name)
        lines.append(f"{a_unit}{seconds:8.2f} s at {plan.share:.0%} of {rate} TFLOP/s, dense bf16")
        lines.append(f"{f'{plan.number:,} {plan.unit}s':15}{seconds * plan.number / 3600:8.1f} hours")
    else:
        lines.append(f"{a_unit}no estimate of seconds: {name} is none of {', '.join(CARDS)}")
    lines += [f"disk           {size / GB:8.1f} GB {content}" for content, size in plan.disk.items()]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("plan.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("script", choices=PLANS)
    parser.add_argument("--card", choices=CARDS, help="the GPU that the plan is for")
    parser.add_argument("--processes", type=within(int, least=1), default=1, help="one a GPU [default: 1]")
    arguments, options = parser.parse_known_args(argv)
    plan = PLANS[arguments.script](options, arguments.processes)
    print(report(plan, arguments.card, arguments.processes))


if __name__ == "__main__":
    door(lambda: main(sys.argv[1:]))
