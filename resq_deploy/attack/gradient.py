"""FGSM and PGD: signed gradients of the twin."""

from __future__ import annotations

from typing import Any

import torch

from resq_deploy import evaluate
from resq_deploy.attack.base import Attack, Images, Labels, Target
from resq_deploy.data.base import Dataset
from resq_deploy.perturb.inputs import fgsm, on_pixel_grid


class FGSM(Attack):
    """One signed-gradient step of length epsilon from the image itself."""

    label = "FGSM"

    def find(self, target: Target, x: Images, y: Labels, *, epsilon: float, seed: int) -> Images:
        result = x.copy()
        with evaluate.frozen(target.net):
            for part in self.parts(len(x), epsilon):
                clean = evaluate.tensor(x[part])
                moved = fgsm(target.net, clean, torch.from_numpy(y[part]), epsilon=epsilon)
                result[part] = on_pixel_grid(moved, clean, epsilon=epsilon).numpy()
        return result


class PGD(Attack):
    """Projected gradient descent; every restart attacks the images that withstood the others."""

    @property
    def label(self) -> str:
        return f"PGD-{self.budget.steps}"

    def settings(self) -> dict[str, Any]:
        return {"steps": self.budget.steps, "restarts": self.budget.restarts}

    def find(self, target: Target, x: Images, y: Labels, *, epsilon: float, seed: int) -> Images:
        return evaluate.adversarial(
            target.net,
            Dataset(name="attacked", x=x, y=y),
            epsilon=epsilon,
            steps=self.budget.steps,
            restarts=self.budget.restarts,
            seed=seed,
            what=f"{self.label} at {epsilon * 255:g}/255",
        )
