"""Every method of stages 1 and 2: the contract of an objective, and what makes it that method."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import method_tables
import methods as rows_of
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_recipe
from torch import nn

from resq_deploy import artifacts, bits, recipe
from resq_deploy.data.base import Dataset
from resq_deploy.errors import InputError
from resq_deploy.nets import build
from resq_deploy.nets.quantized import calibrate, codes, quantize, value, weight_layers
from resq_deploy.perturb.weights import Masks, bit_errors, k_masks, worst_masks
from resq_deploy.train import objective_of, train
from resq_deploy.train.attacks import ATTACKS
from resq_deploy.train.attacks.adversarial import Adversarial
from resq_deploy.train.attacks.afd import AFD
from resq_deploy.train.attacks.feature_consistency import FeatureConsistency, feature_distance
from resq_deploy.train.attacks.trades import Trades
from resq_deploy.train.faults import FAULTS
from resq_deploy.train.faults.advbet import AdvBET
from resq_deploy.train.faults.clip import Clip, clip_per_channel
from resq_deploy.train.faults.criticality import Criticality, layer_rates
from resq_deploy.train.faults.randbet import RandBET
from resq_deploy.train.faults.wcat import REFERENCE_STEPS, WCAT
from resq_deploy.train.loop import fit, weights
from resq_deploy.train.objectives import CrossEntropy

ROOT = Path(__file__).resolve().parents[1]

FAULT: dict[str, Any] = {"epochs": 1, "lr": 0.01, "start_loss": 9.0}
ATTACK: dict[str, Any] = {"epochs": 1, "lr": 0.01, "epsilon": 0.1}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: ("attack", {"method": method}) for method in ATTACKS},
    **{method: ("fault", {"method": method}) for method in FAULTS},
    "randbet, rising rate": ("fault", {"rate_schedule": "linear"}),
    "k-upset, keeps afd": ("fault", {"method": "k-upset", "keeps": "afd"}),
}
"""Name -> stage and fields; a new method gets its row by its registry."""


def objective(name: str) -> CrossEntropy:
    """A fresh objective of one row."""
    stage, fields = METHODS[name]
    fields = dict(fields)
    keeps = fields.pop("keeps", None)
    if stage == "attack":
        return ATTACKS[fields["method"]](recipe.Attack(**ATTACK, **fields))
    unfaulted = ATTACKS[keeps](recipe.Attack(**ATTACK)) if keeps else CrossEntropy()
    config = recipe.Fault(**FAULT, **fields)
    return FAULTS[config.method](config, unfaulted, seed=0)


@cache
def _int8(gain: float) -> nn.Module:
    net = build("resnet8", n_classes=10, in_channels=1, width=0.5, seed=3)
    last: Any = net.get_submodule("fc").weight
    last.data *= gain
    net = quantize(net)
    calibrate(net, torch.rand(32, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    return net.train()


def int8(gain: float = 1.0) -> nn.Module:
    """A calibrated ResNet-8 with random weights; logits are `gain` times as large."""
    return copy.deepcopy(_int8(gain))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(8)


class Stop(Exception):
    """Stands for a killed process."""


SMALL: dict[str, Any] = {
    "data": {"validation": 0.9},
    "model": {"width": 0.5},
    "float": {"epochs": 0},
    "baseline": {"epochs": 0},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated int8 checkpoint that has not been trained."""
    folder = tmp_path_factory.mktemp("start")
    loaded = recipe.load(write_recipe(folder, **SMALL))
    last = train(loaded, "float", out=folder / "float")
    return train(loaded, "baseline", out=folder / "baseline", start=last)


class TestContract:
    """What the loop relies on, of every method."""

    def test_every_method_of_the_recipe_has_a_class(self) -> None:
        for section, registry in ((recipe.Attack, ATTACKS), (recipe.Fault, FAULTS)):
            assert set(get_args(section.model_fields["method"].annotation)) == set(registry)

    @pytest.mark.parametrize("name", METHODS)
    def test_a_step_gives_every_weight_a_gradient(self, name: str) -> None:
        net, (x, y), method = int8(), batch(), objective(name)
        method.begin(4)
        loss = method.loss(net, x, y, torch.Generator().manual_seed(0))
        loss.backward()
        method.after_backward(net)
        method.after_step(net)
        assert torch.isfinite(loss)
        for layer, w in weights(net).items():
            assert w.grad is not None and float(w.grad.abs().max()) > 0, layer

    @pytest.mark.parametrize("name", METHODS)
    def test_killed_and_resumed_ends_with_the_same_bytes(self, name: str, tmp_path: Path) -> None:
        """Stopped in the second of two epochs; weights and history as if nothing happened."""
        rng = np.random.default_rng(0)
        images = Dataset(
            name="noise",
            x=rng.integers(0, 256, (4, 1, 32, 32)).astype(np.uint8),
            y=rng.integers(0, 10, 4),
        )
        config = recipe.Training(epochs=2, lr=0.05, batch=2)

        def run(method: CrossEntropy, folder: Path) -> tuple[Any, nn.Module]:
            net = int8()
            history = fit(
                net, images, method, config, stage="fault", seed=1, augment="none",
                resume=folder / "resume.safetensors", inputs={},
            )  # fmt: skip
            return history, net

        whole, expected = run(objective(name), tmp_path / "a")
        killed = objective(name)
        step, calls = killed.after_step, []

        def dies_in_the_second_epoch(net: nn.Module) -> None:
            calls.append(step(net))
            if len(calls) == 3:
                raise Stop

        killed.after_step = dies_in_the_second_epoch  # type: ignore[method-assign]
        with pytest.raises(Stop):
            run(killed, tmp_path / "b")
        history, resumed = run(objective(name), tmp_path / "b")
        assert history == whole
        for key, tensor in expected.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[key]), key

    @pytest.mark.parametrize("name", METHODS)
    def test_a_recipe_reaches_it_and_it_trains_on_digits(
        self, name: str, start: Path, tmp_path: Path
    ) -> None:
        stage, fields = METHODS[name]
        keeps = fields.get("keeps")
        changes: dict[str, Any] = {stage: {k: v for k, v in fields.items() if k != "keeps"}}
        changes[stage] |= {"epochs": 1, "batch": 40}
        if stage == "fault":
            changes["fault"]["keep_attack"] = keeps is not None
            changes["attack"] = {"method": keeps or "feature-consistency"}
        loaded = recipe.load(write_recipe(tmp_path, **(SMALL | changes)))
        path = train(loaded, stage, out=tmp_path / "out", start=start)
        facts = artifacts.read_json(artifacts.sidecar(path))
        assert [row["epoch"] for row in facts["history"]] == [1]
        assert facts["recipe"][stage]["method"] == getattr(loaded, stage).method
        assert artifacts.sha256(path) != artifacts.sha256(start)
        assert ("criticality" in facts) == (stage == "fault")


@given(st.integers(2, 6), st.floats(0.5, 4.0), st.integers(0, 99))
def test_clipping_bounds_every_channel_and_never_grows_a_weight(
    channels: int, rms: float, seed: int
) -> None:
    w = torch.randn(channels, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    before = w.clone()
    bound = rms * before.square().mean(dim=(1, 2, 3)).sqrt()
    clip_per_channel(w, rms)
    assert (w.abs().amax(dim=(1, 2, 3)) <= bound * (1 + 1e-6)).all()
    assert (w.abs() <= before.abs()).all()
    inside = before.abs() <= bound.reshape(-1, 1, 1, 1) * (1 - 1e-6)
    assert torch.equal(w[inside], before[inside])


def test_criticality_is_the_moving_average_of_gradient_norms() -> None:
    """s <- 0.9 s + 0.1 ||g||, started at the first norm; by hand for two steps."""
    net = int8()
    ranking = Criticality(0.9)
    layer = net.get_submodule("fc")
    for slope in (1.0, 3.0):
        for p in net.parameters():
            p.grad = torch.full_like(p, slope)
        ranking.update(net)
    n = layer.weight.numel()  # type: ignore[union-attr, operator]
    expected = (0.9 * 1.0 + 0.1 * 3.0) * n**0.5
    assert ranking.norm["fc"] == pytest.approx(expected)
    assert ranking.scores(net)["fc"] == pytest.approx(expected / n**0.5)
    scores = [float(row["score"]) for row in ranking.ranking(net)]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("guided", ["proportional", "top-k", "none"])
def test_layer_rates_keep_the_expected_number_of_errors(guided: str) -> None:
    config = recipe.Fault(**FAULT, guided=guided, top_k=2)
    sizes = {"a": 100, "b": 1000, "c": 5000}
    rates = layer_rates({"a": 3.0, "b": 1.0, "c": 0.5}, sizes, config, rate=0.01)
    assert sum(rates[n] * sizes[n] for n in sizes) == pytest.approx(0.01 * sum(sizes.values()))
    assert rates["a"] >= rates["b"] >= rates["c"]
    if guided == "top-k":
        assert rates["c"] == 0
    if guided == "none":
        assert set(rates.values()) == {0.01}


def test_feature_distance_is_zero_for_equal_and_as_defined() -> None:
    h = torch.tensor([[3.0, 4.0]])
    assert float(feature_distance(h, h, "cosine")) == pytest.approx(0, abs=1e-6)
    assert float(feature_distance(h, torch.tensor([[-4.0, 3.0]]), "cosine")) == pytest.approx(1)
    assert float(feature_distance(h, h + torch.tensor([[0.0, 5.0]]), "mse")) == pytest.approx(1)


def test_feature_consistency_is_the_sum_of_its_three_terms() -> None:
    net, (x, y) = int8(), batch()

    def loss(**weights: float) -> float:
        objective = FeatureConsistency(recipe.Attack(**ATTACK, **weights))
        return float(objective.loss(net, x, y, torch.Generator().manual_seed(0)))

    clean = loss(adversarial_weight=0, feature_weight=0)
    assert clean == pytest.approx(float(CrossEntropy().loss(net, x, y, torch.Generator())))
    adversarial = loss(adversarial_weight=1, feature_weight=0) - clean
    feature = loss(adversarial_weight=0, feature_weight=1) - clean
    assert adversarial > clean and feature > 0
    assert loss(adversarial_weight=2, feature_weight=3) == pytest.approx(
        clean + 2 * adversarial + 3 * feature, rel=1e-4
    )


def test_bit_errors_begin_below_the_start_loss_and_then_stay() -> None:
    net, (x, y) = int8(), batch()
    late = RandBET(recipe.Fault(**(FAULT | {"start_loss": 0.01})), CrossEntropy(), seed=0)
    plain = float(CrossEntropy().loss(net, x, y, torch.Generator()))
    assert float(late.loss(net, x, y, torch.Generator())) == pytest.approx(plain)
    late.unfaulted.clean_loss, late.running = 0.0, 0.0
    now = RandBET(recipe.Fault(**FAULT, rate=0.05), CrossEntropy(), seed=0)
    assert float(now.loss(net, x, y, torch.Generator())) > plain
    now.running = 100.0
    assert float(now.loss(net, x, y, torch.Generator())) > plain


# --------------------------------------------------------------------------- the table's rows


def test_every_row_of_the_table_is_a_recipe_with_stages_that_exist() -> None:
    base = recipe.load(ROOT / "models/cifar10-resnet8.toml")
    rows = rows_of.rows(None)
    assert rows[0]["name"] == "baseline" and len({row["name"] for row in rows}) == len(rows)
    reached = set()
    for row in rows:
        made = rows_of.plan(base, row, 1, images=10)
        own = [row.get(stage, {}).get("epochs", 1) for stage in ("attack", "fault")]
        assert ([made.attack.epochs, made.fault.epochs], made.prove.images) == (own, 10)
        assert [s for s in ("attack", "fault", "adjust") if s in row["stages"]] == row["stages"]
        assert row.keys() - {"name", "about", "stages"} <= {"model", *row["stages"]}
        reached |= {getattr(made, s).method for s in row["stages"] if s != "adjust"}
    assert reached == set(ATTACKS) | set(FAULTS)
    with pytest.raises(InputError, match="row 'fautl' is unknown; expected one of baseline, "):
        rows_of.rows("fautl")


@given(st.text("01", min_size=1, max_size=50))
def test_packed_images_of_the_table_survive_a_round_trip(marks: str) -> None:
    assert (
        "".join(f"{right:.0f}" for right in method_tables.unpack(method_tables.pack(marks)))
        == marks
    )


def test_autoattack_of_the_table_goes_on_where_pgd_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only what PGD left is attacked, and nothing comes back that PGD broke."""
    images = Dataset(name="noise", x=np.zeros((8, 1, 8, 8), np.uint8), y=np.arange(8))
    seen = []

    def attack(model: Path, twin: Path, data: Dataset, **options: Any) -> dict[str, Any]:
        seen.append((options["epsilons"], data.y.tolist()))
        rows = [{"correct": "0101"[: len(data)]}]
        return {"attacks": {"autoattack": {"members": {}, "epsilons": rows}}}

    monkeypatch.setattr("resq_deploy.attack.attack", attack)
    one, two, four = rows_of.EPSILONS[:3]
    left = {one: "11110011", two: "00000001", four: "10000000"}
    radii = [{"epsilon": e} | method_tables.pack(marks) for e, marks in left.items()]
    of = rows_of.Finished(
        made=None, stages=[], row={"attack": {"radii": radii}}, folder=tmp_path, twin=tmp_path,
        baseline=lambda: tmp_path, attacked=6,
    )  # fmt: skip
    monkeypatch.setattr(type(of), "test", lambda self, n: images.first(n))
    found = rows_of.autoattack(of)["radii"]
    assert seen == [((one,), [0, 1, 2, 3]), ((four,), [0])]
    marks = [method_tables.unpack(at).tolist() for at in found]
    assert [at["epsilon"] for at in found] == [one, two, four]
    assert marks == [[0, 1, 0, 1, 0, 0], [0] * 6, [0] * 6]


def test_a_column_that_a_row_lacks_is_shown_as_such() -> None:
    absent = method_tables.ABSENT
    assert method_tables.accuracy("AA 1/255", None) == absent
    assert method_tables.difference(None, np.ones(3)) == absent == method_tables.tail(None)
    assert method_tables.costs({"n_bytes": 1234}) == ["1,234", *4 * [absent]]
    reached = {"n_reached": 1, "n_searches": 2, "more_than": 50}
    assert method_tables.chance({"flips_to_chance": reached}) == "more than 50 (1 of 2 got there)"
    assert method_tables.chance({"refused": "encoded"}) == "refused"
    again = {"flips_to_chance": reached, "again": {}}
    assert method_tables.chance(again) == "more than 50 (1 of 2 got there)†"
    with pytest.raises(InputError, match="column 'fgms' is unknown; expected some of fgsm, "):
        rows_of.measures("time,fgms")


def test_a_column_is_measured_once_and_copied_where_the_file_is_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What came of a second training is marked so."""
    row = {"model_sha256": "a", "data_sha256": "b", "measured": {}, "attack": {"radii": []}}
    for name, digest in (("one", "a"), ("two", "a"), ("three", "c")):
        artifacts.write_json(tmp_path / f"{name}.json", row | {"model_sha256": digest})
    calls = []

    def bfa(of: Any) -> dict[str, Any]:
        calls.append(of)
        return {"flips_to_chance": {"mean": len(calls), "low": 0, "high": 9}}

    def finished(again: dict[str, Any] | None) -> Any:
        return rows_of.Finished(
            made=None, stages=[], row=row, folder=tmp_path, twin=tmp_path, attacked=1,
            baseline=lambda: tmp_path, again=again,
        )  # fmt: skip

    monkeypatch.setitem(rows_of.MEASURES, "bfa", bfa)
    again = {"n_correct": 9, "n": 10, "cpu": "other"}
    for name, note in (("one", None), ("two", None), ("three", again), ("three", again)):
        made = finished(note)
        rows_of.add(tmp_path / f"{name}.json", ["bfa"], 1, lambda made=made: made)
    assert len(calls) == 2
    found = {n: artifacts.read_json(tmp_path / f"{n}.json") for n in ("one", "two", "three")}
    assert found["one"]["more"] == found["two"]["more"]
    shown = [method_tables.costs(r | {"n_bytes": 1})[-1] for r in found.values()]
    assert shown == ["1.0 [0.0, 9.0]", "1.0 [0.0, 9.0]", "2.0 [0.0, 9.0]†"]
    kept = {n: r | {"clean": {"n_correct": 8, "n": 10}} for n, r in found.items()}
    (note, _) = method_tables.second(kept)
    assert "on other with" in note and "+10.0 to +10.0 points" in note


def test_cells_of_a_second_training_are_marked_and_no_others() -> None:
    second = {"again": {}}
    row = {"more": {"fgsm": second, "ber": second | {"rate": 1e-5}, "both": {}, "autoattack": {}}}
    columns = ["clean", "FGSM 1/255", "PGD 1/255", "AA 1/255", "BER 1e-05", "BER 0.01", "area"]
    columns += ["PGD 1/255, BER 0.01"]
    marked = [column for column in columns if method_tables.again(row, column)]
    assert marked == ["FGSM 1/255", "BER 1e-05"]
    row = {"more": {"both": second, "autoattack": second}}
    marked = [column for column in columns if method_tables.again(row, column)]
    assert marked == ["AA 1/255", "PGD 1/255, BER 0.01"]


def test_attacked_images_under_bit_errors_average_patterns() -> None:
    packed = method_tables.pack("1101")
    cell = {"epsilon": 1 / 255, "rate": 0.01, "n_images": 8, "n_correct": [2, 4]}
    found = method_tables.samples(
        {
            "clean": packed,
            "attack": {"radii": [{"epsilon": 1 / 255} | packed]},
            "fault": {"n_images": 8, "rates": [{"rate": 0.01, "n_correct": [8, 4]}]},
            "more": {"both": {"cells": [cell]}},
        }
    )
    assert list(found) == ["clean", "PGD 1/255", "BER 0.01", "PGD 1/255, BER 0.01"]
    assert found["PGD 1/255, BER 0.01"].tolist() == [0.25, 0.5]
    averaged = [column for column in found if method_tables.over_patterns(column)]
    assert averaged == ["BER 0.01", "PGD 1/255, BER 0.01"]


# --------------------------------------------------------------------------- stage 1


def test_adversarial_training_sees_perturbed_images_only() -> None:
    net, (x, y) = int8(), batch()
    method = Adversarial(recipe.Attack(**ATTACK))
    loss = float(method.loss(net, x, y, torch.Generator().manual_seed(0)))
    x_adv = method.perturb(net, x, y, torch.Generator().manual_seed(0))
    assert loss == pytest.approx(float(CrossEntropy().loss(net, x_adv, y, torch.Generator())))
    assert loss > float(CrossEntropy().loss(net, x, y, torch.Generator()))


def test_trades_divergence_is_zero_where_nothing_is_perturbed() -> None:
    net, (x, y) = int8(gain=20), batch()
    plain = float(CrossEntropy().loss(net, x, y, torch.Generator()))

    def loss(epsilon: float, weight: float) -> float:
        config = recipe.Attack(**(ATTACK | {"epsilon": epsilon}), adversarial_weight=weight)
        config = config.model_copy(update={"method": "trades"})
        return float(Trades(config).loss(net, x, y, torch.Generator().manual_seed(0)))

    assert loss(0.0, 6.0) == pytest.approx(plain, abs=1e-5)
    divergence = loss(0.1, 1.0) - plain
    assert divergence > 1e-3
    assert loss(0.1, 6.0) == pytest.approx(plain + 6 * divergence, rel=1e-3)


def test_trades_divergence_is_that_of_the_definition() -> None:
    """KL(p || q) = sum p log(p / q), mean over images."""
    net, (x, y) = int8(gain=20), batch()
    method = Trades(recipe.Attack(**ATTACK, method="trades"))
    p = value(net(x)).softmax(1).detach()
    x_adv = method.perturb(net, x, p, torch.Generator().manual_seed(0))
    q = value(net(x_adv)).softmax(1).detach()
    expected = float((p * (p / q).log()).sum(1).mean())
    plain = float(CrossEntropy().loss(net, x, y, torch.Generator()))
    loss = float(method.loss(net, x, y, torch.Generator().manual_seed(0)))
    assert loss - plain == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_discriminator_of_afd_learns_to_tell_features_apart() -> None:
    """Two clouds per class, mirrored between the classes: only a conditional judge succeeds."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(64) % 2
    sign = (2.0 * y - 1)[:, None]
    clean = sign + 0.1 * torch.randn(64, 6, generator=generator)
    perturbed = -sign + 0.1 * torch.randn(64, 6, generator=generator)
    method = AFD(recipe.Attack(**ATTACK, method="afd", discriminator_lr=0.01))
    method._build(clean, 2, generator)
    losses = [method.learn(clean, perturbed, y) for _ in range(60)]
    assert losses[0] == pytest.approx(2 * np.log(2), abs=0.5)
    assert losses[-1] < 0.1


def test_afd_pulls_perturbed_features_towards_clean_ones() -> None:
    """The gradient of its last term raises the judgement of features that were perturbed."""
    net, (x, y) = int8(), batch()
    method = AFD(recipe.Attack(**ATTACK, method="afd", adversarial_weight=0, feature_weight=1))
    loss = float(method.loss(net, x, y, torch.Generator().manual_seed(0)))
    without = AFD(recipe.Attack(**ATTACK, method="afd", adversarial_weight=0, feature_weight=0))
    plain = float(without.loss(net, x, y, torch.Generator().manual_seed(0)))
    assert plain == pytest.approx(float(CrossEntropy().loss(net, x, y, torch.Generator())))
    assert 0 < loss - plain < 5


# --------------------------------------------------------------------------- stage 2


def flipped(masks: Masks) -> int:
    return sum(int(np.bitwise_count(m.numpy().view(np.uint8)).sum()) for m in masks.values())


@settings(max_examples=15, deadline=None)
@given(k=st.integers(1, 400), seed=st.integers(0, 2**32 - 1))
def test_k_upset_flips_exactly_k_stored_bits(k: int, seed: int) -> None:
    net = NET
    rates = dict.fromkeys(weight_layers(net), 1.0)
    masks = k_masks(net, k, rates, np.random.default_rng(seed))
    changed = 0
    with bit_errors(net, masks):
        for name, layer in weight_layers(net).items():
            q = layer.quant_weight()  # type: ignore[operator]
            read = torch.round(q.value / CLEAN[name].scale).to(torch.int16).detach().numpy()
            stored = CLEAN[name].int(float_datatype=False).to(torch.int8).numpy()
            changed += bits.count_flips(stored, read.astype(np.int8))
    assert flipped(masks) == changed == k


def test_k_upset_reaches_only_layers_with_a_rate_and_refuses_more_bits_than_there_are() -> None:
    rng = np.random.default_rng(0)
    n = 8 * weights(NET)["fc"].numel()
    masks = k_masks(NET, n, {"fc": 0.1, "conv1": 0.0}, rng)
    assert list(masks) == ["fc"] and flipped(masks) == n
    with pytest.raises(InputError, match=rf"{n + 1} bits are to flip; .* have {n}"):
        k_masks(NET, n + 1, {"fc": 0.1}, rng)


def test_k_upset_prefers_layers_in_proportion_to_rate_and_size() -> None:
    sizes = {name: w.numel() for name, w in weights(NET).items()}
    rates = dict.fromkeys(sizes, 1.0) | {"conv1": 50.0}
    masks = k_masks(NET, 2000, rates, np.random.default_rng(1))
    p = 50 * sizes["conv1"] / (sum(sizes.values()) + 49 * sizes["conv1"])
    here = flipped({"conv1": masks["conv1"]})
    # Five standard deviations, and the bits of the layer that were drawn twice.
    assert abs(here - 2000 * p) < 5 * (2000 * p * (1 - p)) ** 0.5 + (2000 * p) ** 2 / (
        16 * sizes["conv1"]
    )


def test_adversarial_bits_raise_the_loss_more_than_random_ones() -> None:
    net, (x, y) = int8(), batch()
    method = AdvBET(recipe.Fault(**FAULT, method="advbet", flips=8), CrossEntropy(), seed=0)
    rng = np.random.default_rng(0)

    def loss(masks: Masks) -> float:
        with bit_errors(net, masks):
            return float(method.cross_entropy(net(x), y))

    worst = method.masks(net, x, y, rng)
    assert 0 < flipped(worst) <= 8
    equal = dict.fromkeys(weights(net), 1.0)
    random = [loss(k_masks(net, 8, equal, rng)) for _ in range(20)]
    assert loss(worst) > np.mean(random) and loss(worst) > loss({})


def test_worst_bits_are_those_of_an_exhaustive_search() -> None:
    """Every bit of a layer tried one by one on a loss that is linear in the weights."""
    net = int8()
    layer = weight_layers(net)["conv1"]
    slope = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2))  # type: ignore[union-attr, arg-type]
    q = layer.quant_weight()  # type: ignore[operator]
    code, scale = codes(layer).numpy(), q.scale.detach()
    gains = {}
    for bit in range(8):
        moved = torch.from_numpy(bits.flip(code, bit=bit).astype(np.float32) - code)
        for offset, gain in enumerate((moved * scale * slope).flatten().tolist()):
            gains[offset, bit] = gain
    best: dict[int, tuple[float, int]] = {}
    for (offset, bit), gain in gains.items():
        best[offset] = max(best.get(offset, (gain, bit)), (gain, bit))
    expected = sorted(best, key=lambda offset: -best[offset][0])[:5]
    masks = worst_masks(net, 5, {"conv1": slope})
    found = masks["conv1"].flatten().numpy().view(np.uint8)
    assert {int(i): int(found[i]) for i in np.flatnonzero(found)} == {
        offset: 1 << best[offset][1] for offset in expected
    }


@pytest.mark.parametrize(("schedule", "expected"), [("constant", 1.0), ("linear", 0.5)])
def test_a_linear_rate_is_half_of_it_after_a_quarter_of_the_steps(
    schedule: str, expected: float
) -> None:
    config = recipe.Fault(**FAULT, rate=0.02, flips=40, rate_schedule=schedule, guided="none")
    method = RandBET(config, CrossEntropy(), seed=0)
    method.begin(80)
    method.steps = 20
    assert method.rates(NET)["fc"] == pytest.approx(0.02 * expected)
    assert method.flips() == 40 * expected
    for step in (40, 80):
        method.steps = step
        assert method.strength() == 1.0


def test_clipping_alone_adds_no_faults() -> None:
    net, (x, y) = int8(), batch()
    method = Clip(recipe.Fault(**FAULT, method="clip"), CrossEntropy(), seed=0)
    loss = float(method.loss(net, x, y, torch.Generator()))
    assert loss == float(CrossEntropy().loss(net, x, y, torch.Generator()))
    before = {n: w.detach().clone() for n, w in weights(net).items()}
    method.after_step(net)
    for name, w in weights(net).items():
        rms = before[name].square().mean(dim=tuple(range(1, w.ndim)), keepdim=True).sqrt()
        assert (w.abs() <= 2 * rms * (1 + 1e-6)).all()


@pytest.mark.parametrize("method", FAULTS)
def test_label_smoothing_of_stage_2_is_that_of_its_clean_loss(method: str, tmp_path: Path) -> None:
    """Where stage 1's loss, which has its own, is not kept; errors have not begun."""
    net, (x, y) = int8(gain=20), batch()
    options = {"method": method, "keep_attack": False, "label_smoothing": 0.5, "start_loss": 1e-9}
    made = objective_of(recipe.load(write_recipe(tmp_path, fault=options)), "fault")
    found = float(made.loss(net, x, y, torch.Generator()))
    assert found == pytest.approx(float(CrossEntropy(0.5).loss(net, x, y, torch.Generator())))
    assert found != pytest.approx(float(CrossEntropy().loss(net, x, y, torch.Generator())))


def test_clip_rms_of_zero_leaves_weights_alone() -> None:
    net = int8()
    before = {n: w.detach().clone() for n, w in weights(net).items()}
    RandBET(recipe.Fault(**FAULT, clip_rms=0), CrossEntropy(), seed=0).after_step(net)
    assert all(torch.equal(w, before[n]) for n, w in weights(net).items())


def wcat(net: nn.Module, steps: int, **fields: Any) -> Iterator[WCAT]:
    """Steps of plain SGD under WCAT; yields the method after each."""
    x, y = batch()
    method = WCAT(recipe.Fault(**FAULT, method="wcat", **fields), CrossEntropy(), seed=0)
    for _ in range(steps):
        net.zero_grad()
        method.loss(net, x, y, torch.Generator()).backward()
        method.after_backward(net)
        with torch.no_grad():
            for w in weights(net).values():
                w -= 0.05 * w.grad  # type: ignore[operator]
        method.after_step(net)
        yield method


def test_ranges_of_wcat_never_exceed_the_first_and_hold_every_stored_weight() -> None:
    net = int8()
    peaks = {n: w.detach().abs().amax((1, 2, 3) if w.ndim == 4 else 1) for n, w in
             weights(net).items()}  # fmt: skip
    for method in wcat(net, REFERENCE_STEPS + 15, range_lr=0.2):
        for name, layer in weight_layers(net).items():
            r = method.ranges[name]
            assert 0 < r <= 1
            if method.steps <= REFERENCE_STEPS:
                assert r == 1
            read = layer.quant_weight().value.detach().abs().flatten(1).amax(1)  # type: ignore[operator]
            assert (read <= r * peaks[name] * (1 + 1e-5)).all()
    assert max(method.ranges.values()) < 1


def test_wcat_does_not_push_ranges_when_accuracy_does_not_hold() -> None:
    """Nothing is clipped yet at ratio 1 but the maxima; without the penalty only they pull."""
    pushed = list(wcat(int8(), REFERENCE_STEPS + 1, range_lr=0.01, range_penalty=5.0))[-1]
    net, (x, y) = int8(), batch()
    method = WCAT(
        recipe.Fault(**FAULT, method="wcat", range_penalty=5.0, range_lr=0.01),
        CrossEntropy(),
        seed=0,
    )
    method.loss(net, x, y, torch.Generator()).backward()
    method.steps, method.reference, method.running = REFERENCE_STEPS + 1, 1.0, 1.5
    method.after_backward(net)
    held = dict(method.ranges)
    method.running = 1.05
    method.after_backward(net)
    assert all(method.ranges[n] == pytest.approx(2 * held[n] - 1 - 0.05, abs=0.02) for n in held)
    assert max(pushed.ranges.values()) < 1


NET = int8().eval()
"""Never changed by a test."""
CLEAN = {name: layer.quant_weight() for name, layer in weight_layers(NET).items()}  # type: ignore[operator]
