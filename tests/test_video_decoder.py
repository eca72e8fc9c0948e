"""The video decoder (Eq. 9) on tiny randomly initialised pipelines of both families, against diffusers itself; the
folders of pipelines and the LoRA files behind it (support/pipelines.py)."""

import json
import shutil
from collections import Counter
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import cogvideox_pipeline, wan_pipeline
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from data import noise_generator
from support.pipelines import LORA_FILE, check_prepared, latent_shape, load_lora, load_pipeline, save_lora
from video_decoder import VideoDecoder

diffusers.utils.logging.set_verbosity_error()

B, L, WIDTH = 4, 12, 16  # clips, text tokens, their width
SIZE, LATENT = (9, 32, 32), (4, 3, 4, 4)  # F, H, W -> C, f, h, w
PIPELINES = {"wan": WanPipeline, "cogvideox": CogVideoXPipeline}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("pipelines")
    for family, pipe in {"wan": wan_pipeline(), "cogvideox": cogvideox_pipeline()}.items():
        for parameter in pipe.transformer.parameters():  # the output layer starts at zero, where all is alike
            parameter.data += 0.05 * torch.randn_like(parameter)
        pipe.save_pretrained(root / family)
    return root


def load(folder: Path, rank: int = 4, alpha: float = 8, checkpointing: bool = False, **parts) -> VideoDecoder:
    """A decoder whose LoRA is not at its start, where lora_B is zero."""
    torch.manual_seed(1)
    pipe, text_length, config = load_pipeline(folder, **({"transformer": True} | parts))
    decoder = VideoDecoder(pipe, text_length, config, rank, alpha, checkpointing)
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return decoder


@pytest.fixture(params=PIPELINES)
def family(request) -> str:
    return request.param


@pytest.fixture
def folder(root, family) -> Path:
    return root / family


@pytest.fixture
def plain(folder, family):
    """What diffusers itself makes of the folder."""
    return PIPELINES[family].from_pretrained(folder)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "decoder")


@pytest.fixture
def batch() -> tuple[torch.Tensor, ...]:
    """y, f_fuse, noise, u"""
    g = torch.Generator().manual_seed(2)
    latents, f_fuse = torch.randn(2, B, *LATENT, generator=g), torch.randn(B, L, WIDTH, generator=g)
    return latents[0], f_fuse, latents[1], torch.rand(B, generator=g)


@pytest.fixture
def video() -> torch.Tensor:
    return torch.randint(0, 256, (2, *SIZE, 3), dtype=torch.uint8)


def generators(*clips: int) -> list[torch.Generator]:
    return [noise_generator(0, clip) for clip in clips]


def lora_gradients(decoder: VideoDecoder) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- loading


def test_only_the_parts_asked_for_are_loaded(folder):
    decoder = load(folder)
    assert decoder.pipe.vae is None and decoder.pipe.text_encoder is None and decoder.pipe.tokenizer is None
    assert (decoder.text_length, decoder.text_width) == (L, WIDTH)
    preparation = load(folder, transformer=False, vae=True, text_encoder=True)
    assert preparation.transformer is None and (preparation.text_length, preparation.text_width) == (L, WIDTH)


def test_text_length_of_wan_is_512_unless_its_tokenizer_says_less(tmp_path):
    pipe = wan_pipeline()
    pipe.tokenizer.model_max_length = int(1e30)  # what tokenizers without a limit hold
    pipe.save_pretrained(tmp_path)
    assert load_pipeline(tmp_path)[1] == 512


def test_lora_is_on_every_attention_projection_and_all_else_is_frozen(folder, family):
    decoder = load(folder, dtype=torch.bfloat16)
    trained = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
    attentions = 4 if family == "wan" else 2  # of 2 layers: self- and cross-attention; CogVideoX's is joint
    assert len(trained) == attentions * 4 * 2 and all("lora_" in name for name in trained)
    projections = {name.split(".lora_")[0].split(".", 4)[-1] for name in trained}
    assert projections == {"to_q", "to_k", "to_v", "to_out.0"}
    assert {p.dtype for p in trained.values()} == {
        torch.float32
    } and decoder.transformer.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in load(folder, rank=0).parameters())


@pytest.mark.parametrize(
    "index", [{"_class_name": "MochiPipeline"}, {"_class_name": "WanPipeline", "transformer_2": ["a", "b"]}]
)
def test_another_pipeline_is_refused(tmp_path, index):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match="wanted a WanPipeline with one transformer or a CogVideoXPipeline 1.0"
    ):
        load_pipeline(tmp_path)


def damage(file: Path, fault: str) -> None:
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif fault == "gone":
        file.unlink()
    elif fault == "other library":
        index = json.loads(file.read_text())
        file.write_text(json.dumps(index | {"scheduler": ["os", "system"]}))
    elif fault in ("NaN", "missing"):  # a weight
        weights = load_file(file)
        name = next(name for name in weights if weights[name].dim() > 1)
        weights[name] = weights[name] * torch.nan
        if fault == "missing":
            del weights[name]
        save_file(weights, file, metadata={"format": "pt"})
    else:
        file.write_text(fault)


@pytest.mark.parametrize(
    ("file", "fault"),
    [
        *(("model_index.json", fault) for fault in ("{", "[1]", "gone", "other library")),
        *((WEIGHTS, fault) for fault in ("cut", "gone", "NaN", "missing")),
        *(
            (f"{name}.json", "{")
            for name in ("transformer/config", "tokenizer/tokenizer", "tokenizer/tokenizer_config")
        ),
    ],
)
def test_a_damaged_pipeline_is_one_error_that_names_its_folder(copy, file, fault):
    damage(copy / file, fault)
    wanted = rf"^{copy}: found .*, wanted a WanPipeline .*: download it again"
    with pytest.raises(ValueError, match=wanted) as error:
        load_pipeline(copy, transformer=True, text_encoder=True)
    assert len(str(error.value).splitlines()) == 1


def test_weights_that_would_run_code_are_not_loaded(copy):
    torch.save(load_file(copy / WEIGHTS), copy / "transformer" / "diffusion_pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="wanted a WanPipeline"):
        load_pipeline(copy, transformer=True)


# ---------------------------------------------------------------- Eq. 9


@pytest.mark.parametrize(
    "scheduler, s, more", [("unipc", 3.0, 1.0), ("euler", 5.0, 1.0), ("unipc", 3.0, 5.0)]
)
def test_wan_loss_is_the_velocity_error_at_the_shifted_time(root, batch, scheduler, s, more):
    decoder = load(root / "wan")
    decoder.noise_shift = more  # shifts multiply
    if scheduler == "euler":
        decoder.scheduler = FlowMatchEulerDiscreteScheduler(shift=s)
    y, f_fuse, noise, u = batch
    expected, s = [], s * more
    for i in range(B):  # by hand, a clip at a time
        sigma = s * u[i].item() / (1 + (s - 1) * u[i].item())
        y_t, t = y[i] + sigma * (noise[i] - y[i]), torch.tensor([1000 * sigma])
        prediction = decoder.transformer(y_t[None], timestep=t, encoder_hidden_states=f_fuse[i : i + 1])
        expected.append((prediction.sample[0] - (noise[i] - y[i])).square().mean())
    torch.testing.assert_close(decoder.diffusion_loss(*batch), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_shifted_times_are_those_the_sampler_visits(root):
    decoder = load(root / "wan")
    for scheduler in (decoder.scheduler, FlowMatchEulerDiscreteScheduler(shift=3.0)):
        scheduler.set_timesteps(10)
        visited = scheduler.sigmas[:-1]
        u = visited / (3 - 2 * visited)  # the inverse of σ = 3 u / (1 + 2 u)
        steps = u.diff()
        torch.testing.assert_close(steps, steps.mean().expand(9), rtol=0.02, atol=0)  # uniform in u


def test_cogvideox_loss_is_the_weighted_error_of_the_clean_latents(root, batch):
    """The form of CogVideoX's own training, mean of (ŷ - y)² / (1 - ᾱ), equals the error of its v-prediction."""
    decoder, plain = load(root / "cogvideox"), CogVideoXPipeline.from_pretrained(root / "cogvideox")
    y, f_fuse, noise, u = batch
    rotary = plain._prepare_rotary_positional_embeddings(*SIZE[1:], LATENT[1], torch.device("cpu"))
    expected = []
    for i in range(B):
        t = int(1000 * u[i])
        a = plain.scheduler.alphas_cumprod[t].float()
        y_t = a.sqrt() * y[i] + (1 - a).sqrt() * noise[i]
        prediction = decoder.transformer(
            y_t.transpose(0, 1)[None],
            timestep=torch.tensor([t]),
            encoder_hidden_states=f_fuse[i : i + 1],
            image_rotary_emb=rotary,
        )
        y_hat = a.sqrt() * y_t - (1 - a).sqrt() * prediction.sample[0].transpose(0, 1)
        expected.append((y_hat - y[i]).square().mean() / (1 - a))
    torch.testing.assert_close(decoder.diffusion_loss(*batch), torch.stack(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["velocity", "v_prediction", "epsilon", "sample"])
def test_a_perfect_prediction_costs_nothing(root, batch, kind, monkeypatch):
    decoder = load(root / ("wan" if kind == "velocity" else "cogvideox"))
    y, _, noise, u = batch
    if kind == "velocity":
        answer = noise - y
    else:
        decoder.scheduler.register_to_config(prediction_type=kind)
        a = decoder.scheduler.alphas_cumprod.float()[(1000 * u).long()][:, None, None, None, None]
        answer = {"epsilon": noise, "sample": y, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * y}[kind]
        answer = answer.transpose(1, 2).clone()  # as the DiT sees latents: (B, f, C, h, w)
    monkeypatch.setattr(decoder.transformer, "forward", lambda *args, **kwargs: (answer,))
    torch.testing.assert_close(decoder.diffusion_loss(*batch), torch.zeros(B), rtol=0, atol=1e-10)
    answer[0] += 1  # and an error of one everywhere costs one
    torch.testing.assert_close(
        decoder.diffusion_loss(*batch), torch.tensor([1.0, 0, 0, 0]), rtol=0, atol=1e-5
    )


def test_gradients_reach_lora_and_f_fuse_and_no_frozen_weight(folder, batch):
    decoder, f_fuse = load(folder), batch[1].requires_grad_()
    decoder.diffusion_loss(*batch).mean().backward()
    assert (f_fuse.grad.abs().sum((1, 2)) > 0).all()
    for name, parameter in decoder.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == ("lora_" in name), name


class Counted(TorchDispatchMode):
    """with Counted() as ran: how often each operation ran. What `recompute` has kept does not run again."""

    def __init__(self):
        super().__init__()
        self.times = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.times[function] += 1
        return function(*args, **(kwargs or {}))


def test_recomputation_keeps_every_bit_and_runs_attention_once(folder, family, batch):
    gradients, gelu, attention = [], [], []
    for checkpointing in (False, True):
        decoder = load(folder, checkpointing=checkpointing)
        assert decoder.transformer.is_gradient_checkpointing == checkpointing
        with Counted() as counted:
            decoder.diffusion_loss(*batch).mean().backward()
        gelu.append(counted.times[torch.ops.aten.gelu.default])
        attention.append(counted.times[getattr(torch.ops.aten, ATTENTION).default])
        gradients.append(lora_gradients(decoder))
    assert attention == ([4, 4] if family == "wan" else [2, 2])  # of 2 blocks
    assert gelu[1] == gelu[0] + 2  # all else runs twice
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a_bf16_dit_trains_a_float32_lora_and_generates(folder, batch):
    exact, decoder = load(folder), load(folder, vae=True, dtype=torch.bfloat16)
    y, f_fuse, noise, u = batch
    f_fuse.requires_grad_()
    loss = decoder.diffusion_loss(y.half(), f_fuse, noise, u)
    loss.mean().backward()
    assert loss.dtype == f_fuse.grad.dtype == torch.float32 and f_fuse.grad.abs().sum() > 0
    torch.testing.assert_close(loss, exact.diffusion_loss(*batch), rtol=0.05, atol=0.05)
    video = decoder.generate(f_fuse.detach(), torch.zeros(L, WIDTH), SIZE, generators(*range(B)), 2)
    assert video.shape == (B, *SIZE, 3)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(folder, batch, parts):
    """A clip's loss depends on no other clip."""
    decoder, gradients = load(folder), []
    f_fuse = batch[1].requires_grad_()
    for n in (1, parts):
        decoder.zero_grad()
        f_fuse.grad = None
        for part in torch.arange(B).chunk(n):
            (decoder.diffusion_loss(*(x[part] for x in batch)).sum() / B).backward()
        gradients.append(lora_gradients(decoder) | {"f_fuse": f_fuse.grad})
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- generation


def test_generate_is_the_pipeline_with_the_same_prompt_embeds(folder, plain):
    decoder = load(folder, rank=0, vae=True)
    f_fuse, empty = torch.randn(2, L, WIDTH), torch.randn(L, WIDTH)
    video = decoder.generate(f_fuse, empty, SIZE, generators(0, 1), 3, 4.0)
    expected = plain(
        prompt_embeds=f_fuse,
        negative_prompt_embeds=torch.stack([empty, empty]),
        num_frames=SIZE[0],
        height=SIZE[1],
        width=SIZE[2],
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=generators(0, 1),
        output_type="np",
    ).frames
    assert video.dtype == torch.uint8 and video.shape == (2, *SIZE, 3)
    assert abs(video.numpy() - expected * 255).max() <= 0.501 and video.float().std() > 1
    other = decoder.generate(f_fuse.flip(0), empty, SIZE, generators(0, 1), 3)
    assert not torch.equal(other, video)  # the condition matters


def test_a_clip_does_not_depend_on_its_batch(folder):
    decoder, f_fuse, empty = load(folder, vae=True), torch.randn(3, L, WIDTH), torch.randn(L, WIDTH)
    whole = decoder.generate(f_fuse, empty, SIZE, generators(0, 1, 2), steps=2)
    alone = decoder.generate(f_fuse[1:2], empty, SIZE, generators(1), steps=2)
    assert (whole[1].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(whole[0], whole[1])


# ---------------------------------------------------------------- VAE and text encoder


def test_latents_are_the_normalised_mode_and_decode_as_the_pipeline_does(folder, family, video):
    decoder = load(folder, transformer=False, vae=True)
    latents, vae = decoder.encode_latents(video), decoder.pipe.vae
    assert latents.shape == (2, *LATENT) and torch.equal(latents, decoder.encode_latents(video))
    assert latent_shape(decoder, *SIZE) == LATENT
    with torch.no_grad():
        z = vae.encode(video.permute(0, 4, 1, 2, 3).float() / 255 * 2 - 1).latent_dist.mean
        frames = decoder.pipe.video_processor.postprocess_video(vae.decode(z).sample, output_type="np")
    mean, std = torch.zeros(4), torch.full((4,), 1 / 0.7)
    if family == "wan":
        mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    expected = (z - mean[:, None, None, None]) / std[:, None, None, None]
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)
    decoded = decoder.decode_latents(latents)
    assert decoded.shape == video.shape and abs(decoded.numpy() - frames * 255).max() <= 0.51


def test_tiling_keeps_a_video_smaller_than_a_tile(folder, video):
    plain, tiled = load(folder, vae=True), load(folder, vae=True, tiling=True)
    assert tiled.pipe.vae.use_tiling and tiled.pipe.vae.use_slicing
    torch.testing.assert_close(plain.encode_latents(video), tiled.encode_latents(video), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 32, 32), (9, 40, 32), (9, 32, 34)])
def test_a_size_that_does_not_divide_is_refused(folder, size):
    decoder = load(folder, transformer=False, vae=True)
    with pytest.raises(
        ValueError, match=f"{folder}: a video of {size[0]} frames.*, does not fit: wanted [48]k"
    ):
        latent_shape(decoder, *size)


def test_what_was_prepared_for_another_decoder_is_refused(folder):
    decoder = load(folder)
    check_prepared(decoder, LATENT, (L, WIDTH))
    reads = (
        rf"but {folder} reads 4 channels in patches of .*, {L} tokens of width {WIDTH}: prepare them for it"
    )
    for latents, empty in (
        (LATENT, (L, 8)),
        (LATENT, (9, WIDTH)),
        ((3, 3, 4, 4), (L, WIDTH)),
        ((4, 3, 4, 3), (L, WIDTH)),
    ):
        with pytest.raises(ValueError, match=reads):
            check_prepared(decoder, latents, empty)


def test_a_vae_of_other_factors_works_where_its_config_says_them(video):
    """2x in time, 8x in space of which 4x are patches, as the toy world's."""
    pixels = dict(is_residual=True, patch_size=4, in_channels=48, out_channels=48)
    pipe = wan_pipeline(dim_mult=[1, 1], temperal_downsample=[True], scale_factor_temporal=2, **pixels)
    decoder = VideoDecoder(pipe, L, pipe.transformer.config)
    latents = decoder.encode_latents(video)
    assert latents.shape[1:] == latent_shape(decoder, *SIZE) == (4, 5, 4, 4)
    assert decoder.decode_latents(latents).shape == video.shape
    f_fuse = torch.randn(2, L, WIDTH)
    assert decoder.generate(f_fuse, f_fuse[0], SIZE, generators(0, 1), 2).shape == video.shape


def test_text_tokens_are_the_pipelines_prompt_embeds(folder, family, plain):
    decoder, captions = load(folder, transformer=False, text_encoder=True), ["a red circle grows", "", "blue"]
    tokens = decoder.encode_text(captions)
    lengths = [5, 1, 2] if family == "wan" else [L] * 3  # words and </s>; CogVideoX's padding has values
    assert [e.shape for e in tokens] == [(n, WIDTH) for n in lengths]
    expected, _ = plain.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=L)
    padded = torch.stack([nn.functional.pad(e, (0, 0, 0, L - len(e))) for e in tokens])
    torch.testing.assert_close(padded, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(padded == 0, expected == 0)
    assert decoder.encode_text(["red " * 40])[0].shape == (L, WIDTH)  # a long caption is cut


# ---------------------------------------------------------------- LoRA files


def test_saved_lora_loads_in_plain_diffusers_and_gives_the_same_videos(folder, plain, tmp_path):
    decoder = load(folder, vae=True)
    save_lora(decoder, tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [LORA_FILE]
    f_fuse, empty = torch.randn(1, L, WIDTH), torch.randn(L, WIDTH)
    video = decoder.generate(f_fuse, empty, SIZE, generators(0), steps=2)

    def generated() -> torch.Tensor:
        return VideoDecoder(plain, L, plain.transformer.config, lora_rank=0).generate(
            f_fuse, empty, SIZE, generators(0), steps=2
        )

    without = generated()
    plain.load_lora_weights(tmp_path / "lora")
    assert (video.int() - generated().int()).abs().max() <= 1  # its scale, 8/4, too
    assert (video.int() - without.int()).abs().max() > 2


def test_lora_loads_back_and_another_models_is_refused(folder, batch, tmp_path):
    decoder, fresh = load(folder), load(folder)
    nn.init.zeros_(next(p for name, p in fresh.named_parameters() if "lora_B" in name))
    save_lora(decoder, tmp_path)
    parameters = list(fresh.parameters())
    assert not torch.allclose(fresh.diffusion_loss(*batch), decoder.diffusion_loss(*batch), rtol=1e-4)
    load_lora(fresh, tmp_path)
    torch.testing.assert_close(fresh.diffusion_loss(*batch), decoder.diffusion_loss(*batch))
    # an optimiser keeps hold of them
    assert all(a is b for a, b in zip(fresh.parameters(), parameters, strict=True))
    for rank, alpha in ((8, 8), (4, 4)):
        wanted = f"found .*rank 4, alpha 8, wanted the .*rank {rank}, alpha {alpha} of {folder}"
        with pytest.raises(ValueError, match=f"{LORA_FILE}: {wanted}"):
            load_lora(load(folder, rank, alpha), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: {name: x for name, x in weights.items() if "blocks.0" not in name},
            "matrices of rank 4",
        ),
        (lambda weights: {name.replace("lora_A", "lora_C"): x for name, x in weights.items()}, "matrices of"),
        (lambda weights: {name: x * torch.nan for name, x in weights.items()}, "NaN or infinity in .*lora_"),
        (lambda weights: {name: x[:1].contiguous() for name, x in weights.items()}, "matrices of"),
        ("no metadata", "object is not subscriptable"),
        ("cut", "."),
    ],
)
def test_a_damaged_lora_is_one_error_and_changes_nothing(folder, tmp_path, change, message):
    decoder, file = load(folder), tmp_path / LORA_FILE
    save_lora(decoder, tmp_path)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    if change == "cut":
        damage(file, change)
    elif change == "no metadata":
        save_file(weights, file)
    else:
        save_file(change(weights), file, metadata)
    before = [p.clone() for p in decoder.parameters()]
    wanted = f"{LORA_FILE}: found .*{message}.*, wanted the {len(weights)} matrices"
    with pytest.raises(ValueError, match=wanted):
        load_lora(decoder, tmp_path)
    assert all(map(torch.equal, before, decoder.parameters()))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{LORA_FILE} is not there: load it into the decoder"):
        load_lora(decoder, tmp_path)
