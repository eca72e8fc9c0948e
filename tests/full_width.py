"""The paper's width on a CPU, by hand: python tests/full_width.py [brain | wan]

brain   the Brain Model, 24 layers of width 2048 on 513 tokens, forward and backward at batch 2, in fp32 with
        blocks recomputed (12 GB of memory)
wan     one block of Wan2.1's 1.3B at the tokens of a video of 57 x 624 x 624 (15 x 39 x 39 = 22,815), forward
        and backward, in fp32 (8 GB)

Each in a process of its own. Prints seconds, the peak of resident memory, and whether all is finite; weights
are random.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


def brain() -> tuple[float, list[torch.Tensor]]:
    from brain_model import BrainModel
    from extras.plan import PUBLISHED

    model = BrainModel(PUBLISHED["cc2017"]["voxels"]).train()
    model.gradient_checkpointing = True
    x, start = torch.randn(2, 1, model.voxels), time.perf_counter()
    f_c, f_e = model(x)
    (f_c.square().mean() + f_e.square().mean()).backward()
    return time.perf_counter() - start, [f_c, f_e, *(p.grad for p in model.parameters())]


def wan() -> tuple[float, list[torch.Tensor]]:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

    from extras.plan import WAN_1_3B

    config = WAN_1_3B["transformer"]
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    width = heads * head
    block = WanTransformerBlock(
        width,
        config["ffn_dim"],
        heads,
        qk_norm=config["qk_norm"],
        cross_attn_norm=config["cross_attn_norm"],
        eps=config["eps"],
    )
    rotary = WanRotaryPosEmbed(head, tuple(config["patch_size"]), 1024)(torch.empty(1, 16, 15, 78, 78))
    h = torch.randn(1, 15 * 39 * 39, width, requires_grad=True)
    text, time_embedding = torch.randn(1, 512, width), torch.randn(1, 6, width)
    start = time.perf_counter()
    out = block(h, text, time_embedding, rotary)
    out.square().mean().backward()
    return time.perf_counter() - start, [out, h.grad, *(p.grad for p in block.parameters())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=["brain", "wan"])
    part = parser.parse_args().part
    if part is None:
        for name in ("brain", "wan"):
            subprocess.run([sys.executable, __file__, name], check=True)
    else:
        torch.manual_seed(0)
        seconds, tensors = brain() if part == "brain" else wan()
        finite = all(x.isfinite().all() for x in tensors)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        threads = torch.get_num_threads()
        print(f"{part}: {seconds:.1f} s on {threads} threads, {peak:.1f} GiB resident at most")
        print(f"{part}: {len(tensors)} tensors and gradients, {'all finite' if finite else 'NOT FINITE'}")
        sys.exit(not finite)
