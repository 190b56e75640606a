"""DAT++ in PyTorch: stages of neighborhood and deformable blocks, with the parameter names of the published weights.

It is a peer for measurements, not a tool. Deformable attention samples features and position biases with ``grid_sample``, as the
published code does. Neighborhood attention, for which that code needs a CUDA extension, is written with dense products: tiles of
queries against the keys that all their windows need, as in this project.
"""

import itertools
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dat_jax.ops.attention.neighborhood_tiles import tile_line, tile_side


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x):
        """Normalize."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvMlp(nn.Module):
    """1 x 1 convolution, a depthwise one added, GELU, 1 x 1 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = 4 * channels
        self.linear1 = nn.Sequential(nn.Conv2d(channels, hidden, 1))
        self.dwc = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.linear2 = nn.Sequential(nn.Conv2d(hidden, channels, 1))

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.linear1(x)
        return self.linear2(F.gelu(x + self.dwc(x)))


class NeighborhoodAttention(nn.Module):
    """Each pixel attends to the K x K window around it. For maps of one size."""

    def __init__(self, channels: int, *, heads: int, kernel_size: int, map_size: int):
        super().__init__()
        self.heads, self.size = heads, map_size
        self.qkv = nn.Linear(channels, 3 * channels)
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.proj = nn.Linear(channels, channels)
        side = map_size if map_size <= 16 else tile_side(map_size)  # as this project
        first, index = tile_line(map_size, side, kernel_size)  # (T,), (T, side, halo), -1 outside the window
        self.count, self.tile, self.halo = index.shape
        rows, columns = index[:, None, :, None, :, None], index[None, :, None, :, None, :]
        inside = (rows >= 0) & (columns >= 0)  # (T, T, side, side, halo, halo)
        flat = np.where(inside, rows * (2 * kernel_size - 1) + columns, 0)
        pairs = (self.count**2, self.tile**2, self.halo**2)
        self.register_buffer("bias_index", torch.from_numpy(flat.reshape(pairs)), persistent=False)
        self.register_buffer("outside", torch.from_numpy(~inside.reshape(pairs)), persistent=False)
        lines = torch.from_numpy((first[:, None] + np.arange(self.halo)).reshape(-1))
        self.register_buffer("lines", lines, persistent=False)

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H, W)."""
        batch, channels, height, width = x.shape
        count, width_of_head = self.count, channels // self.heads
        qkv = self.qkv(x.permute(0, 2, 3, 1)).reshape(batch, height, width, 3, self.heads, width_of_head)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)  # (B, M, H, W, D)
        pad = count * self.tile - height
        q = F.pad(q, (0, 0, 0, pad, 0, pad)) if pad else q
        q = q.reshape(batch, self.heads, count, self.tile, count, self.tile, width_of_head)
        q = q.permute(0, 1, 2, 4, 3, 5, 6).reshape(batch, self.heads, count**2, self.tile**2, width_of_head)
        k, v = (self._gather_halo(part) for part in (k, v))
        bias = self.rpb.flatten(1)[:, self.bias_index].masked_fill(self.outside, float("-inf"))
        logits = (q * width_of_head**-0.5) @ k.transpose(-2, -1) + bias
        out = logits.softmax(-1) @ v
        out = out.reshape(batch, self.heads, count, count, self.tile, self.tile, width_of_head)
        out = out.permute(0, 2, 4, 3, 5, 1, 6).reshape(batch, count * self.tile, count * self.tile, channels)
        return self.proj(out[:, :height, :width]).permute(0, 3, 1, 2)

    def _gather_halo(self, x):
        batch, heads, _, _, width = x.shape
        count = self.count
        x = x.index_select(2, self.lines).index_select(3, self.lines)
        x = x.reshape(batch, heads, count, self.halo, count, self.halo, width).permute(0, 1, 2, 4, 3, 5, 6)
        return x.reshape(batch, heads, count**2, self.halo**2, width)


class DeformableAttention(nn.Module):
    """Each pixel attends to keys at learned positions. For maps of one size."""

    def __init__(self, channels: int, *, heads: int, groups: int, stride: int, kernel: int, map_size: int):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, map_size
        width = channels // groups
        self.conv_offset = nn.Sequential(
            nn.Conv2d(width, width, kernel, stride, kernel // 2 if kernel != stride else 0, groups=width),
            ChannelNorm(width),
            nn.GELU(),
            nn.Conv2d(width, 2, 1, bias=False),
        )
        self.proj_q, self.proj_k, self.proj_v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))
        self.rpe_table = nn.Parameter(torch.zeros(heads, 2 * map_size - 1, 2 * map_size - 1))
        line = torch.linspace(-1, 1, map_size)
        queries = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(1, -1, 1, 2)
        self.register_buffer("queries", queries, persistent=False)

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H, W)."""
        batch, channels, height, width = x.shape
        q = self.proj_q(x)
        grouped = q.reshape(batch * self.groups, channels // self.groups, height, width)
        offset = self.conv_offset(grouped).permute(0, 2, 3, 1)  # (B G, Hk, Wk, 2)
        rows, columns = offset.shape[1:3]
        lines = ((torch.arange(n, dtype=x.dtype) + 0.5) / (n - 1) * 2 - 1 for n in (rows, columns))
        reference = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)
        positions = (offset + reference).clamp(-1, 1)  # (y, x)
        sampled = F.grid_sample(
            x.reshape(batch * self.groups, channels // self.groups, height, width),
            positions.flip(-1),
            mode="bilinear",
            align_corners=True,
        ).reshape(batch, channels, 1, rows * columns)
        width_of_head = channels // self.heads
        q = q.reshape(batch * self.heads, width_of_head, -1)
        k, v = (p(sampled).reshape(batch * self.heads, width_of_head, -1) for p in (self.proj_k, self.proj_v))
        logits = q.transpose(1, 2) @ k * width_of_head**-0.5
        displacement = 0.5 * (self.queries - positions.reshape(batch * self.groups, 1, rows * columns, 2))
        side = 2 * self.size - 1
        table = self.rpe_table.reshape(1, self.groups, self.heads // self.groups, side, side)
        table = table.expand(batch, -1, -1, -1, -1).reshape(batch * self.groups, -1, side, side)
        bias = F.grid_sample(table, displacement.flip(-1), mode="bilinear", align_corners=True)
        weights = (logits + bias.reshape(logits.shape)).softmax(-1)
        out = v @ weights.transpose(1, 2)
        return self.proj_out(out.reshape(batch, channels, height, width))


class Stage(nn.Module):
    """Blocks of a local perception unit, attention and MLP."""

    def __init__(self, channels: int, attentions: list[nn.Module], drop_paths: list[float]):
        super().__init__()
        count = len(attentions)
        self.drop_paths = drop_paths
        self.layer_norms = nn.ModuleList(ChannelNorm(channels) for _ in range(2 * count))
        self.local_perception_units = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels) for _ in range(count)
        )
        self.attns = nn.ModuleList(attentions)
        self.mlps = nn.ModuleList(ConvMlp(channels) for _ in range(count))

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H, W)."""
        for index, rate in enumerate(self.drop_paths):
            x = x + self.local_perception_units[index](x)
            x = x + self._drop(self.attns[index](self.layer_norms[2 * index](x)), rate)
            x = x + self._drop(self.mlps[index](self.layer_norms[2 * index + 1](x)), rate)
        return x

    def _drop(self, x, rate: float):
        if not self.training or not rate:
            return x
        keep = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype).bernoulli_(1 - rate)
        return x * keep / (1 - rate)


class DatPlusPlus(nn.Module):
    """A DAT++ classifier.

    Args:
      model: the flax model, whose attributes are used.
    """

    def __init__(self, model):
        super().__init__()
        dims, stem = model.dims, model.dim_stem
        self.patch_proj = nn.Sequential(
            nn.Conv2d(3, stem // 2, 3, 2, 1),
            ChannelNorm(stem // 2),
            nn.GELU(),
            nn.Conv2d(stem // 2, stem, 3, 2, 1),
            ChannelNorm(stem),
        )
        blocks = sum(map(len, model.stages))
        rates = iter(np.linspace(0, model.drop_path_rate, blocks).tolist())
        self.stages, self.down_projs = nn.ModuleList(), nn.ModuleList()
        for index, kinds in enumerate(model.stages):
            side = model.image_size // 2 ** (index + 2)
            attentions = [make_attention(model, index, kind, side) for kind in kinds]
            self.stages.append(Stage(dims[index], attentions, [next(rates) for _ in kinds]))
        for width, next_width in itertools.pairwise(dims):
            self.down_projs.append(
                nn.Sequential(nn.Conv2d(width, next_width, 3, 2, 1, bias=False), ChannelNorm(next_width))
            )
        self.cls_norm, self.cls_head = ChannelNorm(dims[-1]), nn.Linear(dims[-1], model.num_classes)

    def forward(self, x):
        """(B, 3, H, W), normalized -> logits."""
        x = self.patch_proj(x)
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index < len(self.down_projs):
                x = self.down_projs[index](x)
        return self.cls_head(self.cls_norm(x).mean((2, 3)))


def make_attention(model, index: int, kind: str, side: int) -> nn.Module:
    """The attention of a block, with the settings of a stage of the flax model.

    Args:
      model: the flax model.
      index: of the stage, from 0.
      kind: "N" or "D".
      side: of the square map.

    Raises:
      ValueError: the block has another type of attention.
    """
    channels, heads = model.dims[index], model.num_heads[index]
    if kind == "N":
        kernel_size = model.neighborhood_sizes[index]
        return NeighborhoodAttention(channels, heads=heads, kernel_size=kernel_size, map_size=side)
    if kind != "D" or not math.isclose(model.offset_range_factors[index], -1):
        raise ValueError(f"The peer has neighborhood and deformable blocks of DAT++ only, got {kind!r}.")
    return DeformableAttention(
        channels,
        heads=heads,
        groups=model.num_groups[index],
        stride=model.key_strides[index],
        kernel=model.offset_kernels[index],
        map_size=side,
    )
