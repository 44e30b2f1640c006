"""Checks against masked gradients: signs that an attack fails without the network being robust.

After Athalye et al. (arXiv 1802.00420) and Carlini et al. (arXiv 1902.06705): what is weaker by
construction must not break more images than what is stronger, and a radius that allows any image
must break them all. A comparison is paired over images; it is suspicious when the weaker attack
is significantly better (exact McNemar test).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy import metrics
from resq_deploy.attack.base import Attack, Images, Labels, Target
from resq_deploy.attack.gradient import PGD

Marks = NDArray[np.bool_]
"""(N,) is the exported file right on the attacked image?"""

IMAGES = 200
"""The checks look at so many images at most, the first ones."""
ALPHA = 0.01
"""Level of each comparison."""
MORE_STEPS, RESTARTS = 2.5, 5
LARGE = 0.5
"""A radius at which every image can become plain grey."""
LEFT = 0.01
"""Accuracy that may be left at LARGE, by the lower end of its interval."""


def compare(
    check: str, epsilon: float, weaker: tuple[str, Marks], stronger: tuple[str, Marks]
) -> dict[str, Any]:
    """One comparison: what the `weaker` attack (label, marks) breaks against the `stronger`."""
    (weak, left), (strong, right) = weaker, stronger
    only_weaker, only_stronger = int((right & ~left).sum()), int((left & ~right).sum())
    p_value = metrics.mcnemar(only_weaker, only_stronger)
    suspicious = only_weaker > only_stronger and p_value < ALPHA
    return {
        "check": check,
        "epsilon": epsilon,
        "weaker": {"attack": weak, "n_correct": int(left.sum())},
        "stronger": {"attack": strong, "n_correct": int(right.sum())},
        "n_total": len(left),
        "broken_by_weaker_only": only_weaker,
        "broken_by_stronger_only": only_stronger,
        "p_value": p_value,
        "verdict": "suspicious" if suspicious else "ok",
    }


def checks(
    target: Target,
    x: Images,
    y: Labels,
    attacks: Mapping[str, Attack],
    correct: Mapping[str, Mapping[float, Marks]],
    *,
    seed: int,
    confidence: float,
) -> list[dict[str, Any]]:
    """All checks that the attacks allow; `correct` has the marks of each by epsilon.

    Runs PGD again with more steps, with more restarts where APGD ran, and at a large radius.
    """
    x, y = x[:IMAGES], y[:IMAGES]
    budget = next(iter(attacks.values())).budget
    longer = PGD(replace(budget, steps=round(MORE_STEPS * budget.steps)))
    restarted = PGD(replace(budget, restarts=max(RESTARTS, budget.restarts)))

    def run(attack: Attack, epsilon: float) -> tuple[str, Marks]:
        return attack.label, target.deployed(attack(target, x, y, epsilon=epsilon, seed=seed), y)

    def ran(name: str, epsilon: float) -> tuple[str, Marks]:
        return attacks[name].label, correct[name][epsilon][:IMAGES]

    found = []
    for epsilon in next(iter(correct.values())):
        if "pgd" in attacks:
            found.append(compare("more steps", epsilon, ran("pgd", epsilon), run(longer, epsilon)))
            if "fgsm" in attacks:
                pair = ran("fgsm", epsilon), ran("pgd", epsilon)
                found.append(compare("one step", epsilon, *pair))
        if "apgd" in attacks:
            label, marks = run(restarted, epsilon)
            many = (f"{label}, {restarted.budget.restarts} restarts", marks)
            found.append(compare("random restarts", epsilon, many, ran("apgd", epsilon)))
        white = [name for name, attack in attacks.items() if not attack.black_box]
        for name, attack in attacks.items():
            if white and not attack.white_box:
                worst = np.logical_and.reduce([ran(w, epsilon)[1] for w in white])
                pair = ran(name, epsilon), ("white-box", worst)
                found.append(compare("black box", epsilon, *pair))
    label, marks = run(longer, LARGE)
    left = metrics.wilson(int(marks.sum()), len(marks), confidence)
    found.append(
        {
            "check": "large radius",
            "epsilon": LARGE,
            "stronger": {"attack": label, "n_correct": int(marks.sum())},
            "n_total": len(marks),
            "verdict": "suspicious" if left.low > LEFT else "ok",
        }
    )
    return found
