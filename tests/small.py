"""Networks small enough that a test may train them."""

import math

import torch
from torch import nn

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class PointNet(nn.Module):
    """F(x, t) for points [B,inputs]: a small multilayer perceptron on x and on sinusoids of the time input."""

    def __init__(self, width=64, inputs=2):
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, 5) * math.pi / 2)
        self.layers = nn.Sequential(
            nn.Linear(inputs + 9, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x, t):
        u = t[:, None] / 1000
        angles = u * self.frequencies
        return self.layers(torch.cat([x, u, angles.sin(), angles.cos()], dim=1))
