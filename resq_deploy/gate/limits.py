"""The limits: one function each, which finds the measurements that the limit is about."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from resq_deploy import metrics, recipe
from resq_deploy.errors import InputError
from resq_deploy.gate.evidence import Evidence, Export
from resq_deploy.records import Interval

FEWEST_PATTERNS = 10
"""Below that the bootstrap interval over fault patterns is too narrow to decide anything."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One limit against one measurement."""

    name: str
    source: str
    """File that the measurement comes from."""
    found: Interval
    """What was measured; low = value = high where nothing is uncertain."""
    unit: str
    """Of `found` and `limit`: `rate` (in [0, 1]), `steps` or `bytes`."""
    limit: float
    at_least: bool
    """Is the limit a lower one?"""

    @property
    def passed(self) -> bool:
        """Does the whole interval keep the limit?"""
        found = self.found
        return found.low >= self.limit if self.at_least else found.high <= self.limit

    @property
    def needed(self) -> str:
        """`at least 85 %`."""
        return f"at {'least' if self.at_least else 'most'} {self._show(self.limit)}"

    @property
    def measured(self) -> str:
        """`88.31 % [88.22 %, 88.39 %]`; without the interval where there is none."""
        found = self.found
        if found.low == found.value == found.high:
            return self._show(found.value)
        low, high = self._show(found.low), self._show(found.high)
        return f"{self._show(found.value)} [{low}, {high}]"

    def _show(self, value: float) -> str:
        return f"{100 * value:.6g} %" if self.unit == "rate" else f"{value:g} {self.unit}"


def _found(checks: list[Check], otherwise: str) -> list[Check]:
    if not checks:
        raise InputError(otherwise)
    return checks


def _at_least(name: str, source: str, found: Interval, limit: float) -> Check:
    return Check(
        name=name, source=source, found=found, unit="rate", limit=limit, at_least=True
    )  # fmt: skip


def clean_accuracy(evidence: Evidence, minimum: float) -> list[Check]:
    """Accuracy without faults, on the largest number of images that was measured.

    Wilson interval over the images.
    """
    if not evidence.clean:
        raise InputError("--min-clean needs a campaign store, the JSON of `attack` or clean.json")
    name, count = max(evidence.clean.items(), key=lambda pair: pair[1].n_total)
    interval = metrics.wilson(count.n_correct, count.n_total, evidence.confidence)
    return [_at_least("clean accuracy", name, interval, minimum)]


def fault_accuracy(evidence: Evidence, minimum: float, rate: float) -> list[Check]:
    """Mean accuracy over fault patterns at a bit error rate, in every store that has it.

    Bootstrap interval over the patterns; the images are taken as they are.
    """
    checks, rates = [], set()
    for name, found in evidence.campaigns.items():
        for row in found["per_rate"]:
            rates.add(f"{row['rate']:g}")
            if not math.isclose(row["rate"], rate, rel_tol=1e-9):
                continue
            if row["n"] < FEWEST_PATTERNS:
                raise InputError(
                    f"{name} has {row['n']} patterns at the bit error rate {rate:g}; a gate needs "
                    f"{FEWEST_PATTERNS} or more: inject --draws 50"
                )
            interval = Interval(
                value=row["mean"], **{k: row[k] for k in ("low", "high", "confidence", "n")}
            )
            unusual = {found["fault"], found["protection"]["name"]} - {"ber", "none"}
            kind = f" ({', '.join(sorted(unusual))})" if unusual else ""
            checks.append(
                _at_least(f"fault accuracy at BER {rate:g}{kind}", name, interval, minimum)
            )
    there = f"there are: {', '.join(sorted(rates, key=float))}" if rates else "none has rates"
    return _found(
        checks,
        f"no store given has the bit error rate {rate:g} of --at-ber ({there}); measure it with "
        f"inject --rates {rate:g}",
    )


def sdc_rate(evidence: Evidence, maximum: float) -> list[Check]:
    """Share of single flips that change some top-1, in every store of single flips."""
    faults = [found["fault"] for found in evidence.campaigns.values()]
    return _found(
        [
            Check(
                name="SDC rate of single flips", source=name, found=Interval(**found["sdc_rate"]),
                unit="rate", limit=maximum, at_least=False,
            )
            for name, found in evidence.campaigns.items()
            if found["fault"] == "single"
        ],
        "--max-sdc needs a store of single flips (inject --margin or --trials); the stores given "
        f"hold: {', '.join(faults) or 'nothing'}",
    )  # fmt: skip


def adversarial_accuracy(evidence: Evidence, minimum: float, epsilon: float) -> list[Check]:
    """Accuracy of the file on adversarial images of radius `epsilon`, pixels in [0, 1].

    Wilson interval over the images.
    """
    checks, radii = [], set()
    for name, counts in evidence.attacks.items():
        for radius, count in counts.items():
            radii.add(f"{radius:g}")
            if math.isclose(radius, epsilon, rel_tol=1e-9):
                interval = metrics.wilson(count.n_correct, count.n_total, evidence.confidence)
                what = f"adversarial accuracy at epsilon {255 * epsilon:g}/255"
                checks.append(_at_least(what, name, interval, minimum))
    there = f"there are: {', '.join(sorted(radii, key=float))}" if radii else "no attack is given"
    return _found(
        checks, f"no JSON of `attack` given has the epsilon {epsilon:g} of --at-eps ({there})"
    )


def _exact(
    evidence: Evidence,
    option: str,
    name: str,
    unit: str,
    limit: float,
    value: Callable[[Export], int],
) -> list[Check]:
    """A figure of the manifest that is exact: its interval has no width."""
    checks = []
    for source, made in evidence.exports.items():
        found = Interval(
            value=value(made), low=value(made), high=value(made), confidence=1.0, n=made.n_images
        )
        checks.append(
            Check(name=name, source=source, found=found, unit=unit, limit=limit, at_least=False)
        )
    return _found(checks, f"{option} needs the manifest.json of an export")


def parity(evidence: Evidence, maximum: float) -> list[Check]:
    """Steps of the output quantizer by which any two executions of the network differ at most."""
    return _exact(
        evidence, "--max-parity-steps", "parity", "steps", maximum, lambda made: made.max_steps
    )


def weight_bytes(evidence: Evidence, maximum: float) -> list[Check]:
    """Bytes that the stored weights take."""
    return _exact(
        evidence, "--max-weight-bytes", "weights", "bytes", maximum, lambda made: made.weight_bytes
    )


LIMITS: dict[str, tuple[Callable[..., list[Check]], str | None]] = {
    "min_clean": (clean_accuracy, None),
    "min_accuracy": (fault_accuracy, "at_ber"),
    "max_sdc": (sdc_rate, None),
    "min_adversarial": (adversarial_accuracy, "at_eps"),
    "max_parity_steps": (parity, None),
    "max_weight_bytes": (weight_bytes, None),
}
"""Name of a limit -> its check, and the name of the values at which it holds, if it has such."""
RATES = ("min_clean", "min_accuracy", "max_sdc", "min_adversarial", "at_ber", "at_eps")
"""What must lie in [0, 1]."""


def check(evidence: Evidence, limits: Mapping[str, Sequence[float]]) -> list[Check]:
    """Every limit against everything that was measured for it.

    `limits` has names of LIMITS and of the values that go with them, each with one value or more;
    the first of `min_accuracy` holds at the first of `at_ber`. InputError when nothing was measured
    for a limit, when there is no limit, or when one is out of its range.
    """
    for name, values in limits.items():
        for value in values:
            if not 0 <= value <= (1 if name in RATES else math.inf):
                span = "[0, 1]" if name in RATES else "[0, inf)"
                raise InputError(f"{_option(name)} must lie in {span}, got {value:g}")
    checks: list[Check] = []
    for name, (judge, at) in LIMITS.items():
        values, places = limits.get(name, ()), limits.get(at, ()) if at else ()
        if at and len(values) != len(places):
            raise InputError(
                f"{_option(name)} has {len(values)} values and {_option(at)} {len(places)}; "
                "expected as many of both"
            )
        for i, value in enumerate(values):
            checks += judge(evidence, value, places[i]) if at else judge(evidence, value)
    return _found(checks, "no limit given; expected one of " + ", ".join(map(_option, LIMITS)))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_file(path: Path) -> dict[str, str]:
    """Limits of a TOML file, `min-accuracy = 0.85`, as the texts that the options would have.

    Several values stand in a list. InputError names the first that is no limit.
    """
    found = {}
    known = [*LIMITS, *(at for _, at in LIMITS.values() if at), "confidence"]
    for name, value in recipe.read_toml(path).items():
        if name.replace("-", "_") not in known:
            names = ", ".join(k.replace("_", "-") for k in known)
            raise InputError(f"{path}: unknown limit {name!r}; expected one of {names}")
        values = value if isinstance(value, list) else [value]
        found[name.replace("-", "_")] = ",".join(map(str, values))
    return found
