"""Brain Model (§3.1): fMRI of a clip -> global token f_c and fMRI embedding f_e.

    x (B, T, N) ──► voxel regression ──► L tokens of width D' ──► Transformer ──► f_c (B, D)
                                         and one global token                └──► f_e (B, L, D')

The paper's x (B, N) is T = 1 volume of N voxels. Why two outputs? f_c is one summary, which stage 1 aligns
with CLIP and ViCLIP (heads.py). f_e keeps the finer context, which the Mixture-of-Memories and the video
decoder read. At the paper's size (L = 512 tokens and the global one, 24 layers of width 2048) the model has
1.24 billion parameters."""

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint


class VoxelRegression(nn.Module):
    """The "first regression layer": N voxels -> L tokens of width D'. Fig. 5 draws its weights by voxel.

    A choice: the voxel axis is contracted first, then each token is lifted to D'. The usual order lifts every
    voxel to D' before it contracts: N·D' + N·L·D' multiply-adds per volume, here N·L·r + L·r·D'. With r = 1
    both are the same function.
    """

    def __init__(self, voxels: int, volumes: int, tokens: int, width: int, rank: int):
        super().__init__()
        self.rank = rank  # r
        self.contract = nn.Linear(voxels, tokens * rank)
        self.lift = nn.Linear(volumes * rank, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, N = x.shape  # clips, fMRI volumes, voxels
        h = self.contract(x)  # (B, T, L*r)
        h = h.view(B, T, -1, self.rank)  # (B, T, L, r)
        h = h.transpose(1, 2).flatten(2)  # (B, L, T*r)
        return self.lift(h)  # (B, L, D')


class Block(nn.Module):
    """One Transformer layer, pre-norm: h + attention(h), then h + MLP(h)."""

    def __init__(self, width: int, attention_heads: int):
        super().__init__()
        self.attention_heads = attention_heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width),
        )

    def forward(self, h: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(h))  # (B, L+1, 3*D')
        qkv = qkv.unflatten(2, (3, self.attention_heads, -1))  # (B, L+1, 3, heads, D'/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L+1, D'/heads) each
        a = scaled_dot_product_attention(q, k, v)  # (B, heads, L+1, D'/heads)
        h = h + self.out(a.transpose(1, 2).flatten(2))  # (B, L+1, D')
        return h + self.mlp(self.norm_mlp(h))  # (B, L+1, D')


class BrainModel(nn.Module, PyTorchModelHubMixin):
    r"""$f(x) = (f^c, f^e)$, §3.1. The defaults are the paper's sizes (§4.1) where it gives them.

    `save_pretrained(folder)` and `BrainModel.from_pretrained(folder)` keep and restore it with its sizes.
    """

    def __init__(
        self,
        voxels: int,  # N of the subject
        volumes: int = 1,  # T, fMRI volumes per clip (cc2017: 1, CineBrain: 5)
        tokens: int = 512,  # L, as many as the video decoder has text tokens
        width: int = 2048,  # D'
        layers: int = 24,
        attention_heads: int = 16,
        embed_dim: int = 768,  # D of CLIP and ViCLIP
        rank: int = 4,  # r, the numbers a token keeps of each volume
    ):
        super().__init__()
        self.voxels, self.volumes = voxels, volumes
        self.gradient_checkpointing = False  # True: backward computes the blocks again, in less memory
        self.regression = VoxelRegression(voxels, volumes, tokens, width, rank)
        self.global_token = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, tokens + 1, width))
        self.blocks = nn.ModuleList(Block(width, attention_heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.to_f_c = nn.Linear(width, embed_dim)
        self.initialise_weights()

    def initialise_weights(self) -> None:
        """Matrices, global token and positions N(0, 0.02), biases 0; what writes into the residual stream is
        scaled down by sqrt(2 * layers), as in GPT-2. Voxel regression and to_f_c keep unit variance: else the
        tokens of the fMRI start hardly larger than their positions.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:
            nn.init.normal_(block.out.weight, std=0.02 / (2 * len(self.blocks)) ** 0.5)
            nn.init.normal_(block.mlp[2].weight, std=0.02 / (2 * len(self.blocks)) ** 0.5)
        for layer in (self.regression.contract, self.regression.lift, self.to_f_c):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, N) z-scored fMRI -> f_c (B, D), f_e (B, L, D')."""
        B, T, N = x.shape  # clips, fMRI volumes, voxels
        assert (T, N) == (self.volumes, self.voxels), f"fMRI {T, N}, wanted {self.volumes, self.voxels}"
        h = self.regression(x)  # (B, L, D')
        h = torch.cat([self.global_token.expand(B, -1, -1), h], dim=1)  # (B, L+1, D')
        h = h + self.position  # (B, L+1, D')
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, use_reentrant=False)  # (B, L+1, D')
            else:
                h = block(h)  # (B, L+1, D')
        h = self.norm(h)  # (B, L+1, D')
        f_c = self.to_f_c(h[:, 0])  # (B, D)
        f_e = h[:, 1:]  # (B, L, D')
        return f_c, f_e
