"""Gradient attacks on the input, in the L-infinity ball."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resq_deploy.nets.quantized import value


def fgsm(net: nn.Module, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
    """Images x + epsilon sign(gradient), in [0, 1] (Goodfellow et al., arXiv 1412.6572).

    x (N, C, H, W) in [0, 1]; the gradient of the cross-entropy passes the quantizers by
    straight-through.
    """
    at = x.detach().clone().requires_grad_(True)
    loss = F.cross_entropy(value(net(at)).float(), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, at)
    return (x + epsilon * gradient.sign()).clamp(0, 1)


def pgd(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int,
    step_size: float,
    generator: torch.Generator,
    early_stop: bool = False,
) -> Tensor:
    """Images x' with |x' - x| <= epsilon that raise the cross-entropy (Madry et al., 2018).

    x (N, C, H, W) in [0, 1]; y labels (N,), or probabilities (N, n_classes) without `early_stop`;
    random start; `steps` signed-gradient steps of step_size * epsilon / sqrt(steps). With
    `early_stop`, an image that is misclassified is left as it is, which saves most of the time
    on a network that is not robust.
    Gradients pass the quantizers by straight-through. `epsilon` = 0 returns x.
    """
    if epsilon == 0:
        return x
    noise = torch.rand(x.shape, generator=generator).to(x.device) * 2 - 1
    result = (x + epsilon * noise).clamp(0, 1)
    active = torch.arange(len(x), device=x.device)
    for step in range(steps + 1):
        at = result[active].detach().requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            logits = value(net(at)).float()
        if early_stop:
            keep = (logits.argmax(1) == y[active]).nonzero().flatten()
        else:
            keep = torch.arange(len(active), device=x.device)
        if step == steps or len(keep) == 0:
            break
        loss = F.cross_entropy(logits[keep], y[active][keep], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, at)
        active, clean = active[keep], x[active[keep]]
        moved = at[keep].detach() + step_size * epsilon / steps**0.5 * gradient[keep].sign()
        moved = torch.minimum(torch.maximum(moved, clean - epsilon), clean + epsilon)
        result[active] = moved.clamp(0, 1)
    return result.detach()


def on_pixel_grid(x_adv: Tensor, x: Tensor, *, epsilon: float) -> Tensor:
    """The attack as a camera would deliver it: uint8 pixels, still within epsilon of x.

    x holds uint8 pixels as floats (k / 255). Returns uint8 of the same shape.
    """
    radius = int(epsilon * 255 + 1e-6)
    pixels = torch.round(x * 255)
    moved = torch.round(x_adv * 255)
    moved = torch.minimum(torch.maximum(moved, pixels - radius), pixels + radius)
    return moved.clamp(0, 255).to(torch.uint8)
