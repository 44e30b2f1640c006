"""Campaign plans: which trials there are, and which bits each of them strikes.

A plan describes itself in plain JSON values; the store keeps that description, and `restore`
turns it into the plan again, so that sites can be drawn again from the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resq_deploy import metrics
from resq_deploy.errors import InputError
from resq_deploy.inject import faults
from resq_deploy.inject.faults import Fault, Numbered, SingleFlip
from resq_deploy.inject.plans.base import Plan
from resq_deploy.inject.plans.basic import Exhaustive, Random, Sweep
from resq_deploy.inject.plans.image import Image, read_image
from resq_deploy.inject.plans.listed import CSV_COLUMNS, Listed, read_sites
from resq_deploy.inject.plans.sequential import SweepUntil, Until, check_width
from resq_deploy.inject.plans.strata import Strata
from resq_deploy.inject.space import Space
from resq_deploy.records import Site

DEFAULT_DRAWS = 50
MOST_DRAWS = 1000
"""Patterns at a rate at most, where `--until-width` decides and `--draws` is not given."""
LARGE_POPULATION = 10**15
"""The number of patterns is cut here: sample sizes no longer depend on it."""


def restore(description: dict[str, Any], fault: str, space: Space) -> Plan:
    """The plan that `describe` described, of the fault model named `fault`."""
    given = dict(description)
    kind = given.pop("kind")
    if kind == "image":
        return Image.restore(**given)
    model = faults.parse("single" if fault == "sites" else fault)
    if kind == "exhaustive":
        return Exhaustive.of(model, space)
    if kind == "strata":
        return Strata.of(model, space, **given)
    if kind == "sites":
        rows = [
            (trial, Site(tensor=tensor, offset=offset, bit=bit))
            for trial, tensor, offset, bit in given["sites"]
        ]
        return Listed.of(rows, model)
    if kind == "sweep":
        return Sweep(model=model, **{**given, "rates": tuple(given["rates"])})
    if kind == "sweep-until":
        return SweepUntil(model=model, **{**given, "rates": tuple(given["rates"])})
    if kind == "until":
        del given["looks"]
        return Until(model=model, **given)
    return Random(model=model, n=given.pop("trials"), **given)


def make(
    space: Space,
    *,
    fault: str | None = None,
    trials: int | None = None,
    margin: float | None = None,
    confidence: float = 0.95,
    per_layer: bool = False,
    per_layer_bit: bool = False,
    exhaustive: bool = False,
    sites: Path | None = None,
    rates: Sequence[float] = (),
    draws: int | None = None,
    until_width: float | None = None,
    image: Image | None = None,
) -> Plan:
    """The plan that the options of `inject` ask for; InputError when they ask for none or two.

    Exactly one of `trials`, `margin` (finite-population sample size at `confidence`; with
    `per_layer` or `per_layer_bit` for each layer or each bit of each layer), `exhaustive`,
    `sites`, `image`, `until_width` and `rates` (with `draws`, 50 by default, or up to `draws` with
    `until_width`), among those that the fault model goes with: `fault`, which is `ber` with
    `rates` and else `single` when it is not given.
    """
    if image is not None and fault is not None:
        raise InputError(f"--fault {fault} with --image given; the dump says what is faulty")
    fault = fault or ("ber" if rates else "single")
    model = faults.parse(fault)
    given = {
        "--trials": trials is not None,
        "--margin": margin is not None,
        "--exhaustive": exhaustive,
        "--sites": sites is not None,
        "--image": image is not None,
        "--until-width": until_width is not None and not rates,
        "--rates": bool(rates),
    }
    names = [name for name, is_given in given.items() if is_given]
    if len(names) != 1:
        raise InputError(
            f"{' and '.join(names) or 'no plan'} given; expected exactly one of {', '.join(given)}"
        )
    if image is None and names[0] not in model.plans:
        fitting = [name for name in given if name in model.plans]
        raise InputError(
            f"--fault {fault} with {names[0]} given; {fault} goes with {' or '.join(fitting)}"
        )
    if draws is not None and not rates:
        raise InputError(f"--draws {draws} given without --rates; use --trials")
    if (per_layer or per_layer_bit) and margin is None:
        raise InputError("--per-layer or --per-layer-bit given without --margin; add it")
    if image is not None:
        return image
    if until_width is not None:
        check_width(until_width)
    if rates:
        return _sweep(model, rates, draws, until_width, confidence)
    if sites is not None:
        return read_sites(sites, space, model)
    if exhaustive:
        return Exhaustive.of(model, space)
    if margin is not None and (per_layer or per_layer_bit):
        return _strata(model, space, margin, confidence, per_layer, per_layer_bit)
    if trials is not None:
        most = model.population(space) if isinstance(model, Numbered) else None
        if trials < 1 or (most is not None and trials > most):
            limit = "at least 1" if most is None else f"1 to {most} (all patterns of {fault})"
            raise InputError(f"--trials {trials} given; expected {limit}")
        return Random(model=model, n=trials)
    population = min(model.population(space), LARGE_POPULATION)
    if margin is not None:
        n = metrics.sample_size(population, margin, confidence)
        return Random(model=model, n=n, margin=margin, confidence=confidence)
    assert until_width is not None
    return Until(model=model, width=until_width, confidence=confidence, population=population)


def _strata(
    model: Fault,
    space: Space,
    margin: float,
    confidence: float,
    per_layer: bool,
    per_layer_bit: bool,
) -> Strata:
    if per_layer and per_layer_bit:
        raise InputError("--per-layer and --per-layer-bit given; expected one of them")
    if not isinstance(model, SingleFlip):
        raise InputError(
            f"--fault {model.name} with strata given; --per-layer and --per-layer-bit go with "
            "single, stuck0 and stuck1, which strike one bit"
        )
    by = "layer" if per_layer else "layer-bit"
    return Strata.of(model, space, by=by, margin=margin, confidence=confidence)


def _sweep(
    model: Fault,
    rates: Sequence[float],
    draws: int | None,
    until_width: float | None,
    confidence: float,
) -> Plan:
    bad = [rate for rate in rates if not 0 <= rate <= 1]
    if bad or len(set(rates)) < len(rates):
        raise InputError(f"--rates must be distinct and lie in [0, 1], got {list(rates)}")
    if draws is not None and draws < 1:
        raise InputError(f"--draws must be at least 1, got {draws}")
    each = tuple(float(rate) for rate in rates)
    if until_width is None:
        return Sweep(model=model, rates=each, draws=draws or DEFAULT_DRAWS)
    return SweepUntil(
        model=model,
        rates=each,
        draws=draws or MOST_DRAWS,
        width=until_width,
        confidence=confidence,
    )


__all__ = [
    "CSV_COLUMNS",
    "Exhaustive",
    "Image",
    "Listed",
    "Plan",
    "Random",
    "Strata",
    "Sweep",
    "SweepUntil",
    "Until",
    "make",
    "read_image",
    "read_sites",
    "restore",
]
