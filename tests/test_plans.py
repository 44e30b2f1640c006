"""Plans with strata and plans that end early: which trials, and that their intervals cover."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import models
from resq_deploy import metrics, runtime, store
from resq_deploy.data import Dataset
from resq_deploy.errors import InputError
from resq_deploy.inject import inject, plans, results
from resq_deploy.inject.plans import Strata, SweepUntil, Until, sequential
from resq_deploy.inject.space import Space, Tensor
from resq_deploy.inject.summary import stratified
from resq_deploy.records import Interval, Site, Trial

SPACE = Space(
    tensors=tuple(
        Tensor(name=n, dtype=d, shape=s, op_type="Conv", node=n, absorbed=False)
        for n, d, s in [("a", "int8", (20, 30)), ("b", "int4", (9,)), ("c", "int32", (50,))]
    )
)
BITS = [4800, 36, 1600]
DATA = models.data(12)


def trial(number: int, *, sdc: bool = False, accuracy: float = 1.0, rate: float | None = None):
    return Trial(
        trial=number,
        rate=rate,
        n_flips=1,
        site=None,
        n_total=1000,
        n_correct=round(1000 * accuracy),
        n_sdc=int(sdc),
        n_changed=1,
    )


# --------------------------------------------------------------------------- strata


def strata(**options: object) -> Strata:
    plan = plans.make(SPACE, margin=0.1, **options)
    assert isinstance(plan, Strata)
    return plan


def test_every_layer_has_the_sample_of_its_own_population() -> None:
    plan = strata(per_layer=True)
    assert [s.n for s in plan.strata] == [metrics.sample_size(n, 0.1, 0.95) for n in BITS]
    sites = SPACE.sites(np.concatenate([plan.cells(t, SPACE, 3) for t in plan.trials()]))
    assert len(set(sites)) == len(sites) == len(plan.trials())
    owners = [site.tensor for site in sites]
    assert [owners.count(name) for name in "abc"] == [s.n for s in plan.strata]


def test_every_bit_of_every_layer_has_the_sample_of_its_own_population() -> None:
    plan = strata(per_layer_bit=True)
    assert len(plan.strata) == 8 + 4 + 32
    cells = [plan.cells(t, SPACE, 3) for t in plan.trials()]
    sites = [SPACE.sites(cell)[0] for cell in cells]
    assert len(set(sites)) == len(sites)
    counts = {
        (name, bit): 0
        for name, width in zip("abc", (8, 4, 32), strict=True)
        for bit in range(width)
    }
    for site in sites:
        counts[site.tensor, site.bit] += 1
    sizes = {"a": 600, "b": 9, "c": 50}
    assert counts == {key: metrics.sample_size(sizes[key[0]], 0.1, 0.95) for key in counts}


def test_strata_are_drawn_uniformly_and_restored_from_their_description() -> None:
    plan = strata(per_layer=True)
    drawn = [
        int(plan.cells(t, SPACE, seed)[0]) for seed in range(60) for t in range(plan.strata[0].n)
    ]
    assert stats.chisquare(np.bincount(np.array(drawn) * 16 // 4800)).pvalue > 1e-3
    again = plans.restore(json.loads(json.dumps(plan.describe())), plan.fault, SPACE)
    assert again == plan


def test_the_weighted_total_is_unbiased_and_its_interval_covers() -> None:
    """Strata with SDC rates of 1 %, 60 % and 20 %; a plain mean over trials would be far off."""
    rng = np.random.default_rng(1)
    plan = strata(per_layer=True)
    truth = [rng.random(n) < p for n, p in zip(BITS, (0.01, 0.6, 0.2), strict=True)]
    exact = float(np.concatenate(truth).mean())
    found, plain, covered, n = [], [], 0, 400
    for _ in range(n):
        hits = np.concatenate(
            [rng.choice(t, s.n, replace=False) for t, s in zip(truth, plan.strata, strict=True)]
        )
        trials = [trial(i, sdc=bool(hit)) for i, hit in enumerate(hits)]
        value, variance = stratified(plan, trials, hits.tolist())
        half = 1.96 * variance**0.5
        found.append(value)
        plain.append(hits.mean())
        covered += value - half <= exact <= value + half
    assert abs(np.mean(found) - exact) < 4 * np.std(found) / n**0.5
    assert abs(np.mean(plain) - exact) > 10 * np.std(plain) / n**0.5
    assert stats.binomtest(covered, n, 0.95, alternative="less").pvalue > 1e-3


def test_the_variance_is_the_textbooks() -> None:
    """Cochran, theorem 5.3, by hand: two strata of 4 and 36 bits, 2 and 3 values."""
    space = Space(tensors=(SPACE.tensors[1],) * 1)
    plan = Strata.of(strata(per_layer=True).model, space, by="layer", margin=0.3, confidence=0.95)
    n = plan.strata[0].n
    values = np.linspace(0.2, 0.9, n)
    mean, variance = stratified(plan, [trial(i) for i in range(n)], values.tolist())
    assert mean == pytest.approx(values.mean())
    assert variance == pytest.approx((1 - n / 36) * values.var(ddof=1) / n)


def test_accuracies_that_are_all_one_are_not_taken_for_a_rate() -> None:
    """Equal values have no spread; a rate of 1 still has one, because the next may be a 0."""
    plan = strata(per_layer=True)
    trials = [trial(i) for i in plan.trials()]
    assert stratified(plan, trials, [1.0] * len(trials)) == (pytest.approx(1), 0)
    assert stratified(plan, trials, [True] * len(trials))[1] > 0


def test_intervals_of_accuracies_with_strata_stay_in_the_unit_interval(tmp_path: Path) -> None:
    """Most faults lose nothing and a few lose much: the normal interval would reach beyond 1."""
    file = tmp_path / "m.onnx"
    file.write_bytes(models.quantized("qdq-channel"))
    session = runtime.session(file.read_bytes())
    y = metrics.top1(runtime.run(session, DATA.x))
    own = Dataset(name="own answers", x=DATA.x, y=y)
    found = inject(file, own, out=tmp_path / "s", margin=0.3, per_layer=True)["fault_accuracy"]
    assert 0 <= found["low"] <= found["mean"] <= found["high"] <= 1
    sweep = {"rates": [0.003], "until_width": 0.01, "draws": 25}
    (row,) = inject(file, own, out=tmp_path / "t", **sweep)["per_rate"]
    assert 0.8 < row["low"] < row["mean"] < 1 == row["high"]


def test_a_full_census_has_no_error() -> None:
    plan = Strata.of(
        strata(per_layer=True).model, SPACE, by="layer", margin=0.0001, confidence=0.95
    )
    assert [s.n for s in plan.strata] == BITS
    hits = [i % 7 == 0 for i in plan.trials()]
    mean, variance = stratified(plan, [trial(i, sdc=h) for i, h in enumerate(hits)], hits)
    assert mean == pytest.approx(np.mean(hits))
    assert variance == 0


def test_a_campaign_with_strata_weights_its_totals(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(models.quantized("qdq-matmul"))
    whole = inject(file, DATA, out=tmp_path / "all", exhaustive=True)
    found = inject(file, DATA, out=tmp_path / "s", margin=0.08, per_layer=True)
    rows = found["per_layer"]
    weighted = sum(r["n_bits"] * r["sdc_rate"]["value"] for r in rows) / found["n_bits"]
    assert found["sdc_rate"]["value"] == pytest.approx(weighted)
    assert found["sdc_rate"]["value"] != pytest.approx(found["outcomes"]["sdc"] / found["n_trials"])
    rate, accuracy = found["sdc_rate"], found["fault_accuracy"]
    assert rate["low"] <= whole["sdc_rate"]["value"] <= rate["high"]
    assert accuracy["low"] <= whole["fault_accuracy"]["mean"] <= accuracy["high"]
    # bits of the small layer are drawn more often: per_bit must not favour it
    sizes = {r["tensor"]: r["n_bits"] / r["n_trials"] for r in rows}
    trials = store.read([tmp_path / "s"])[1]
    for row in found["per_bit"]:
        of_bit = [t for t in trials if t.site.bit == row["bit"]]
        weights = [sizes[t.site.tensor] for t in of_bit]
        expected = np.average([t.outcome == "sdc" for t in of_bit], weights=weights)
        assert row["sdc_rate"]["value"] == pytest.approx(expected)
        assert row["sdc_rate"]["low"] <= expected <= row["sdc_rate"]["high"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"trials": 3, "per_layer": True}, "without --margin"),
        ({"margin": 0.1, "per_layer": True, "per_layer_bit": True}, "expected one of them"),
        ({"margin": 0.1, "per_layer": True, "fault": "k:2"}, "go with single, stuck0 and stuck1"),
        ({"until_width": 0.0}, "--until-width must lie"),
        ({"until_width": 0.1, "trials": 5}, "--trials and --until-width given"),
        ({"until_width": 0.1, "fault": "ber"}, "ber goes with --rates"),
    ],
)
def test_plans_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plans.make(SPACE, **options)


# --------------------------------------------------------------------------- sequential


def until(width: float = 0.1) -> Until:
    plan = plans.make(SPACE, until_width=width)
    assert isinstance(plan, Until)
    return plan


def run(plan: Until, hits: np.ndarray) -> tuple[int, Interval]:
    """Number of trials at which the plan ends on these outcomes, and its interval."""
    trials: list[Trial] = []
    for index in range(plan.n_stages):
        stage = plan.stage(index, trials)
        if not stage:
            break
        trials += [trial(t, sdc=bool(hits[t])) for t in stage]
    return len(trials), sequential.sdc_rate(trials, plan.confidence)


def test_looks_are_few_fixed_and_geometric() -> None:
    looks = until(0.05).looks
    assert len(looks) <= sequential.LOOKS
    ratios = np.diff(np.log(looks))
    assert ratios.max() < 1.2 * ratios.min()
    # the first can do without an SDC, none before could
    level = sequential.corrected(0.95)
    wide = [metrics.rate(0, n, level, method="exact") for n in (looks[0] - 1, looks[0])]
    assert wide[0].high > 0.05 >= wide[1].high


@pytest.mark.parametrize("p, early", [(0.0, True), (0.02, True), (0.5, False)])
def test_the_campaign_ends_when_the_interval_is_narrow_enough(p: float, early: bool) -> None:
    plan = until(0.1)
    hits = np.random.default_rng(0).random(5000) < p
    n, interval = run(plan, hits)
    assert n in plan.looks
    assert interval.high - interval.low <= 0.1 + 2 / n
    assert (n < plan.looks[-1]) is early


@pytest.mark.parametrize("p", [0.003, 0.05, 0.15])
def test_early_stops_do_not_bias_the_interval(p: float) -> None:
    """Coverage over 3,000 simulated campaigns, against the confidence that is promised."""
    plan = until(0.08)
    rng = np.random.default_rng(2)
    level = sequential.corrected(0.95)
    seen: dict[tuple[int, int], Interval] = {}
    covered, ends = 0, set()
    for number in range(3000):
        hits = rng.random(plan.looks[-1]) < p
        for n in plan.looks:
            k = int(hits[:n].sum())
            if (k, n) not in seen:
                seen[k, n] = metrics.rate(k, n, level, method="exact")
            interval = seen[k, n]
            if interval.high - interval.low <= plan.width:
                break
        if number < 20:  # the plan itself is slower and does the same
            assert run(plan, hits)[0] == n
        ends.add(n)
        covered += interval.low <= p <= interval.high
    assert stats.binomtest(covered, 3000, 0.95, alternative="less").pvalue > 1e-3
    assert max(ends) < plan.looks[-1], "the simulation must stop early to say anything"


def test_a_look_sees_only_the_trials_before_it() -> None:
    """A resumed campaign holds some later ones already."""
    plan = until(0.1)
    first, second = plan.looks[:2]
    calm = [trial(n) for n in range(first)]
    wild = [trial(n, sdc=n % 2 == 0) for n in range(first)]
    later = [trial(n, sdc=n % 2 == 0) for n in range(first, second)]
    assert plan.stage(1, calm) == plan.stage(1, calm + later) == range(0)
    calm_later = [trial(n) for n in range(first, 50 * second)]
    assert plan.stage(1, wild) == plan.stage(1, wild + calm_later) == range(first, second)


def test_a_small_population_ends_with_all_of_it() -> None:
    plan = Until(model=until().model, width=0.001, confidence=0.95, population=300)
    assert plan.looks == (300,)
    assert plans.restore(json.loads(json.dumps(plan.describe())), "single", SPACE) == plan


def sweep(draws: int | None = None, width: float = 0.02) -> SweepUntil:
    plan = plans.make(SPACE, fault="ber", rates=[1e-3, 1e-2], draws=draws, until_width=width)
    assert isinstance(plan, SweepUntil)
    return plan


def run_sweep(plan: SweepUntil, values: np.ndarray) -> list[list[Trial]]:
    """Trials by rate; `values` (rates, draws) are accuracies."""
    trials: list[Trial] = []
    for index in range(plan.n_stages):
        stage = plan.stage(index, sorted(trials, key=lambda t: t.trial))
        if not stage:
            break
        trials += [trial(t, accuracy=values[divmod(t, plan.draws)]) for t in stage]
    return [[t for t in trials if t.trial // plan.draws == r] for r in range(2)]


def test_every_rate_of_a_sweep_ends_by_itself() -> None:
    plan = sweep()
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(0.9, 0.01, 1000), rng.normal(0.7, 0.1, 1000).clip(0, 1)])
    calm, wild = run_sweep(plan, values)
    assert len(calm) == sequential.FIRST_DRAWS
    assert len(wild) > 200
    for group in (calm, wild):
        interval = sequential.mean_accuracy(group, 0.95)
        assert interval.high - interval.low <= 0.02
    assert len(run_sweep(sweep(draws=60), values)[1]) == 60
    again = plans.restore(json.loads(json.dumps(plan.describe())), "ber", SPACE)
    assert again == plan


def test_accuracies_that_are_all_equal_do_not_end_a_sweep_at_once() -> None:
    """A pattern in fifty is fatal: the first twenty often say nothing about it."""
    plan, rng, covered = sweep(width=0.05), np.random.default_rng(4), 0
    for _ in range(200):
        values = np.repeat(np.where(rng.random((1, 1000)) < 0.02, 0.1, 0.9), 2, axis=0)
        group = run_sweep(plan, values)[0]
        interval = sequential.mean_accuracy(group, 0.95)
        covered += interval.low <= 0.02 * 0.1 + 0.98 * 0.9 <= interval.high
    assert stats.binomtest(covered, 200, 0.95, alternative="less").pvalue > 1e-3
    equal = [trial(i, accuracy=0.75) for i in range(40)]
    interval = sequential.mean_accuracy(equal, 0.95)
    p = 1 - (0.005 / 2) ** (1 / 40)  # none of 40, two-sided, at the confidence of one look of ten
    assert (interval.low, interval.high) == pytest.approx((0.75 * (1 - p), 0.75 + 0.25 * p))


def test_early_stops_do_not_bias_accuracies_either() -> None:
    """Skewed accuracies, as under high rates: most patterns harmless, some fatal."""
    plan, rng, covered, ends = sweep(width=0.06), np.random.default_rng(3), 0, set()
    draw = stats.beta(6, 1.5)
    for _ in range(400):
        values = np.repeat(draw.rvs((1, 1000), random_state=rng), 2, axis=0)
        group = run_sweep(plan, values)[0]
        ends.add(len(group))
        interval = sequential.mean_accuracy(group, 0.95)
        covered += interval.low <= draw.mean() <= interval.high
    assert stats.binomtest(covered, 400, 0.95, alternative="less").pvalue > 1e-3
    assert len(ends) > 2


OPTIONS = {
    "single": {"until_width": 0.3, "fault": "single"},
    "ber": {"until_width": 0.15, "fault": "ber", "rates": [1e-3, 1e-1], "draws": 200},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_parallel_and_resumed_campaigns_end_at_the_same_trial(tmp_path: Path, name: str) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(models.quantized("qdq-channel"))
    one = inject(file, DATA, out=tmp_path / "one", **OPTIONS[name])
    expected = store.read([tmp_path / "one"])[1]
    assert one["until"]["reached"] is True
    assert one["warnings"] == []
    assert one["n_planned"] == len(expected)
    inject(file, DATA, out=tmp_path / "two", workers=2, **OPTIONS[name])
    assert store.read([tmp_path / "two"])[1] == expected
    with store.open_store(tmp_path / "two") as opened:
        opened._db.execute("DELETE FROM trials WHERE trial % 3 = 1")
        opened._db.commit()
    assert "planned trials are missing" in results([tmp_path / "two"])["warnings"][0]
    inject(file, DATA, out=tmp_path / "two", resume=True, **OPTIONS[name])
    assert store.read([tmp_path / "two"])[1] == expected


def test_sequential_plans_go_without_shards(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(models.quantized("qdq-matmul"))
    with pytest.raises(InputError, match="shards do not see each other's trials"):
        inject(file, DATA, out=tmp_path / "s", until_width=0.2, shard=(0, 2))


# --------------------------------------------------------------------------- summary


CHANNELS = {
    # convolutions and a transposed Gemm: channels are rows
    "qdq-channel": {
        "w1_quantized": lambda offset: offset // 9,
        "w2_quantized": lambda offset: offset // 36,
        "w3_quantized": lambda offset: offset // 4,
    },
    # matrix products: channels are columns
    "qdq-matmul": {
        "m1_quantized": lambda offset: offset % 5,
        "m2_quantized": lambda offset: offset % 4,
    },
}


@pytest.mark.parametrize("name", CHANNELS)
def test_vulnerability_per_channel(tmp_path: Path, name: str) -> None:
    """Against the sites of the trials, whose channel is an index computed by hand."""
    file = tmp_path / "m.onnx"
    file.write_bytes(models.quantized(name))
    found = inject(file, DATA, out=tmp_path / "s", trials=200)
    counts: dict[tuple[str, int], list[bool]] = {}
    for t in store.read([tmp_path / "s"])[1]:
        assert isinstance(t.site, Site)
        key = (t.site.tensor, CHANNELS[name][t.site.tensor](t.site.offset))
        counts.setdefault(key, []).append(t.outcome == "sdc")
    rows = {(r["tensor"], r["channel"]): r for r in found["per_channel"]}
    assert list(rows) == sorted(counts)
    for key, hits in counts.items():
        assert (rows[key]["n_trials"], rows[key]["n_sdc_trials"]) == (len(hits), sum(hits))


def test_fit_is_the_product_of_its_factors(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(models.quantized("qdq-channel"))
    found = inject(file, DATA, out=tmp_path / "s", trials=100, raw_fit=700.0, interval="exact")
    fit, rate = found["fit"], found["sdc_rate"]
    assert fit["mbit"] == 1568e-6
    for key in ("value", "low", "high"):
        assert fit[key] == pytest.approx(700 * 1568e-6 * rate[key])
    k, n = found["outcomes"]["sdc"], 100
    exact = stats.binomtest(k, n).proportion_ci(method="exact")
    assert (rate["low"], rate["high"]) == (exact.low, exact.high)
    assert results([tmp_path / "s"])["fit"] is None
    for wrong, message in [(-1.0, "at least 0"), (float("nan"), "at least 0")]:
        with pytest.raises(InputError, match=message):
            results([tmp_path / "s"], raw_fit=wrong)
    with pytest.raises(InputError, match="it goes with single"):
        inject(file, DATA, out=tmp_path / "t", trials=1, fault="k:2", raw_fit=1.0)
    assert not (tmp_path / "t").exists(), "refused before the campaign, not after it"
    with pytest.raises(InputError, match="wilson or exact"):
        results([tmp_path / "s"], interval="wald")  # type: ignore[arg-type]
