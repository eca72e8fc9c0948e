"""The video decoder (Eq. 9) on tiny randomly initialised pipelines of both families, against diffusers
itself."""

import json
import shutil
from collections import Counter
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from video_decoder import LORA_FILE, VideoDecoder, clip_generator, condition_dropout, draw

diffusers.utils.logging.set_verbosity_error()

B, L, WIDTH = 4, 12, 16  # clips, text tokens, their width
FRAMES, SIZE, LATENT = 9, 32, (4, 3, 4, 4)  # 9 frames of 32x32 -> C, f, h, w
CAPTIONS = ["a red circle grows", "", "blue"]
FAMILIES = ["wan", "cogvideox"]
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *"a red blue circle square grows moves".split()]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=L, **special)


def wan_pipeline(**vae) -> WanPipeline:
    """Tiny Wan2.1: VAE 8x in space and 4x in time, UniPC with the published settings."""
    text = {"vocab_size": 16, "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    moments = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 2.0, 1.0]}
    shape = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    dit = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "ffn_dim": 32,
    }
    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(**text)).eval(),
        vae=AutoencoderKLWan(**(shape | moments | vae)),
        transformer=WanTransformer3DModel(
            text_dim=WIDTH, freq_dim=32, num_layers=2, rope_max_seq_len=32, **dit
        ),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    )


def cogvideox_pipeline() -> CogVideoXPipeline:
    """Tiny CogVideoX 5B: rotary embeddings, v-prediction, zero terminal SNR."""
    text = {"vocab_size": 16, "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    channels = {
        "block_out_channels": (8, 8, 8, 8),
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
    }
    dit = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
    }
    size = {"sample_width": 4, "sample_height": 4, "sample_frames": 9, "max_text_seq_length": L}
    return CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=T5EncoderModel(T5Config(**text)).eval(),
        vae=AutoencoderKLCogVideoX(scaling_factor=0.7, **channels),
        transformer=CogVideoXTransformer3DModel(
            text_embed_dim=WIDTH, time_embed_dim=8, use_rotary_positional_embeddings=True, **dit, **size
        ),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
        ),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    torch.manual_seed(0)
    made = {"wan": wan_pipeline(), "cogvideox": cogvideox_pipeline()}
    root = tmp_path_factory.mktemp("pipelines")
    for family, pipe in made.items():
        for (
            parameter
        ) in pipe.transformer.parameters():  # the output layer starts at zero, where nothing can be seen
            parameter.data += 0.05 * torch.randn_like(parameter)
        pipe.save_pretrained(root / family)
    return {family: root / family for family in made}


def load(folder: Path, **options) -> VideoDecoder:
    """A decoder whose LoRA is not at its start, where lora_B is zero."""
    torch.manual_seed(1)
    decoder = VideoDecoder.from_pretrained(folder, **({"lora_rank": 4, "lora_alpha": 8} | options))
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return decoder


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def batch() -> tuple[torch.Tensor, ...]:
    """y, f_fuse, noise, u"""
    g = torch.Generator().manual_seed(2)
    noise, u, _ = draw(0, 3, range(B), LATENT)
    return torch.randn(B, *LATENT, generator=g), torch.randn(B, L, WIDTH, generator=g), noise, u


def lora_gradients(decoder: VideoDecoder) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


# -- loading -------------------------------------------------------------------------------------------------------


def test_training_loads_only_the_dit_and_its_scheduler(folders, family):
    decoder = load(folders[family])
    assert decoder.pipe.vae is None and decoder.pipe.text_encoder is None and decoder.pipe.tokenizer is None
    assert (decoder.text_length, decoder.text_width) == (L, WIDTH)
    preparation = load(folders[family], load_transformer=False, load_vae=True, load_text_encoder=True)
    assert preparation.transformer is None and (preparation.text_length, preparation.text_width) == (L, WIDTH)


def test_text_length_of_wan_is_512_unless_its_tokenizer_says_less(tmp_path):
    pipe = wan_pipeline()
    pipe.tokenizer.model_max_length = int(1e30)  # what tokenizers without a limit hold
    pipe.save_pretrained(tmp_path)
    assert VideoDecoder.from_pretrained(tmp_path).text_length == 512


def test_lora_is_on_every_attention_projection_and_all_else_is_frozen(folders, family):
    decoder = load(folders[family], dtype=torch.bfloat16)
    trained = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
    attentions = 2 * (
        2 if family == "wan" else 1
    )  # layers x (self- and cross-attention; CogVideoX's is joint)
    assert len(trained) == attentions * 4 * 2 and all("lora_" in name for name in trained)
    assert {name.split(".lora_")[0].split(".", 4)[-1] for name in trained} == {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    }
    assert (
        all(p.dtype == torch.float32 for p in trained.values())
        and decoder.transformer.dtype == torch.bfloat16
    )
    assert not any(p.requires_grad for p in load(folders[family], lora_rank=0).parameters())


def test_another_pipeline_is_refused(tmp_path):
    for index in (
        '{"_class_name": "MochiPipeline"}',
        '{"_class_name": "WanPipeline", "transformer_2": ["a", "b"]}',
    ):
        (tmp_path / "model_index.json").write_text(index)
        with pytest.raises(
            ValueError, match="wanted a whole WanPipeline with one transformer or CogVideoXPip"
        ):
            VideoDecoder.from_pretrained(tmp_path)


def spoil(file: Path, how: str) -> None:
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif how == "no JSON":
        file.write_text("{")
    elif how == "no object":
        file.write_text("[1]")
    elif how == "gone":
        file.unlink()
    elif how == "other library":
        index = json.loads(file.read_text())
        file.write_text(json.dumps(index | {"scheduler": ["os", "system"]}))
    else:  # the weights: NaN in one, or one missing
        weights = load_file(file)
        name = next(name for name in weights if weights[name].dim() > 1)
        weights |= {name: weights[name] * torch.nan}
        if how == "missing":
            del weights[name]
        save_file(weights, file, metadata={"format": "pt"})


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("model_index.json", "no JSON"),
        ("model_index.json", "no object"),
        ("model_index.json", "gone"),
        ("model_index.json", "other library"),
        ("transformer/config.json", "no JSON"),
        (WEIGHTS, "cut"),
        (WEIGHTS, "gone"),
        (WEIGHTS, "NaN"),
        (WEIGHTS, "missing"),
        ("tokenizer/tokenizer.json", "no JSON"),
        ("tokenizer/tokenizer_config.json", "no JSON"),
    ],
)
def test_a_damaged_pipeline_is_one_error_that_names_its_folder(folders, family, tmp_path, file, how):
    copy = tmp_path / "decoder"
    shutil.copytree(folders[family], copy)
    spoil(copy / file, how)
    with pytest.raises(
        ValueError, match=rf"{copy}: found .*, wanted a whole WanPipeline.*: download it again"
    ) as error:
        VideoDecoder.from_pretrained(copy, load_text_encoder=True)
    assert len(str(error.value).splitlines()) == 1


def test_weights_that_would_run_code_are_not_loaded(folders, tmp_path):
    copy = tmp_path / "decoder"
    shutil.copytree(folders["wan"], copy)
    torch.save(load_file(copy / WEIGHTS), copy / "transformer" / "diffusion_pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="wanted a whole WanPipeline"):
        VideoDecoder.from_pretrained(copy)


# -- Eq. 9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler, s, more", [("unipc", 3.0, 1.0), ("euler", 5.0, 1.0), ("unipc", 3.0, 5.0)]
)
def test_wan_loss_is_the_velocity_error_at_the_shifted_time(folders, batch, scheduler, s, more):
    decoder = load(folders["wan"])
    decoder.noise_shift = more  # shifts multiply
    if scheduler == "euler":
        decoder.scheduler = FlowMatchEulerDiscreteScheduler(shift=s)
    y, f_fuse, noise, u = batch
    expected, s = [], s * more
    for i in range(B):  # by hand, a clip at a time
        sigma = s * u[i].item() / (1 + (s - 1) * u[i].item())
        y_t = y[i] + sigma * (noise[i] - y[i])
        t = torch.tensor([1000 * sigma])
        velocity = decoder.transformer(y_t[None], timestep=t, encoder_hidden_states=f_fuse[i : i + 1]).sample[
            0
        ]
        expected.append(((velocity - (noise[i] - y[i])) ** 2).mean())
    torch.testing.assert_close(decoder(y, f_fuse, noise, u), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_shifted_times_are_those_the_sampler_visits(folders):
    decoder = load(folders["wan"])
    for scheduler in (decoder.scheduler, FlowMatchEulerDiscreteScheduler(shift=3.0)):
        scheduler.set_timesteps(10)
        visited = scheduler.sigmas[:-1]
        u = visited / (3 - 2 * visited)  # the inverse of σ = 3 u / (1 + 2 u)
        steps = u.diff()
        torch.testing.assert_close(steps, steps.mean().expand(9), rtol=0.02, atol=0)  # uniform in u


def test_cogvideox_loss_is_the_weighted_error_of_the_clean_latents(folders, batch):
    """The form of CogVideoX's own training, mean of (ŷ - y)² / (1 - ᾱ), equals the error of its
    v-prediction."""
    decoder = load(folders["cogvideox"])
    y, f_fuse, noise, u = batch
    full = CogVideoXPipeline.from_pretrained(folders["cogvideox"])
    rotary = full._prepare_rotary_positional_embeddings(SIZE, SIZE, LATENT[1], torch.device("cpu"))
    expected = []
    for i in range(B):
        t = int(1000 * u[i])
        a = full.scheduler.alphas_cumprod[t].float()
        y_t = a.sqrt() * y[i] + (1 - a).sqrt() * noise[i]
        inputs = {"encoder_hidden_states": f_fuse[i : i + 1], "image_rotary_emb": rotary}
        v = decoder.transformer(y_t.transpose(0, 1)[None], timestep=torch.tensor([t]), **inputs).sample[0]
        y_hat = a.sqrt() * y_t - (1 - a).sqrt() * v.transpose(0, 1)
        expected.append(((y_hat - y[i]) ** 2).mean() / (1 - a))
    torch.testing.assert_close(decoder(y, f_fuse, noise, u), torch.stack(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["velocity", "v_prediction", "epsilon", "sample"])
def test_a_perfect_prediction_costs_nothing(folders, batch, kind, monkeypatch):
    decoder = load(folders["wan" if kind == "velocity" else "cogvideox"])
    y, f_fuse, noise, u = batch
    if kind == "velocity":
        answer = noise - y
    else:
        decoder.scheduler.register_to_config(prediction_type=kind)
        a = decoder.scheduler.alphas_cumprod.float()[(1000 * u).long()][:, None, None, None, None]
        answer = {"epsilon": noise, "sample": y, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * y}[kind]
        answer = answer.transpose(1, 2).clone()  # as the DiT sees latents: (B, f, C, h, w)
    monkeypatch.setattr(decoder.transformer, "forward", lambda *args, **kwargs: (answer,))
    torch.testing.assert_close(decoder(y, f_fuse, noise, u), torch.zeros(B), rtol=0, atol=1e-10)
    answer[0] += 1  # and an error of one everywhere costs one
    torch.testing.assert_close(decoder(y, f_fuse, noise, u), torch.tensor([1.0, 0, 0, 0]), rtol=0, atol=1e-5)


def test_gradients_reach_lora_and_f_fuse_and_no_frozen_weight(folders, family, batch):
    decoder = load(folders[family])
    y, f_fuse, noise, u = batch
    f_fuse.requires_grad_()
    decoder(y, f_fuse, noise, u).mean().backward()
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


def test_recomputation_keeps_every_bit_and_runs_attention_once(folders, family, batch):
    gradients, ran = [], []
    for checkpointing in (False, True):
        decoder = load(folders[family], gradient_checkpointing=checkpointing)
        assert decoder.transformer.is_gradient_checkpointing == checkpointing
        with Counted() as counted:
            decoder(*batch).mean().backward()
        ran.append(
            {name: counted.times[getattr(torch.ops.aten, name).default] for name in ("gelu", ATTENTION)}
        )
        gradients.append(lora_gradients(decoder))
    plain, recomputed = ran
    assert recomputed[ATTENTION] == plain[ATTENTION] == (4 if family == "wan" else 2)  # of 2 blocks
    assert recomputed["gelu"] == plain["gelu"] + 2  # all else runs twice
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_bf16_dit_trains_a_float32_lora_and_generates(folders, family, batch):
    exact, decoder = load(folders[family]), load(folders[family], load_vae=True, dtype=torch.bfloat16)
    y, f_fuse, noise, u = batch
    f_fuse.requires_grad_()
    loss = decoder(y.half(), f_fuse, noise, u)
    loss.mean().backward()
    assert loss.dtype == f_fuse.grad.dtype == torch.float32 and f_fuse.grad.abs().sum() > 0
    torch.testing.assert_close(loss, exact(*batch), rtol=0.05, atol=0.05)
    video = decoder.generate(
        f_fuse.detach(), torch.zeros(L, WIDTH), FRAMES, SIZE, SIZE, [clip_generator(i) for i in range(B)], 2
    )
    assert video.shape == (B, FRAMES, SIZE, SIZE, 3)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(folders, family, parts):
    """The one-step form of the module's docstring, draws and condition dropout included."""
    decoder = load(folders[family])
    g = torch.Generator().manual_seed(5)
    y, raw = torch.randn(B, *LATENT, generator=g), torch.randn(B, L, WIDTH, generator=g).requires_grad_()
    empty, clips = torch.zeros(L, WIDTH), torch.tensor([7, 11, 2, 30])
    mom = torch.nn.Linear(WIDTH, WIDTH)  # stands for all that makes f_fuse

    noise, u, dropped = draw(0, 9, clips.tolist(), LATENT, dropout=0.3)
    assert dropped.any() and not dropped.all()
    decoder(y, condition_dropout(mom(raw), empty, dropped), noise, u).mean().backward()
    whole, whole_raw, whole_mom = lora_gradients(decoder), raw.grad.clone(), mom.weight.grad.clone()
    assert (whole_raw[dropped] == 0).all() and (whole_raw[~dropped] != 0).any()

    for module in (decoder, mom):
        module.zero_grad()
    raw.grad = None
    f_fuse = mom(raw)
    f = f_fuse.detach().requires_grad_()
    for part in torch.arange(B).chunk(parts):
        noise, u, dropped = draw(0, 9, clips[part].tolist(), LATENT, dropout=0.3)
        loss = decoder(y[part], condition_dropout(f[part], empty, dropped), noise, u)
        (loss.sum() / B).backward()
    f_fuse.backward(f.grad)
    torch.testing.assert_close(lora_gradients(decoder), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(raw.grad, whole_raw, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mom.weight.grad, whole_mom, rtol=1e-5, atol=1e-5)


def test_draws_belong_to_seed_step_and_clip():
    noise, u, dropped = draw(0, 1, [3, 4, 5], (2, 2))
    again = draw(0, 1, [5, 3], (2, 2))
    assert all(torch.equal(a, b[[2, 0]]) for a, b in zip(again, (noise, u, dropped), strict=True))
    for other in (draw(1, 1, [3, 4, 5], (2, 2)), draw(0, 2, [3, 4, 5], (2, 2))):
        assert not torch.isclose(other[0], noise).any() and not torch.isclose(other[1], u).any()
    _, u, dropped = draw(0, 0, range(4000), (1,))
    assert abs(dropped.float().mean() - 0.1) < 0.02
    assert abs(u.mean() - 0.5) < 0.02 and abs(u.std() - 12**-0.5) < 0.02
    assert abs(u[dropped].mean() - 0.5) < 0.06  # what is dropped does not follow the time
    assert clip_generator(1).initial_seed() != clip_generator(1, 0).initial_seed()


# -- generation ----------------------------------------------------------------------------------------------------


def test_generate_is_the_pipeline_with_the_same_prompt_embeds(folders, family):
    decoder = load(folders[family], lora_rank=0, load_vae=True)
    f_fuse, empty = torch.randn(2, L, WIDTH), torch.randn(L, WIDTH)
    plain = (WanPipeline if family == "wan" else CogVideoXPipeline).from_pretrained(folders[family])
    video = decoder.generate(
        f_fuse, empty, FRAMES, SIZE, SIZE, [clip_generator(0, i) for i in range(2)], 3, 4.0
    )
    expected = plain(
        prompt_embeds=f_fuse,
        negative_prompt_embeds=torch.stack([empty, empty]),
        num_frames=FRAMES,
        height=SIZE,
        width=SIZE,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=[clip_generator(0, i) for i in range(2)],
        output_type="np",
    ).frames
    assert video.dtype == torch.uint8 and video.shape == (2, FRAMES, SIZE, SIZE, 3)
    assert (video.numpy() - expected * 255).max() <= 0.5 and video.float().std() > 1
    other = decoder.generate(
        f_fuse.flip(0), empty, FRAMES, SIZE, SIZE, [clip_generator(0, i) for i in range(2)], 3
    )
    assert not torch.equal(other, video)  # the condition matters


def test_a_clip_does_not_depend_on_its_batch(folders, family):
    decoder = load(folders[family], load_vae=True)
    f_fuse, empty = torch.randn(3, L, WIDTH), torch.randn(L, WIDTH)
    size = (FRAMES, SIZE, SIZE)
    whole = decoder.generate(f_fuse, empty, *size, [clip_generator(0, i) for i in range(3)], steps=2)
    alone = decoder.generate(f_fuse[1:2], empty, *size, [clip_generator(0, 1)], steps=2)
    assert (whole[1].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(whole[0], whole[1])


# -- VAE and text encoder ------------------------------------------------------------------------------------------


def test_latents_are_the_normalised_mode_and_decode_as_the_pipeline_does(folders, family):
    decoder = load(folders[family], load_transformer=False, load_vae=True)
    video = torch.randint(0, 256, (2, FRAMES, SIZE, SIZE, 3), dtype=torch.uint8)
    latents = decoder.encode_latents(video)
    vae = decoder.pipe.vae
    with torch.no_grad():
        z = vae.encode(video.permute(0, 4, 1, 2, 3).float() / 255 * 2 - 1).latent_dist.mean
    if family == "wan":
        mean, std = (
            torch.tensor(vae.config[m])[None, :, None, None, None] for m in ("latents_mean", "latents_std")
        )
        torch.testing.assert_close(latents, (z - mean) / std, rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(latents, z * 0.7, rtol=1e-5, atol=1e-6)
    assert latents.shape == (2, *LATENT) and torch.equal(latents, decoder.encode_latents(video))

    with torch.no_grad():
        frames = decoder.pipe.video_processor.postprocess_video(vae.decode(z).sample, output_type="np")
    decoded = decoder.decode_latents(latents)
    assert (
        decoded.shape == video.shape
        and (decoded.float() - torch.from_numpy(frames) * 255).abs().max() <= 0.51
    )


def test_tiling_keeps_a_video_smaller_than_a_tile(folders, family):
    video = torch.randint(0, 256, (2, FRAMES, SIZE, SIZE, 3), dtype=torch.uint8)
    plain, tiled = (load(folders[family], load_vae=True, tiling=tiling) for tiling in (False, True))
    assert tiled.pipe.vae.use_tiling and tiled.pipe.vae.use_slicing
    torch.testing.assert_close(plain.encode_latents(video), tiled.encode_latents(video), rtol=1e-4, atol=1e-5)


def test_text_tokens_are_the_pipelines_prompt_embeds(folders, family):
    decoder = load(folders[family], load_transformer=False, load_text_encoder=True)
    tokens = decoder.encode_text(CAPTIONS)
    lengths = [5, 1, 2] if family == "wan" else [L] * 3  # words and </s>; CogVideoX's padding has values
    assert [e.shape for e in tokens] == [(n, WIDTH) for n in lengths]
    plain = (WanPipeline if family == "wan" else CogVideoXPipeline).from_pretrained(folders[family])
    expected, _ = plain.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=L)
    padded = torch.stack([torch.nn.functional.pad(e, (0, 0, 0, L - len(e))) for e in tokens])
    torch.testing.assert_close(padded, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(padded == 0, expected == 0)


def test_a_long_caption_is_cut_at_the_text_length(folders, family):
    decoder = load(folders[family], load_transformer=False, load_text_encoder=True)
    assert decoder.encode_text(["red " * 40])[0].shape == (L, WIDTH)


# -- LoRA files ----------------------------------------------------------------------------------------------------


def test_saved_lora_loads_in_plain_diffusers_and_gives_the_same_videos(folders, family, tmp_path):
    decoder = load(folders[family], load_vae=True)
    decoder.save_lora(tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [LORA_FILE]
    plain = (WanPipeline if family == "wan" else CogVideoXPipeline).from_pretrained(folders[family])
    f_fuse, empty = torch.randn(1, L, WIDTH), torch.randn(L, WIDTH)
    inputs = {"prompt_embeds": f_fuse, "negative_prompt_embeds": empty[None], "num_inference_steps": 2}
    inputs |= {
        "num_frames": FRAMES,
        "height": SIZE,
        "width": SIZE,
        "output_type": "np",
        "guidance_scale": 5.0,
    }
    without = torch.from_numpy(plain(**inputs, generator=clip_generator(0)).frames) * 255
    plain.load_lora_weights(tmp_path / "lora")
    loaded = torch.from_numpy(plain(**inputs, generator=clip_generator(0)).frames) * 255
    video = decoder.generate(f_fuse, empty, FRAMES, SIZE, SIZE, [clip_generator(0)], steps=2)
    assert (video - loaded).abs().max() <= 0.51  # its scale, 8/4, too
    assert (video - without).abs().max() > 2


def test_lora_loads_back_and_another_models_is_refused(folders, family, batch, tmp_path):
    decoder = load(folders[family])
    decoder.save_lora(tmp_path)
    fresh = VideoDecoder.from_pretrained(folders[family], lora_rank=4, lora_alpha=8)
    parameters = list(fresh.parameters())
    assert not torch.allclose(fresh(*batch), decoder(*batch), rtol=1e-4)
    fresh.load_lora(tmp_path)
    torch.testing.assert_close(fresh(*batch), decoder(*batch))
    assert all(
        a is b for a, b in zip(fresh.parameters(), parameters, strict=True)
    )  # an optimiser keeps hold of them
    for other in ((8, 8), (4, 4)):
        wanted = f"rank {other[0]}, alpha {other[1]} of .*{family}"
        with pytest.raises(ValueError, match=f"{LORA_FILE}: found .*rank 4, alpha 8, wanted the .*{wanted}"):
            VideoDecoder.from_pretrained(folders[family], *other).load_lora(tmp_path)


def without_half(weights: dict) -> dict:
    return {name: x for name, x in weights.items() if "blocks.0" not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_half, "matrices of rank 4"),
        (lambda weights: {name.replace("lora_A", "lora_C"): x for name, x in weights.items()}, "matrices of"),
        (lambda weights: {name: x * torch.nan for name, x in weights.items()}, "NaN or infinity in .*lora_"),
        (lambda weights: {name: x[:1] for name, x in weights.items()}, "matrices of"),
        (None, "object is not subscriptable"),
        ("cut", "."),
        ("gone", "No such file"),
    ],
)
def test_a_damaged_lora_is_one_error_and_changes_nothing(folders, family, tmp_path, change, message):
    decoder = load(folders[family])
    decoder.save_lora(tmp_path)
    file = tmp_path / LORA_FILE
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    if change in ("cut", "gone"):
        spoil(file, change)
    else:  # None: the same weights without metadata
        changed = weights if change is None else change(weights)
        save_file({name: x.contiguous() for name, x in changed.items()}, file, metadata if change else None)
    before = {name: p.clone() for name, p in decoder.named_parameters()}
    with pytest.raises(
        ValueError, match=f"{LORA_FILE}: found .*{message}.*, wanted the {len(weights)} matrices"
    ):
        decoder.load_lora(tmp_path)
    assert all(torch.equal(before[name], p) for name, p in decoder.named_parameters())


# -- what does not fit ---------------------------------------------------------------------------------------------


def test_a_condition_or_latents_of_another_decoder_are_refused(folders, family, batch):
    decoder = load(folders[family], load_vae=True)
    y, f_fuse, noise, u = batch
    with pytest.raises(ValueError, match=f"12 tokens of width 8, but .* reads {L} of width {WIDTH}.*data.py"):
        decoder(y, f_fuse[..., :8], noise, u)
    with pytest.raises(ValueError, match=f"9 tokens of width 16, but .* reads {L} of width {WIDTH}"):
        decoder(y, f_fuse[:, :9], noise, u)
    with pytest.raises(ValueError, match="empty has 11 tokens"):
        decoder.generate(f_fuse, torch.zeros(11, WIDTH), FRAMES, SIZE, SIZE, [clip_generator(0)] * B)
    with pytest.raises(ValueError, match="VAE is not loaded.*load_vae=True"):
        load(folders[family]).generate(
            f_fuse, torch.zeros(L, WIDTH), FRAMES, SIZE, SIZE, [clip_generator(0)] * B
        )
    with pytest.raises(ValueError, match="reads 4 channels"):
        decoder(y[:, :3], f_fuse, noise[:, :3], u)
    with pytest.raises(ValueError, match="in patches of"):
        decoder(y[..., :3], f_fuse, noise[..., :3], u)
    for size in ((FRAMES - 1, SIZE, SIZE), (FRAMES, SIZE + 8, SIZE), (FRAMES, SIZE, SIZE + 2)):
        with pytest.raises(ValueError, match="does not fit: wanted [48]k"):
            decoder.generate(f_fuse, torch.zeros(L, WIDTH), *size, [clip_generator(0)] * B)


def test_a_vae_of_other_factors_works_where_its_config_says_them():
    """2x in time, 8x in space of which 4x are patches, as the toy world's."""
    pixels = {"is_residual": True, "patch_size": 4, "in_channels": 48, "out_channels": 48}
    pipe = wan_pipeline(dim_mult=[1, 1], temperal_downsample=[True], scale_factor_temporal=2, **pixels)
    video = torch.randint(0, 256, (1, FRAMES, SIZE, SIZE, 3), dtype=torch.uint8)
    decoder = VideoDecoder(pipe, L)
    latents = decoder.encode_latents(video)
    assert latents.shape == (1, 4, 5, 4, 4) and decoder.decode_latents(latents).shape == video.shape
    f_fuse = torch.randn(1, L, WIDTH)
    assert (
        decoder.generate(f_fuse, f_fuse[0], FRAMES, SIZE, SIZE, [clip_generator(0)], 2).shape == video.shape
    )


def test_a_vae_that_compresses_otherwise_than_its_config_says_is_refused():
    pipe = wan_pipeline(scale_factor_temporal=2)  # it does 4
    with pytest.raises(ValueError, match="scale_factor_temporal"):
        VideoDecoder(pipe, L).encode_latents(torch.zeros(1, FRAMES, SIZE, SIZE, 3, dtype=torch.uint8))
