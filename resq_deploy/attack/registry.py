"""Attacks by name. A new one is a class with `find`, and one row here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resq_deploy.attack.base import Attack, Budget
from resq_deploy.attack.gradient import FGSM, PGD
from resq_deploy.errors import InputError


def _toolbox(name: str) -> Callable[[Budget], Attack]:
    def make(budget: Budget) -> Attack:
        from resq_deploy.attack import toolbox  # needs the extra [attack], and takes seconds

        found: Attack = getattr(toolbox, name)(budget)
        return found

    return make


ATTACKS: dict[str, Callable[[Budget], Attack]] = {
    "fgsm": FGSM,
    "pgd": PGD,
    "apgd": _toolbox("APGD"),
    "apgd-dlr": _toolbox("APGDDLR"),
    "autoattack": _toolbox("AutoAttack"),
    "square": _toolbox("Square"),
}


def make(names: Sequence[str], budget: Budget) -> dict[str, Attack]:
    """The attacks of these names; InputError for an unknown, repeated or missing one.

    Raises MissingExtra when one needs the toolbox and it is not installed.
    """
    unknown = [name for name in names if name not in ATTACKS]
    if unknown or not names or len(set(names)) < len(names):
        raise InputError(
            f"attacks {','.join(names)!r} given; expected different ones of {', '.join(ATTACKS)}"
        )
    return {name: ATTACKS[name](budget) for name in names}
