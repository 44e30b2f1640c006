"""Names of public float checkpoints, translated to ours (which are torchvision's)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PREFIX = "module."
"""Left by nn.DataParallel."""
RENAMED = {"linear.": "fc.", ".shortcut.": ".downsample."}
"""What CIFAR repositories call the classifier and the shortcuts of a ResNet."""


def translate(net: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of `net`; values and shapes are left alone.

    A name is only changed when the network does not know it, and the new one it does.
    `num_batches_tracked`, which many files leave out and nothing here reads, is added as 0.
    """
    expected = net.state_dict()
    result = {}
    for name, tensor in tensors.items():
        new = name
        if name not in expected:
            new = name.removeprefix(PREFIX)
            for theirs, ours in RENAMED.items():
                new = new if new in expected else new.replace(theirs, ours)
        result[new if new in expected else name] = tensor
    for name in expected.keys() - result.keys():
        if name.endswith(".num_batches_tracked"):
            result[name] = torch.zeros_like(expected[name])
    return result
