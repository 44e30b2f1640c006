"""Swin-Tiny: Liu et al. (arXiv 2103.14030).

Parameter names follow torchvision's `swin_t` (`features.0.0`, `features.1.0.attn.qkv`,
`features.2.reduction`, `head`). Stochastic depth, which only regularises long training, is
left out.

Tokens stay in one layout, (N, tokens, channels); cyclic shift, window partition and patch
merging are orders of tokens, so that each is one gather.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn

from resq_deploy.nets.blocks import Add, Boundary, Foldable

DEPTHS, HEADS = (2, 2, 6, 2), (3, 6, 12, 24)


def window_order(side: int, window: int, shift: int) -> Tensor:
    """Row-major indices of side x side tokens in the order of windows: (side * side,).

    The grid is first rolled up and left by `shift`; windows and the tokens in them are in
    row-major order. `order.argsort()` undoes it.
    """
    grid = torch.arange(side * side).view(side, side).roll((-shift, -shift), (0, 1))
    n = side // window
    return grid.view(n, window, n, window).permute(0, 2, 1, 3).reshape(-1)


def forbidden(side: int, window: int, shift: int) -> Tensor:
    """Which pairs of tokens of a window were no neighbours before the shift: bool
    (windows, 1, tokens, tokens) for tokens of a window; they must not see each other."""
    band = torch.zeros(side, dtype=torch.long)
    band[side - shift :] = 1  # rolled in from the other end, all in the last window
    region = 2 * band[:, None] + band[None, :]
    n = side // window
    region = region.view(n, window, n, window).permute(0, 2, 1, 3).reshape(n * n, 1, window**2)
    return region[..., :, None] != region[..., None, :]


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for every pair of tokens of a window: (window ** 4,)."""
    y, x = torch.arange(window**2) // window, torch.arange(window**2) % window
    dy, dx = (a[:, None] - a[None, :] + window - 1 for a in (y, x))
    return (dy * (2 * window - 1) + dx).reshape(-1)


@torch.no_grad()
def _take_over(layer: nn.Linear, norm: nn.LayerNorm) -> tuple[nn.Linear, nn.LayerNorm]:
    """A linear layer with the gain and shift of the norm before it, and the norm without them.

    Two operators of the file less; normalised values of all channels are then alike, as the one
    scale of their quantizer wants them (gamma migration, Wei et al., arXiv 2209.13325).
    """
    if norm.weight is None:
        return layer, norm
    new = nn.Linear(layer.in_features, layer.out_features)
    new.weight.copy_(layer.weight * norm.weight)
    new.bias.copy_(layer.weight @ norm.bias)
    if layer.bias is not None:
        new.bias.add_(layer.bias)
    return new, nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)


class WindowAttention(Foldable):
    """Multi-head self-attention within windows of normalised tokens.

    (N * windows * window ** 2, c), ordered by windows -> the same shape.
    """

    relative_position_index: Tensor
    mask: Tensor | None

    def __init__(self, c: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.tokens, self.windows, self.heads = window**2, (side // window) ** 2, heads
        self.scale = (c // heads) ** -0.5
        self.tokens_in = Boundary("signed")
        self.qkv = nn.Linear(c, 3 * c)
        self.qkv_out = Boundary("signed", plain=True)
        self.scores = Boundary("signed", plain=True)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.add = Add(main_is_quantized=True, skip_is_quantized=False)
        self.biased = Boundary("signed", plain=True)
        self.register_buffer("mask", None, persistent=False)
        if shift:
            self.register_buffer("mask", forbidden(side, window, shift), persistent=False)
        self.softmax = nn.Softmax(dim=-1)
        self.attention = Boundary("probability", plain=True)
        self.mixed = Boundary("signed")
        self.proj = nn.Linear(c, c)
        self.out = Boundary("signed", plain=True)

    @torch.no_grad()
    def fold(self) -> None:
        """The scale of the scores goes into the weights, half to the queries, half to the keys."""
        c = self.proj.in_features
        for parameter in (self.qkv.weight, self.qkv.bias):
            parameter[: 2 * c] *= self.scale**0.5
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        c, t = self.proj.in_features, self.tokens
        x = self.qkv_out(self.qkv(self.tokens_in(x)))
        h = self.heads
        x = x.reshape(-1, self.windows, t, 3 * h, c // h).transpose(2, 3)
        q, k, v = x[:, :, :h], x[:, :, h : 2 * h], x[:, :, 2 * h :]  # (N, windows, h, t, c / h)
        if self.scale != 1:
            q = q * self.scale
        scores = self.scores(torch.matmul(q, k.transpose(-1, -2)))
        bias = self.relative_position_bias_table[self.relative_position_index]
        bias = bias.view(t, t, self.heads).permute(2, 0, 1)
        scores = self.biased(self.add(scores, bias))
        if self.mask is not None:
            scores = scores.masked_fill(self.mask, -torch.inf)
        x = torch.matmul(self.attention(self.softmax(scores)), v)
        x = self.mixed(x.transpose(2, 3).reshape(-1, c))
        return cast(Tensor, self.out(self.proj(x)))


class Block(Foldable):
    """Attention and a two-layer perceptron, each with a shortcut: (N, side * side, c), same out.

    As in the paper's own code, a window is never larger than the grid, and a grid of one window
    is not shifted.
    """

    order: Tensor
    inverse: Tensor

    def __init__(self, c: int, heads: int, side: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        window = min(window, side)
        shift = window // 2 if shifted and side > window else 0
        order = window_order(side, window, shift)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse", order.argsort(), persistent=False)
        self.norm1 = nn.LayerNorm(c)
        self.attn = WindowAttention(c, heads, side, window, shift)
        self.add1 = Add(main_is_quantized=True, skip_is_quantized=True)
        self.between = Boundary("signed", plain=True)
        self.norm2 = nn.LayerNorm(c)
        layers = {
            "in": Boundary("signed"), "0": nn.Linear(c, 4 * c), "1": nn.GELU(),
            "active": Boundary("signed"), "3": nn.Linear(4 * c, c),
            "out": Boundary("signed", plain=True),
        }  # fmt: skip
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.add2 = Add(main_is_quantized=True, skip_is_quantized=True)
        self.out = Boundary("signed", plain=True)

    def fold(self) -> None:
        self.attn.qkv, self.norm1 = _take_over(self.attn.qkv, self.norm1)
        first, self.norm2 = _take_over(cast(nn.Linear, self.mlp.get_submodule("0")), self.norm2)
        self.mlp.set_submodule("0", first)

    def forward(self, x: Tensor) -> Tensor:
        t, c = self.order.numel(), self.norm1.normalized_shape[0]
        y = self.attn(self.norm1(x.index_select(1, self.order).reshape(-1, c)))
        x = self.between(self.add1(y.reshape(-1, t, c).index_select(1, self.inverse), x))
        y = self.mlp(self.norm2(x.reshape(-1, c)))
        return cast(Tensor, self.out(self.add2(y.reshape(-1, t, c), x)))


class PatchMerging(Foldable):
    """Every 2x2 tokens become one: (N, side * side, c) -> (N, side * side / 4, 2 c)."""

    order: Tensor

    def __init__(self, c: int, side: int) -> None:
        super().__init__()
        grid = torch.arange(side * side).view(side // 2, 2, side // 2, 2)
        self.register_buffer("order", grid.permute(0, 2, 3, 1).reshape(-1), persistent=False)
        self.norm = nn.LayerNorm(4 * c)
        self.normalised = Boundary("signed")
        self.reduction = nn.Linear(4 * c, 2 * c, bias=False)
        self.out = Boundary("signed", plain=True)

    def fold(self) -> None:
        self.reduction, self.norm = _take_over(self.reduction, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        t, c = self.order.numel(), self.norm.normalized_shape[0]
        x = self.norm(x.index_select(1, self.order).reshape(-1, c))
        x = self.out(self.reduction(self.normalised(x)))
        return x.reshape(-1, t // 4, c // 2)


class Tokens(nn.Module):
    """(N, c, side, side) -> (N, tokens = side * side, c), row-major."""

    def __init__(self, c: int, tokens: int) -> None:
        super().__init__()
        self.c, self.tokens = c, tokens

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.c, self.tokens).transpose(1, 2)


class SwinTiny(Foldable):
    """Patch embedding, four stacks of 2, 2, 6, 2 blocks, patch merging between, classifier.

    Input (N, in_channels, image_size, image_size) pixels in [0, 1]; output (N, n_classes)
    logits. 224x224 images take patches of 4 and windows of 7, 32x32 images patches of 2 and
    windows of 4 (the CIFAR form in common use); `width` scales the 32 channels per head.
    """

    def __init__(
        self, *, n_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
    ) -> None:
        super().__init__()
        patch, window = (2, 4) if image_size == 32 else (4, 7)
        c, side = HEADS[0] * max(1, round(32 * width)), image_size // patch
        self.input = Boundary("unit")
        embedding = {
            "0": nn.Conv2d(in_channels, c, patch, stride=patch),
            "embedded": Boundary("signed", plain=True), "1": Tokens(c, side**2),
            "2": nn.LayerNorm(c), "out": Boundary("signed", plain=True),
        }  # fmt: skip
        stacks: list[nn.Module] = [nn.Sequential(OrderedDict(embedding))]
        for i, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
            if i:
                stacks.append(PatchMerging(c, side))
                c, side = 2 * c, side // 2
            blocks = (Block(c, heads, side, window, shifted=b % 2 == 1) for b in range(depth))
            stacks.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*stacks)
        self.norm = nn.LayerNorm(c)
        self.pooled = Boundary("signed")
        self.head = nn.Linear(c, n_classes)
        self.output = Boundary("signed", plain=True)

    def fold(self) -> None:
        self.head, self.norm = _take_over(self.head, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.features(self.input(x)))
        return cast(Tensor, self.output(self.head(self.pooled(x.mean(dim=1)))))
