"""APGD, AutoAttack and Square from the Adversarial Robustness Toolbox (ART).

ART moves float pixels and draws from numpy's global generator: the radius is rounded down to
whole pixel steps, images are rounded to them afterwards, and the generator is seeded for the
call and put back.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import ChainMap, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resq_deploy import evaluate, seeds
from resq_deploy.attack.base import Attack, Budget, Images, Labels, Target
from resq_deploy.data.base import as_float
from resq_deploy.errors import MissingExtra
from resq_deploy.nets.quantized import value

try:
    from art.attacks.evasion import AutoProjectedGradientDescent, SquareAttack
    from art.estimators.classification import PyTorchClassifier
    from art.estimators.classification.blackbox import BlackBoxClassifierNeuralNetwork
except ModuleNotFoundError:
    raise MissingExtra("art", "attack") from None

PIXELS = (0.0, 1.0)
MORE_STEPS = 5
"""Steps of APGD for each of PGD: 100 for 20, as in the paper."""


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    before = np.random.get_state()  # noqa: NPY002 (ART draws from it)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


def _pixels(x: NDArray[np.floating[Any]]) -> Images:
    pixels: Images = np.clip(np.rint(x * 255), 0, 255).astype(np.uint8)
    return pixels


class _Again(torch.autograd.Function):
    """A run that was made before, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: tuple[Tensor, Tensor]) -> Tensor:
        ctx.run = run
        return run[1].detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, logits = ctx.run
        return torch.autograd.grad(logits, x, gradient, retain_graph=True)[0], None


class _Logits(nn.Module):
    """The twin with logits that never tie.

    The difference-of-logits ratio divides by the lead of the first over the third class, and
    quantized logits tie. In double precision the offsets are far below a quantization step; of
    equal logits the first stays the largest.

    ART's APGD asks for the loss of a batch, and in the next step for the gradient at the same one:
    that run is kept.
    """

    def __init__(self, net: nn.Module, n_classes: int) -> None:
        super().__init__()
        self.net = net
        self.offsets = torch.linspace(1e-6, 0, n_classes, dtype=torch.float64)
        self.last: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._run(x)
        if self.last is None or not torch.equal(self.last[0], x):
            self.last = None  # frees its memory first
            at = x.detach().requires_grad_()
            self.last = at, self._run(at)
        return cast(Tensor, _Again.apply(x, self.last))

    def _run(self, x: Tensor) -> Tensor:
        return value(self.net(x)).double() + self.offsets


class _Scores:
    """The file's scores of float images; those that one of the last three calls had are known.

    ART's Square asks for the same image three times per query.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.calls: deque[dict[bytes, NDArray[Any]]] = deque(maxlen=3)

    def __call__(self, x: NDArray[np.floating[Any]]) -> NDArray[Any]:
        images = _pixels(x)
        keys = [image.tobytes() for image in images]
        known = ChainMap(*self.calls)
        new = {key: i for i, key in enumerate(keys) if key not in known}
        if new:
            found = self.target.scores(images[list(new.values())])
            known = known.new_child(dict(zip(new, found, strict=True)))
        self.calls.append({key: known[key] for key in keys})
        return np.stack([known[key] for key in keys])


class _Toolbox(Attack):
    """Builds ART's attack for a radius and runs it batch by batch."""

    @abstractmethod
    def make(self, target: Target, shape: tuple[int, ...], epsilon: float) -> Any:
        """ART's attack on images of `shape` (C, H, W); epsilon is a whole number of pixel steps."""

    def find(self, target: Target, x: Images, y: Labels, *, epsilon: float, seed: int) -> Images:
        attack = self.make(target, x.shape[1:], int(epsilon * 255 + 1e-6) / 255)
        result = x.copy()
        stream = ("attack", type(self).__name__, round(epsilon * 1e9))
        with evaluate.frozen(target.net):
            for part in self.parts(len(x), epsilon):
                with _seeded(seeds.integer(seed, *stream, part.start)):
                    found = attack.generate(as_float(x[part]), y[part])
                result[part] = _pixels(found)
        return result


class _APGD(_Toolbox):
    """Auto-PGD of Croce and Hein (arXiv 2003.01690); the step halves where the loss stalls."""

    loss: str

    def settings(self) -> dict[str, Any]:
        return {"steps": MORE_STEPS * self.budget.steps, "restarts": self.budget.restarts}

    def make(self, target: Target, shape: tuple[int, ...], epsilon: float) -> Any:
        twin = PyTorchClassifier(
            model=_Logits(target.net, target.n_classes),
            loss=nn.CrossEntropyLoss(),
            input_shape=shape,
            nb_classes=target.n_classes,
            clip_values=PIXELS,
            device_type="cpu",
        )
        return AutoProjectedGradientDescent(
            twin,
            eps=epsilon,
            eps_step=2 * epsilon,
            max_iter=MORE_STEPS * self.budget.steps,
            nb_random_init=self.budget.restarts,
            batch_size=evaluate.BATCH,
            loss_type=self.loss,
            verbose=False,
        )


class APGD(_APGD):
    """APGD on the cross-entropy."""

    loss = "cross_entropy"

    @property
    def label(self) -> str:
        return f"APGD-{MORE_STEPS * self.budget.steps}"


class APGDDLR(_APGD):
    """APGD on the difference-of-logits ratio, which does not saturate with the confidence."""

    loss = "difference_logits_ratio"

    @property
    def label(self) -> str:
        return f"APGD-DLR-{MORE_STEPS * self.budget.steps}"


class Square(_Toolbox):
    """Random squares that lower the margin (arXiv 1912.00049), on the exported file alone."""

    white_box, black_box = False, True

    @property
    def label(self) -> str:
        return f"Square-{self.budget.queries}"

    def settings(self) -> dict[str, Any]:
        return {"queries": self.budget.queries}

    def make(self, target: Target, shape: tuple[int, ...], epsilon: float) -> Any:
        file = BlackBoxClassifierNeuralNetwork(
            _Scores(target),
            shape,
            target.n_classes,
            channels_first=True,
            clip_values=PIXELS,
        )
        return SquareAttack(
            file,
            eps=epsilon,
            max_iter=self.budget.queries,
            nb_restarts=1,
            batch_size=evaluate.BATCH,
            verbose=False,
        )


class AutoAttack(Attack):
    """The scheme of AutoAttack (arXiv 2003.01690) with what ART offers of it.

    APGD on the cross-entropy, APGD on the difference-of-logits ratio (untargeted) and Square, each
    on the images that the exported file still gets right. FAB and the targeted runs of the
    original are not part of it.
    """

    label, black_box = "AutoAttack", True

    def __init__(self, budget: Budget) -> None:
        super().__init__(budget)
        self._members = [member(budget) for member in (APGD, APGDDLR, Square)]

    def settings(self) -> dict[str, Any]:
        return {"members": {member.label: member.settings() for member in self._members}}

    def find(self, target: Target, x: Images, y: Labels, *, epsilon: float, seed: int) -> Images:
        result = x.copy()
        for member in self._members:
            left = np.flatnonzero(target.deployed(result, y))
            if left.size:
                result[left] = member(target, x[left], y[left], epsilon=epsilon, seed=seed)
        return result
