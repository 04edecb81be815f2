"""The student's U-Net: Ho et al.'s architecture, with the parameter names and outputs of diffusers' `UNet2DModel`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What this network fixes; a `UNet2DModel` configured otherwise is refused rather than silently misread.
_FIXED: dict[str, Any] = {
    "time_embedding_type": "positional",
    "act_fn": "silu",
    "resnet_time_scale_shift": "default",
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "center_input_sample": False,
    "add_attention": True,
    "attn_norm_num_groups": None,
    "class_embed_type": None,
    "time_embedding_dim": None,
}


_LABELS: ContextVar[Tensor | None] = ContextVar("labels", default=None)


@contextmanager
def given(labels: Tensor | None) -> Iterator[None]:
    """Inside, class-conditional networks take `labels` [B], one a row of their input; others ignore them. So a label reaches
    teacher, student and target alike, and f(x, t), the steps of an ODE and the objectives need not know of it."""
    before = _LABELS.set(labels)
    try:
        yield
    finally:
        _LABELS.reset(before)


def classes(net: object) -> int:
    """Number of classes of a class-conditional network, 0 for any other."""
    tables = (m for m in net.modules() if isinstance(m, nn.Embedding)) if isinstance(net, nn.Module) else iter(())
    return next((table.num_embeddings for table in tables), 0)


def balanced(net: object, index: Tensor) -> Any:
    """`given` to sample i the class i mod (number of classes), so that all come equally often."""
    return given(index % max(1, classes(net)))


def timestep_embedding(t: Tensor, dim: int, flip_sin_to_cos: bool = False, freq_shift: float = 1.0) -> Tensor:
    """[sin(t·ω_k), cos(t·ω_k)] with ω_k = 10000^{−k/(dim/2 − shift)} (DDPM; Vaswani et al. 2017): [B] -> [B,dim]."""
    half, t = dim // 2, t.to(torch.promote_types(t.dtype, torch.float32))
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=t.dtype, device=t.device) / (half - freq_shift))
    angles = t[:, None] * freqs[None]
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


class TimeEmbedding(nn.Module):
    """Two linear layers that turn the sinusoids into what every residual block receives."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, emb: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(emb)))


class ResnetBlock(nn.Module):
    """x + conv(drop(silu(norm(conv(silu(norm(x))) + W·silu(temb))))): one timestep-conditioned residual block."""

    def __init__(self, c_in: int, c_out: int, temb: int, groups: int, eps: float, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(temb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Attention(nn.Module):
    """Self-attention over the H·W positions, with a residual."""

    def __init__(self, channels: int, head_dim: int, groups: int, eps: float):
        super().__init__()
        self.heads = channels // head_dim
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [B,HW,C]
        q, k, v = (p(h).view(B, H * W, self.heads, -1).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v)  # [B,heads,HW,C/heads]
        h = self.to_out[0](h.transpose(1, 2).reshape(B, H * W, C))
        return x + h.transpose(1, 2).reshape(B, C, H, W)


class Downsample(nn.Module):
    """Halve height and width by a strided convolution; padding 0 pads right and below only, as DDPM's TF code did."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.pad_by_hand = padding == 0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad_by_hand else x)


class Upsample(nn.Module):
    """Double height and width by repeating pixels, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """One resolution: residual blocks, attention after each where asked, then a resampling where there is one."""

    def __init__(
        self,
        resnets: Sequence[nn.Module],
        attentions: Sequence[nn.Module],
        downsamplers: Sequence[nn.Module] = (),
        upsamplers: Sequence[nn.Module] = (),
    ):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList(downsamplers)
        self.upsamplers = nn.ModuleList(upsamplers)

    def layer(self, i: int, x: Tensor, temb: Tensor) -> Tensor:
        """Residual block i, then its attention."""
        x = self.resnets[i](x, temb)
        return self.attentions[i](x) if i < len(self.attentions) else x


def check_images(net: Any, x: Tensor) -> None:
    """Raises ValueError where `net` is a `UNet` and x no floating-point batch [B,C,H,W] that it takes."""
    if not isinstance(net, UNet):
        return
    wanted = [net.config["in_channels"], net.config["sample_size"], net.config["sample_size"]]
    if not x.is_floating_point() or list(x.shape[1:]) != wanted:
        raise ValueError(f"the network takes floats of shape [B, {str(wanted)[1:]}, got {x.dtype} {list(x.shape)}")


class UNet(nn.Module):
    """F(x, t): ε-prediction in a DDPM teacher, the raw network of a consistency function in a student.

    Arguments have the names, meanings and defaults of diffusers' `UNet2DModel`, and a state dict goes either way.
    `x` [B,C,H,W] with H and W divisible by 2^(levels−1); `t` [B] floats or integers. Returns [B,C_out,H,W].
    """

    def __init__(
        self,
        sample_size: int,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        layers_per_block: int = 2,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types: tuple[str, ...] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        downsample_padding: int = 1,
        freq_shift: float = 0,
        flip_sin_to_cos: bool = True,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if num_class_embeds is None:
            del self.config["num_class_embeds"]
        unknown = (set(down_block_types) | set(up_block_types)) - {
            "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D",
        }  # fmt: skip
        if unknown or not len(block_out_channels) == len(down_block_types) == len(up_block_types):
            raise ValueError(f"block types must be plain or Attn Down/UpBlock2D, one a level; got {sorted(unknown)}")
        widths, temb = list(block_out_channels), 4 * block_out_channels[0]

        def resnet(c_in: int, c_out: int) -> ResnetBlock:
            return ResnetBlock(c_in, c_out, temb, norm_num_groups, norm_eps, dropout)

        def attention(c: int) -> Attention:
            return Attention(c, attention_head_dim or c, norm_num_groups, norm_eps)

        self.time_embedding = TimeEmbedding(widths[0], temb)
        self.class_embedding = nn.Embedding(num_class_embeds, temb) if num_class_embeds else None
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # channels of every state the way up will see again
        for level, (c, kind) in enumerate(zip(widths, down_block_types, strict=True)):
            resnets = [resnet(skips[-1] if i == 0 else c, c) for i in range(layers_per_block)]
            attentions = [attention(c) for _ in resnets] if "Attn" in kind else []
            last = level == len(widths) - 1
            self.down_blocks.append(Block(resnets, attentions, [] if last else [Downsample(c, downsample_padding)]))
            skips += [c] * (layers_per_block + (not last))

        self.mid_block = Block([resnet(widths[-1], widths[-1]) for _ in range(2)], [attention(widths[-1])])

        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for level, (c, kind) in enumerate(zip(reversed(widths), up_block_types, strict=True)):
            resnets = [resnet((below if i == 0 else c) + skips.pop(), c) for i in range(layers_per_block + 1)]
            attentions = [attention(c) for _ in resnets] if "Attn" in kind else []
            last = level == len(widths) - 1
            self.up_blocks.append(Block(resnets, attentions, upsamplers=[] if last else [Upsample(c)]))
            below = c

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def time_features(self, t: Tensor) -> Tensor:
        """The embedding that every residual block receives: [B] -> [B, 4·width]."""
        c = self.config
        emb = timestep_embedding(t, c["block_out_channels"][0], c["flip_sin_to_cos"], c["freq_shift"])
        return self.time_embedding(emb.to(self.conv_in.weight.dtype))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb = self.time_features(t)
        if self.class_embedding is not None:
            labels = _LABELS.get()
            if labels is None or len(labels) != len(x):
                raise ValueError("a class-conditional network needs a label a row: call it inside `cmlib.unet.given(labels)`")
            temb = temb + self.class_embedding(labels.to(x.device))
        temb = F.silu(temb)
        h = self.conv_in(x)
        # oneDNN convolves fastest in channels-last memory, and every later state inherits it. torch.func.jvp cannot take it,
        # and a dropout mask is drawn in memory order, so both branches of a loss must agree on the layout.
        dropping = self.training and self.config["dropout"] > 0
        if h.device.type == "cpu" and not dropping and not torch._C._are_functorch_transforms_active():
            h = h.contiguous(memory_format=torch.channels_last)
        skips = [h]
        for block in cast("list[Block]", self.down_blocks):
            for i in range(len(block.resnets)):
                h = block.layer(i, h, temb)
                skips.append(h)
            for downsample in block.downsamplers:
                h = downsample(h)
                skips.append(h)

        h = self.mid_block.layer(0, h, temb)
        h = self.mid_block.resnets[1](h, temb)

        for block in cast("list[Block]", self.up_blocks):
            for i in range(len(block.resnets)):
                h = block.layer(i, torch.cat([h, skips.pop()], dim=1), temb)
            for upsample in block.upsamplers:
                h = upsample(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UNet:
        """Build from a `UNet2DModel` config; a setting this network does not have is refused by name."""
        for key, fixed in _FIXED.items():
            if key in config and config[key] != fixed:
                raise ValueError(f"UNet does not implement {key}={config[key]!r} (only {fixed!r})")
        names = cls.__init__.__code__.co_varnames[1 : cls.__init__.__code__.co_argcount]
        kwargs: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in names}
        return cls(**kwargs)

    @classmethod
    def from_diffusers(cls, model: Any) -> UNet:
        """A copy of a `UNet2DModel`, weights included."""
        unet = cls.from_config(model.config)
        unet.load_state_dict(model.state_dict())
        return unet.to(next(model.parameters()).device).train(model.training)

    def to_diffusers(self) -> Any:
        """A `UNet2DModel` with this configuration and these weights."""
        from diffusers import UNet2DModel

        model: Any = UNet2DModel(**self.config)
        model.load_state_dict(self.state_dict())
        return model.train(self.training)
