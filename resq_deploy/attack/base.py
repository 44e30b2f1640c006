"""The interface of an attack on the input, and what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from resq_deploy import evaluate, progress, runtime
from resq_deploy.metrics import top1

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is attacked."""

    net: nn.Module
    """The twin: the quantized network that the file was exported from. It has gradients."""
    scores: Callable[[Images], NDArray[Any]]
    """Images (N, C, H, W) to the exported file's output (N, n_classes)."""
    n_classes: int

    @classmethod
    def of(cls, net: nn.Module, model: bytes, x: Images) -> Target:
        """The twin and its file; InputError when the file does not take such images as `x`."""
        session = runtime.session(model, threads=0)

        def scores(images: Images) -> NDArray[Any]:
            return runtime.run(session, runtime.adapt(images, session))

        return cls(net=net.eval(), scores=scores, n_classes=scores(x[:1]).shape[1])

    def deployed(self, x: Images, y: Labels) -> NDArray[np.bool_]:
        """(N,) is the exported file's top-1 the label?"""
        return np.asarray(top1(self.scores(x)) == y)

    def twin(self, x: Images, y: Labels) -> NDArray[np.bool_]:
        """(N,) is the twin's top-1 the label?"""
        return np.asarray(evaluate.logits(self.net, x).argmax(1).numpy() == y)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an attack may spend on an image."""

    steps: int = 20
    """Gradient steps of PGD; APGD takes five times as many."""
    restarts: int = 1
    """Random starts of PGD and APGD."""
    queries: int = 1000
    """Iterations of Square."""


class Attack(ABC):
    """Looks for images near the given ones that are classified wrongly.

    Contract, tested for every attack: the images are uint8 and no pixel moves by more than
    floor(255 epsilon); the same arguments give the same images; epsilon = 0 gives the images back.
    """

    white_box: ClassVar[bool] = True
    """Uses gradients of the twin."""
    black_box: ClassVar[bool] = False
    """Searches by the outputs of the exported file."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    @property
    @abstractmethod
    def label(self) -> str:
        """What tables call it, with its budget: `PGD-20`."""

    def settings(self) -> dict[str, Any]:
        """What of the budget it uses, for the result."""
        return {}

    def __call__(
        self, target: Target, x: Images, y: Labels, *, epsilon: float, seed: int
    ) -> Images:
        """Attacked images of x (N, C, H, W) with labels y (N,); epsilon in pixels in [0, 1]."""
        radius = int(epsilon * 255 + 1e-6)
        if radius == 0:
            return x.copy()
        found = self.find(target, x, y, epsilon=epsilon, seed=seed)
        low, high = np.maximum(x, radius) - radius, np.minimum(x, 255 - radius) + radius
        return np.clip(found, low, high)

    @abstractmethod
    def find(self, target: Target, x: Images, y: Labels, *, epsilon: float, seed: int) -> Images:
        """The attack itself, at a radius of at least one pixel step."""

    def parts(self, n: int, epsilon: float) -> Iterator[slice]:
        """Batches of n images, with a progress bar."""
        with progress.bar(n, f"{self.label} at {epsilon * 255:g}/255") as bar:
            for start in range(0, n, evaluate.BATCH):
                stop = min(n, start + evaluate.BATCH)
                yield slice(start, stop)
                bar.update(stop - start)
