"""The video decoder (Eq. 9) against diffusers; folders of pipelines and LoRA files (support/pipelines.py)."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import environment
from diffusers import CogVideoXPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline
from test_faults import raw, setting, tensors
from tiny import D_TXT, LATENT, SIZE, L, away_from_zero, wan_pipeline
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from data import noise_generator
from support import pipelines
from support.files import write_text
from support.pipelines import LORA_FILE, latent_shape, load_lora, load_pipeline, save_lora
from video_decoder import VideoDecoder, shifted

B = 4
PIPELINES = {"wan": WanPipeline, "cogvideox": CogVideoXPipeline}
WEIGHTS = "diffusion_pytorch_model.safetensors"
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
G = torch.Generator().manual_seed(2)
(Y, NOISE), U = torch.randn(2, B, *LATENT, generator=G), torch.rand(B, generator=G)
F_FUSE, EMPTY = torch.randn(B, L, D_TXT, generator=G), torch.randn(L, D_TXT, generator=G)
BATCH = Y, F_FUSE, NOISE, U
VIDEO = torch.randint(0, 256, (2, *SIZE, 3), dtype=torch.uint8, generator=G)


def load(folder: Path, rank: int = 4, alpha: float = 8, checkpointing: bool = False, **parts) -> VideoDecoder:
    """A decoder whose LoRA is not at its start, where lora_B is zero."""
    torch.manual_seed(1)
    pipe, text_length, config = load_pipeline(folder, **({"transformer": True} | parts))
    decoder = VideoDecoder(pipe, text_length, config, rank, alpha, checkpointing)
    away_from_zero(decoder)
    return decoder


@pytest.fixture(params=PIPELINES)
def family(request) -> str:
    return request.param


@pytest.fixture
def folder(tiny, family) -> Path:
    return tiny / "models" / family


@pytest.fixture
def plain(folder, family):
    return PIPELINES[family].from_pretrained(folder)


def generators(*clips: int) -> list[torch.Generator]:
    return [noise_generator(0, clip) for clip in clips]


def test_only_the_parts_asked_for_are_loaded_in_the_dtype_that_the_family_wants(folder, family, tmp_path):
    decoder = load(folder)
    assert decoder.pipe.vae is None and decoder.pipe.text_encoder is None and decoder.pipe.tokenizer is None
    assert (decoder.text_length, decoder.text_width) == (L, D_TXT)
    decoder = load(folder, transformer=False, vae=True, text_encoder=True, dtype=torch.bfloat16)
    pipe = decoder.pipe
    assert pipe.transformer is None and pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.vae.dtype == (torch.float32 if family == "wan" else torch.bfloat16)
    assert not (pipe.vae.use_tiling or pipe.vae.use_slicing)
    decoder.to("meta")  # shows what a GPU would
    assert pipe.vae.device.type == pipe.text_encoder.device.type == "meta"
    wide = shutil.copytree(folder, tmp_path / "wide")  # a text encoder of T5-XXL's width is in bf16 anywhere
    setting(**{"text_dim" if family == "wan" else "text_embed_dim": 4096})(wide / "transformer/config.json")
    if family == "wan":  # whose tokenizer may say more than 512
        setting(model_max_length=int(1e30))(wide / "tokenizer/tokenizer_config.json")
    for name, dtype, length in ((folder, torch.float32, L), (wide, torch.bfloat16, 512)):
        pipe, text_length, _ = load_pipeline(name, vae=True, text_encoder=True)
        assert (pipe.text_encoder.dtype, pipe.vae.dtype) == (dtype, torch.float32)
        assert family == "cogvideox" or text_length == length


def test_lora_is_on_every_attention_projection_and_starts_as_nothing(folder, family):
    decoder = load(folder, dtype=torch.bfloat16)
    trained = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
    attentions = 4 if family == "wan" else 2  # of 2 layers: self- and cross-attention; CogVideoX's is joint
    assert len(trained) == attentions * 4 * 2 and all("lora_" in name for name in trained)
    projections = {name.split(".lora_")[0].split(".", 4)[-1] for name in trained}
    assert projections == {"to_q", "to_k", "to_v", "to_out.0"}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert decoder.transformer.dtype == torch.bfloat16
    plain = load(folder, rank=0)
    assert not any(p.requires_grad for p in plain.parameters())
    decoder = VideoDecoder(*load_pipeline(folder, transformer=True))
    assert torch.equal(decoder.diffusion_loss(*BATCH), plain.diffusion_loss(*BATCH))
    blocks = "blocks" if decoder.is_wan else "transformer_blocks"
    module = load(folder).transformer.get_submodule(f"{blocks}.1.attn1.to_q")
    A, B = module.lora_A.default.weight, module.lora_B.default.weight
    x = torch.randn(3, A.shape[1])
    torch.testing.assert_close(module(x), module.base_layer(x) + 8 / 4 * x @ (B @ A).T, rtol=1e-4, atol=1e-5)
    settings = decoder.transformer.peft_config["default"]
    assert A.shape[0] == 4 and settings.r == settings.lora_alpha == 16  # the paper's


NAN, AGAIN = tensors(_=lambda w: w * torch.nan), "wanted a .*: download it again"
TWO = {"transformer_2": ["diffusers", "WanTransformer3DModel"]}  # Wan2.2
FAULTS = [  # file, damage, error
    (
        "model_index.json",
        setting(_class_name="MochiPipeline"),
        "a MochiPipeline, wanted a WanPipeline with one",
    ),
    ("model_index.json", setting(**TWO), "a .* of two transformers, wanted a"),
    ("model_index.json", setting(scheduler=["os", "system"]), "a (Wan|CogVideoX)Pipeline, wanted a"),
    (
        "transformer/config.json",
        setting(patch_size_t=2),
        "a CogVideoXPipeline 1.5, with patch_size_t, wanted a",
    ),
    (f"transformer/{WEIGHTS}", Path.unlink, f".*, {AGAIN}"),
    (f"transformer/{WEIGHTS}", tensors(_=None), rf"no [\w.]+, {AGAIN}"),
    (f"transformer/{WEIGHTS}", NAN, f"no finite .*, {AGAIN}"),
    (f"vae/{WEIGHTS}", NAN, f"no finite .*, {AGAIN}"),
    ("text_encoder/model.safetensors", NAN, f"no finite .*, {AGAIN}"),
    ("tokenizer/tokenizer.json", raw("{"), f".*, {AGAIN}"),
]


@pytest.mark.parametrize("file, damage, error", FAULTS)
def test_a_damaged_pipeline_is_one_error_that_names_its_folder(folder, tmp_path, file, damage, error):
    copy = shutil.copytree(folder, tmp_path / "decoder")
    damage(copy / file)
    with pytest.raises(ValueError, match=f"^{copy}: found {error}"):
        load_pipeline(copy, transformer=True, vae=True, text_encoder=True)


def test_the_last_row_of_a_long_matrix_is_read_too():
    model = torch.nn.Linear(1, 5000, bias=False)
    model.weight.data[-1] = torch.inf
    with pytest.raises(ValueError, match="no finite weight"):
        pipelines._check_finite(model)


@pytest.mark.parametrize("s, more", [(3.0, 1.0), (5.0, 1.0), (None, 1.0), (3.0, 5.0)])
def test_wan_loss_is_the_velocity_error_at_the_shifted_time(tiny, s, more):
    decoder = load(tiny / "models" / "wan")
    decoder.noise_shift = more  # shifts multiply
    if s == 5.0:
        decoder.scheduler = FlowMatchEulerDiscreteScheduler(shift=s)
    decoder.scheduler.register_to_config(**({"flow_shift": None} if s is None else {}))
    expected, s = [], (s or 3.0) * more
    for i in range(B):  # by hand, a clip at a time
        sigma = s * U[i].item() / (1 + (s - 1) * U[i].item())
        y_t, t = Y[i] + sigma * (NOISE[i] - Y[i]), torch.tensor([1000 * sigma])
        prediction = decoder.transformer(y_t[None], timestep=t, encoder_hidden_states=F_FUSE[i : i + 1])
        expected.append((prediction.sample[0] - (NOISE[i] - Y[i])).square().mean())
    torch.testing.assert_close(decoder.diffusion_loss(*BATCH), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_shifted_times_are_those_the_sampler_visits():
    for scheduler in (wan_pipeline().scheduler, FlowMatchEulerDiscreteScheduler(shift=3.0)):
        scheduler.set_timesteps(10)
        u = torch.linspace(1, scheduler.sigmas[-2] / (3 - 2 * scheduler.sigmas[-2]), 10)
        torch.testing.assert_close(shifted(u, 3.0), scheduler.sigmas[:-1], rtol=1e-3, atol=0)


def test_cogvideox_loss_is_the_weighted_error_of_the_clean_latents(tiny):
    """The form of CogVideoX's own training, mean of (ŷ - y)² / (1 - ᾱ), equals the error of its v-prediction."""
    folder = tiny / "models" / "cogvideox"
    decoder, plain = load(folder), CogVideoXPipeline.from_pretrained(folder)
    rotary = plain._prepare_rotary_positional_embeddings(*SIZE[1:], LATENT[1], torch.device("cpu"))
    expected = []
    for i in range(B):
        t, text = torch.tensor([int(1000 * U[i])]), F_FUSE[i : i + 1]
        a = plain.scheduler.alphas_cumprod[t].float()
        y_t = (a.sqrt() * Y[i] + (1 - a).sqrt() * NOISE[i]).transpose(0, 1)
        given = dict(timestep=t, encoder_hidden_states=text, image_rotary_emb=rotary)
        prediction = decoder.transformer(y_t[None], **given)
        y_hat = (a.sqrt() * y_t - (1 - a).sqrt() * prediction.sample[0]).transpose(0, 1)
        expected.append((y_hat - Y[i]).square().mean() / (1 - a[0]))
    torch.testing.assert_close(decoder.diffusion_loss(*BATCH), torch.stack(expected), rtol=1e-3, atol=1e-4)
    half, single = (decoder.diffusion_loss(x, *BATCH[1:]) for x in (Y.half(), Y.half().float()))
    assert torch.equal(half, single)  # as latents are kept: noised in float32 all the same
    decoder.noise_shift, u = 5.0, torch.full((B,), 1 - 2**-23)
    assert (shifted(u, 5.0) == 1).all()  # by rounding, and yet no timestep follows 999
    assert decoder.diffusion_loss(Y, F_FUSE, NOISE, u).isfinite().all()


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_other_predictions_of_cogvideox_are_compared_with_what_they_predict(tiny, kind, monkeypatch):
    decoder = load(tiny / "models" / "cogvideox")
    decoder.scheduler.register_to_config(prediction_type=kind)
    answer = {"epsilon": NOISE, "sample": Y}[kind].transpose(1, 2).clone()  # (B, f, C, h, w)
    answer[0] += 1  # an error of one everywhere costs one
    monkeypatch.setattr(decoder.transformer, "forward", lambda *args, **kwargs: (answer,))
    wanted = torch.tensor([1.0, 0, 0, 0])
    torch.testing.assert_close(decoder.diffusion_loss(*BATCH), wanted, rtol=0, atol=1e-5)


class Counted(TorchDispatchMode):
    """with Counted() as ran: how often each operation ran. What `recompute` has kept does not run again."""

    def __init__(self):
        super().__init__()
        self.times = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.times[function] += 1
        return function(*args, **(kwargs or {}))


def test_gradients_reach_lora_and_prompt_alone_and_recomputation_keeps_every_bit(folder, family):
    gradients, gelu, attention = [], [], []
    for checkpointing in (False, True):
        decoder, f_fuse = load(folder, checkpointing=checkpointing), F_FUSE.clone().requires_grad_()
        with Counted() as counted:
            decoder.diffusion_loss(Y, f_fuse, *BATCH[2:]).mean().backward()
        assert (f_fuse.grad.abs().sum((1, 2)) > 0).all()
        named = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
        assert named.keys() == {name for name, _ in decoder.named_parameters() if "lora_" in name}
        assert all(gradient.abs().sum() > 0 for gradient in named.values())
        gelu.append(counted.times[torch.ops.aten.gelu.default])
        attention.append(counted.times[getattr(torch.ops.aten, ATTENTION).default])
        gradients.append(named | {"f_fuse": f_fuse.grad})
    assert attention == ([4, 4] if family == "wan" else [2, 2])  # of 2 blocks, once
    assert gelu[1] == gelu[0] + 2  # all else runs twice
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a_bf16_dit_trains_a_float32_lora_and_generates(folder):
    exact, decoder = load(folder), load(folder, vae=True, dtype=torch.bfloat16)
    f_fuse = F_FUSE.clone().requires_grad_()
    loss = decoder.diffusion_loss(Y.half(), f_fuse, NOISE, U)
    loss.mean().backward()
    assert loss.dtype == f_fuse.grad.dtype == torch.float32 and f_fuse.grad.abs().sum() > 0
    torch.testing.assert_close(loss, exact.diffusion_loss(*BATCH), rtol=0.05, atol=0.05)
    video = decoder.generate(f_fuse.detach(), torch.zeros(L, D_TXT), SIZE, generators(*range(B)), 2)
    assert video.shape == (B, *SIZE, 3)


def test_generate_is_the_pipeline_with_the_same_prompt_embeds(folder, plain):
    decoder = load(folder, rank=0, vae=True)
    video = decoder.generate(F_FUSE[:2], EMPTY, SIZE, generators(0, 1), 3, 4.0)
    F, H, W = SIZE
    expected = plain(
        prompt_embeds=F_FUSE[:2], negative_prompt_embeds=torch.stack([EMPTY, EMPTY]), num_frames=F, height=H, width=W,
        num_inference_steps=3, guidance_scale=4.0, generator=generators(0, 1), output_type="np",
    ).frames  # fmt: skip
    assert video.dtype == torch.uint8 and video.shape == (2, *SIZE, 3)
    assert abs(video.numpy() - expected * 255).max() <= 0.501 and video.float().std() > 1


def test_latents_are_the_normalised_mode_and_decode_as_the_pipeline_does(folder, family):
    decoder = load(folder, transformer=False, vae=True)
    latents, vae = decoder.encode_latents(VIDEO), decoder.pipe.vae
    assert latents.shape == (2, *LATENT) and torch.equal(latents, decoder.encode_latents(VIDEO))
    with torch.no_grad():
        z = vae.encode(VIDEO.permute(0, 4, 1, 2, 3).float() / 255 * 2 - 1).latent_dist.mean
        frames = decoder.pipe.video_processor.postprocess_video(vae.decode(z).sample, output_type="np")
    mean, std = torch.zeros(4), torch.full((4,), 1 / 0.7)
    if family == "wan":
        mean, std = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([1.5, 0.5, 2.0, 1.0])
    expected = (z - mean[:, None, None, None]) / std[:, None, None, None]
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)
    decoded = decoder.decode_latents(latents)
    assert decoded.shape == VIDEO.shape and abs(decoded.numpy() - frames * 255).max() <= 0.51
    tiled = load(folder, vae=True, tiling=True).pipe.vae
    assert tiled.use_tiling and tiled.use_slicing


def test_a_vae_of_other_factors_works_where_its_config_says_them():
    """2x in time, 8x in space of which 4x are patches, as the toy world's."""
    pixels = dict(is_residual=True, patch_size=4, in_channels=48, out_channels=48)
    pipe = wan_pipeline(dim_mult=[1, 1], temperal_downsample=[True], scale_factor_temporal=2, **pixels)
    decoder = VideoDecoder(pipe, L, pipe.transformer.config)
    latents = decoder.encode_latents(VIDEO)
    assert latents.shape[1:] == latent_shape(decoder, *SIZE) == (4, 5, 4, 6)
    with pytest.raises(ValueError, match="^WanPipeline: a video of 8 frames"):  # that came from no folder
        latent_shape(decoder, 8, 32, 48)
    assert decoder.decode_latents(latents).shape == VIDEO.shape
    assert decoder.generate(F_FUSE[:2], EMPTY, SIZE, generators(0, 1), 2).shape == VIDEO.shape


def test_text_tokens_are_the_pipelines_prompt_embeds(folder, family, plain):
    decoder, captions = load(folder, transformer=False, text_encoder=True), ["a red circle grows", "", "blue"]
    tokens = decoder.encode_text(captions)
    lengths = [5, 1, 2] if family == "wan" else [L] * 3  # words and </s>; CogVideoX's padding has values
    assert [(e.shape, e.dtype) for e in tokens] == [((n, D_TXT), torch.float32) for n in lengths]
    expected, _ = plain.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=L)
    padded = torch.stack([pad(e, (0, 0, 0, L - len(e))) for e in tokens])
    torch.testing.assert_close(padded, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(padded == 0, expected == 0)
    assert decoder.encode_text(["red " * 40])[0].shape == (L, D_TXT)  # a long caption is cut


def test_sizes_of_latents_or_the_reason_why_a_size_does_not_fit(folder, family):
    decoder = load(folder, transformer=False, vae=True)
    assert latent_shape(decoder, *SIZE) == LATENT and latent_shape(decoder, 17, 32, 64) == (4, 5, 4, 8)
    sizes = [(8, 32, 48), (9, 40, 48), (9, 32, 40), (11, 32, 48)]
    cases = [(size, (1, 2, 2), f"{folder}: a video of {size[0]} frames") for size in sizes]
    if family == "wan":  # its VAE takes 4k+1 frames, CogVideoX's 8k+1
        assert latent_shape(decoder, 13, 32, 48) == (4, 4, 4, 6)
        cases.append(((9, 48, 32), (1, 2, 3), "a multiple of 16 and a width of 24"))
        cases.append((SIZE, (2, 2, 3), r"a multiple of 2 latent frames \(now 3\)"))
    else:
        cases.append(((13, 32, 48), 2, "13 frames, 32x48, does not fit: wanted 8k"))
    for size, patch, wanted in cases:
        decoder.config = decoder.config | ({"patch_size": patch} if family == "wan" else {})
        with pytest.raises(ValueError, match=wanted):
            latent_shape(decoder, *size)


@pytest.mark.parametrize("latents, empty", [
    (LATENT, (L, 8)), (LATENT, (9, D_TXT)), ((3, 3, 4, 6), (L, D_TXT)), ((4, 3, 5, 6), (L, D_TXT)),
    ((4, 3, 4, 5), (L, D_TXT)),
])  # fmt: skip
def test_what_was_prepared_for_another_decoder_is_refused(folder, latents, empty):
    decoder = load(folder)
    pipelines.check_prepared(decoder, LATENT, (L, D_TXT))
    reads = f"but {folder} reads 4 channels in patches of .*, {L} tokens of width {D_TXT}: prepare them"
    with pytest.raises(ValueError, match=reads):
        pipelines.check_prepared(decoder, latents, empty)


def test_saved_lora_loads_in_plain_diffusers_and_gives_the_same_videos(folder, plain, tmp_path):
    decoder = load(folder, vae=True)
    save_lora(decoder, tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [LORA_FILE]
    by_diffusers = VideoDecoder(plain, L, plain.transformer.config, lora_rank=0)
    videos = [by_diffusers.generate(F_FUSE[:1], EMPTY, SIZE, generators(0), steps=2)]
    plain.load_lora_weights(tmp_path / "lora")
    videos += [d.generate(F_FUSE[:1], EMPTY, SIZE, generators(0), steps=2) for d in (by_diffusers, decoder)]
    without, loaded, ours = (video.int() for video in videos)
    assert (loaded - ours).abs().max() <= 1  # its scale, 8/4, too
    assert (without - ours).abs().max() > 2


def test_lora_loads_back_and_another_models_is_refused(folder, tmp_path):
    decoder, fresh = load(folder), load(folder)
    away_from_zero(fresh, std=0.1)
    save_lora(decoder, tmp_path)
    parameters = list(fresh.parameters())
    assert not torch.allclose(fresh.diffusion_loss(*BATCH), decoder.diffusion_loss(*BATCH), rtol=1e-4)
    load_lora(fresh, tmp_path)
    torch.testing.assert_close(fresh.diffusion_loss(*BATCH), decoder.diffusion_loss(*BATCH))
    assert all(a is b for a, b in zip(fresh.parameters(), parameters, strict=True))  # an optimiser has them
    for rank, alpha in ((8, 8), (4, 4)):
        wanted = f"found .*rank 4, alpha 8, wanted the .*rank {rank}, alpha {alpha} of {folder}"
        with pytest.raises(ValueError, match=f"{LORA_FILE}: {wanted}"):
            load_lora(load(folder, rank, alpha), tmp_path)


def test_fp16_weights_alone_are_found_and_a_cache_is_read_offline_in_silence(tmp_path):
    cache = tmp_path / "hub" / "models--a--wan"
    folder = cache / "snapshots" / ("f" * 40)
    wan_pipeline().save_pretrained(folder, variant="fp16")
    pipe, *_ = load_pipeline(str(folder), transformer=True, vae=True, text_encoder=True)
    assert all(part is not None for part in (pipe.transformer, pipe.vae, pipe.text_encoder))
    plain = wan_pipeline()
    plain.save_pretrained(folder)  # beside them: now these are read
    pipe, *_ = load_pipeline(str(folder), transformer=True)
    assert torch.equal(pipe.transformer.patch_embedding.weight, plain.transformer.patch_embedding.weight)
    write_text(cache / "refs" / "v1", folder.name)
    code = "from support import pipelines as p, runs; runs.quiet(); p.load_pipeline('a/wan@v1', vae=True)"
    offline = environment() | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True)
    assert done.returncode == 0 and "the Hub" not in done.stderr, done.stderr
