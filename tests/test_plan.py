"""extras/plan.py: counts against truth at small size, stage 1 at the paper's within 1 %, what is printed."""

import re
from math import prod
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import evaluate
import train_stage1
import train_stage2
from brain_model import BrainModel
from extras import plan
from extras.counter import Count, aten, counting
from support.files import write_json
from support.options import settings_of

DATA, VIDEO = "--data cc2017", "--frames 9 --height 32 --width 32"
SIZES = {"volumes": 1, "voxels": 3000, "frames": 3, "embed_dim": 64, "classes": 4}
BRAIN = dict(voxels=3000, tokens=12, width=64, layers=2, attention_heads=4, embed_dim=64)
ATTENTION = {  # of the CPU, which FlopCounterMode does not count
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *qkv, **_: sdpa_flop_count(*qkv[:3]),
}


def stage2(root: Path, family: str, words: str = "") -> tuple[train_stage2.Config, evaluate.CineNeuron]:
    """A tiny stage 2: its options, and its model on "meta"."""
    tiny = f"{DATA} --batch_size 4 --decoder {root}/models/{family} --attention_heads 4 --lora_rank 2 {VIDEO} {words}"
    config = train_stage2.parse(tiny.split())
    return config, plan.fake_model(settings_of(config), BRAIN, SIZES, 48)


def test_memory_is_what_lives_at_once_in_blocks_of_512_bytes():
    with counting() as counter:
        x = torch.empty(100)  # 400 bytes
        y = torch.empty(2, 129)  # 1,032
        view = x.view(10, 10)
        assert (counter.now, counter.peak) == (512 + 1536, 512 + 1536)
        del y
        z = view @ view
        assert (counter.now, counter.peak, counter.flop) == (1024, 2048, 2 * 10**3) and z.shape == (10, 10)


def test_stage_1_at_the_papers_size_is_what_a_pencil_counts(tmp_path, monkeypatch, capsys):
    """It needs no data and writes nothing."""
    N, L, S, W = plan.PUBLISHED["cc2017"]["voxels"], 512, 513, 2048
    matrices = 12 + 8 + 24  # x S W^2: forward, recomputed but for the last matrix of each block, backward
    attention = (1 + 1 + 2.5) * 2  # x S^2 W; its backward pass computes the logits once more
    blocks = 24 * (matrices * S * W**2 + attention * S**2 * W)  # multiply-adds of a clip
    ends = 2 * N * L * 4 + 3 * L * 4 * W + 3 * W * 768  # no gradient of the voxels
    flop = 2 * 144 * (blocks + ends) / 10**12
    monkeypatch.chdir(tmp_path)
    plan.main(f"stage1 {DATA} --card H100".split())
    text = capsys.readouterr().out
    numbers = []
    for unit in ("GiB", "TFLOP", "s at 45% of 989"):
        numbers.append(float(re.search(f"([0-9.,]+) {unit}", text)[1].replace(",", "")))
    assert numbers == pytest.approx((34.2, flop, flop / 989 / 0.45), rel=0.01)
    assert "3.4 hours" in text and "fits in 80.0" in text and not list(tmp_path.iterdir())


def test_a_step_by_the_byte_and_a_process_has_its_share_of_it(tiny):
    """4 bytes a parameter of Brain Model, memories and LoRA, and two moments of 4 bytes."""

    def count(words: str = "", processes: int = 1) -> Count:
        config, model = stage2(tiny, "wan", words)
        return plan.count_stage2(model, config, SIZES, processes)

    _, model = stage2(tiny, "wan")
    lora = 2 * 2 * 8 * (24 + 24)  # two blocks' self- and cross-attention, four matrices each
    parameters = [*model.brain_model.parameters(), *model.mom.parameters()]
    trained = 4 * (sum(p.numel() for p in parameters) + lora)
    whole, half = count(), count(processes=2)
    assert whole.trained == trained and whole.state == 3 * trained
    # weights, moments, and at the end of a step gradients, take place at once
    assert whole.peak > 4 * trained + sum(p.nbytes for p in model.decoder.parameters())
    assert half.flop == pytest.approx(whole.flop / 2, rel=0.01) and half.peak < whole.peak
    assert count("--no-checkpointing").flop < 0.95 * whole.flop
    small = f"{DATA} --tokens 63 --width 256 --layers 3 --attention_heads 4 --batch_size".split()
    alone = plan.count_stage1(train_stage1.parse([*small, "6"]), SIZES)
    assert plan.count_stage1(train_stage1.parse([*small, "18"]), SIZES, processes=3) == alone


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_an_evaluation_takes_what_reconstructing_takes(family, tiny):
    settings, model = stage2(tiny, family)
    words = f"{DATA} --batch_size 2 --steps 3 --guidance 5".split()
    need = plan.count_evaluation(model, evaluate.parse(words, ""), SIZES)
    real = plan.fake_model(settings_of(settings), BRAIN, SIZES, 48)
    for module in (real, real.decoder.pipe.vae):
        module.to_empty(device="cpu")
        for x in (*module.parameters(), *module.buffers()):
            x.data.zero_()
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        real.reconstruct(torch.randn(2, 1, 3000), steps=3, guidance=5)
    assert 2 * need.flop == pytest.approx(counter.get_total_flops(), rel=0.001)


COG = {  # CogVideoX-2b: the other numbers are diffusers' defaults
    "transformer": {"_class_name": "CogVideoXTransformer3DModel", "max_text_seq_length": 226},
    "vae": {"_class_name": "AutoencoderKLCogVideoX"},
    "scheduler": {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"},
}


@pytest.mark.parametrize("kind, configs, of_dit", [
    ("WanPipeline", plan.WAN_1_3B, {"num_attention_heads": 40, "ffn_dim": 13824}),  # Wan2.1-14B
    ("CogVideoXPipeline", COG, {}),
])  # fmt: skip
def test_the_decoders_of_the_docs_are_trained_and_sampled(kind, configs, of_dit, tmp_path, monkeypatch):
    """At its true width, in two blocks; the Brain Model has the decoder's text length. Attention is not in `work`."""
    monkeypatch.chdir(tmp_path)
    write_json(Path("dit", "model_index.json"), {"_class_name": kind})
    for part, config in configs.items():
        of_part = of_dit | {"num_layers": 2} if part == "transformer" else {}
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        write_json(Path("dit", part, name), config | of_part)
    config = train_stage2.parse(f"{DATA} --decoder dit --frames 9 --height 96 --width 96".split())
    brain, sizes = plan.stage1_of(config)
    model = plan.fake_model(settings_of(config), brain | {"layers": 1}, sizes, 4320)
    assert len(model.empty) == (226 if configs is COG else 512)
    dit, tokens = model.decoder.transformer, prod(plan.latent_shape(model.decoder, *model.size)[1:]) // 4
    weights = sum(p.nbytes for p in dit.parameters())
    work = 2 * tokens * sum(p.numel() for name, p in dit.named_parameters() if ".ff" in name)
    trained = plan.count_stage2(model, config, sizes)
    scored = plan.count_evaluation(model, evaluate.parse(DATA.split(), ""), sizes)
    assert trained.flop > 32 * 3 * work and scored.flop > 100 * work
    assert all(weights < need.peak < 2 * weights + 20 * plan.GIB for need in (trained, scored))


def test_a_run_is_planned_from_data_to_videos(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/cc2017/sub1/full-s0")
    words = f"{DATA} --decoder {tiny}/models/wan --attention_heads 4 --epochs 2 {VIDEO}".split()
    stage1_config = {"rois": None, "tau": 0.07, "lambda_1": 1.0, "lambda_2": 1.0}
    settings = settings_of(train_stage2.parse(words)) | {"sizes": SIZES, "stage1_config": stage1_config}
    for stage, config in (("stage1", {"sizes": SIZES}), ("stage2", settings)):
        BrainModel(**BRAIN).save_pretrained(run / stage / "brain_model")
        write_json(run / stage / "config.json", config)
    trained = plan.plan_stage2(words, 1)
    scored = plan.plan_evaluation(f"{DATA} --clips 60".split(), 4)
    assert (trained.number, scored.number) == (2 * (4320 // 32), 60 // 4)
    prepared = plan.plan_preparation(f"cc2017 --raw . --decoder {tiny}/models/wan {VIDEO}".split(), 1)
    assert prepared.disk["of latents, fp16"] == 2 * 5520 * 4 * 3 * 4 * 4
    assert [*scored.disk.values()] == [2 * 60 * 9 * 32 * 32]
