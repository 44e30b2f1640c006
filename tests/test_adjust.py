"""Stage 3: clipping is rescaling, decisions keep to their constraints, nothing is made worse."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from resq_deploy import artifacts, data, encoding, evaluate, recipe
from resq_deploy.adjust import adjust, confirm, correct_biases
from resq_deploy.adjust.bench import Bench
from resq_deploy.adjust.search import clip, groups, search
from resq_deploy.errors import InputError
from resq_deploy.nets import checkpoint
from resq_deploy.nets.posttraining import output_means
from resq_deploy.nets.quantized import codes, ranges, weight_layers


def config(**changes: object) -> recipe.Adjust:
    fields = {"epsilon": 0.05, "patterns": 4, "steps": 1, "ratios": (0.9, 0.6), "margin": 0.05}
    return recipe.Adjust(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def fault(tiny_run: Path) -> Path:
    return tiny_run / "fault/checkpoint.safetensors"


def images() -> data.Dataset:
    train = data.load("digits").train
    assert train is not None
    return train.first(64)


@pytest.mark.parametrize("ratio", [0.9, 0.5])
def test_clipping_the_weights_is_choosing_a_smaller_scale(fault: Path, ratio: float) -> None:
    """New scale = ratio * old, new code = old real value on the new grid, saturated at 127."""
    net, _ = checkpoint.load(fault)
    for layer in weight_layers(net).values():
        w = layer.weight.detach().numpy().copy()  # type: ignore[union-attr, operator]
        top = np.abs(w).max(axis=tuple(range(1, w.ndim)), keepdims=True)
        with torch.no_grad():
            layer.weight.copy_(clip(layer.weight, ratio))  # type: ignore[union-attr, operator, arg-type]
        scale = np.float32(ratio) * top / np.float32(127)
        expected = np.clip(np.rint(np.clip(w, -ratio * top, ratio * top) / scale), -127, 127)
        difference = np.abs(codes(layer).numpy() - expected)
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3  # ties of float32


def test_decisions_improve_the_objective_within_the_margin(fault: Path) -> None:
    net, _ = checkpoint.load(fault)
    bench = Bench(net, images(), config(rate=0.02), seed=0, name="search")
    start = bench.terms(net)
    decisions = search(net, bench, list(weight_layers(net)))
    assert [d["layer"] for d in decisions] == list(weight_layers(net))
    assert any(d["ratio"] < 1 for d in decisions)
    for d in decisions:
        assert d["clean_accuracy"] >= start.clean_accuracy - 0.05
        assert d["adversarial_accuracy"] >= start.adversarial_accuracy - 0.05
        if d["ratio"] < 1:
            assert d["objective_after"] < d["objective_before"]
            assert d["scale_after"] == pytest.approx(d["ratio"] * d["scale_before"], rel=1e-4)
        else:
            assert d["objective_after"] == d["objective_before"]
            assert d["scale_after"] == d["scale_before"]


def test_a_layer_is_left_alone_when_nothing_improves(fault: Path) -> None:
    """Without faults in the objective, half of every weight's range cannot help for long:
    the network ends at least as good as it began."""
    net, _ = checkpoint.load(fault)
    before = {n: codes(layer).clone() for n, layer in weight_layers(net).items()}
    bench = Bench(net, images(), config(fault_weight=0.0, ratios=(0.01,)), seed=0, name="search")
    decisions = search(net, bench, list(weight_layers(net)))
    for d in decisions:
        unchanged = torch.equal(codes(weight_layers(net)[d["layer"]]), before[d["layer"]])
        assert unchanged == (d["ratio"] == 1.0)
    assert any(d["ratio"] == 1.0 for d in decisions)


@pytest.mark.parametrize("n", [1, 3, 100])
def test_groups_of_channels_cover_every_channel_once_most_peaked_first(n: int) -> None:
    w = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    w[5, 0, 0, 0] = 50.0
    w[2] = 0.0
    found = groups(w, config(granularity="channel", channel_groups=n))
    assert sorted(torch.cat(found).tolist()) == list(range(8))
    assert len(found) == min(n, 8) and 5 in found[0] and 2 in found[-1]
    assert [g.tolist() for g in groups(w, config(channel_groups=n))] == [list(range(8))]


def test_channels_are_decided_by_themselves_and_left_alone_when_nothing_improves(
    fault: Path,
) -> None:
    net, _ = checkpoint.load(fault)
    before = {n: codes(layer).clone() for n, layer in weight_layers(net).items()}
    weights = {n: layer.weight.detach().clone() for n, layer in weight_layers(net).items()}  # type: ignore[union-attr, operator]
    options = {"granularity": "channel", "channel_groups": 2, "ratios": (0.8,), "rate": 0.05}
    bench = Bench(net, images(), config(**options), seed=0, name="search")
    *order, untouched = weight_layers(net)
    decisions = search(net, bench, order)
    assert [d["layer"] for d in decisions] == [name for name in order for _ in range(2)]
    assert {d["ratio"] for d in decisions} == {0.8, 1.0}  # one of each at least
    for d in decisions:
        here, layer = d["channels"], weight_layers(net)[d["layer"]]
        expected = clip(weights[d["layer"]][here], d["ratio"])
        assert torch.equal(layer.weight.detach()[here], expected)  # type: ignore[union-attr, operator, index]
        if d["ratio"] == 1:
            assert torch.equal(codes(layer)[here], before[d["layer"]][here])
            assert d["objective_after"] == d["objective_before"]
        else:
            assert d["objective_after"] < d["objective_before"]
            assert d["scale_after"] == pytest.approx(0.8 * d["scale_before"], rel=1e-4)
    assert torch.equal(codes(weight_layers(net)[untouched]), before[untouched])


@pytest.mark.parametrize("name", ["secded", "parity:expected"])
def test_codes_stay_levels_of_an_encoding_and_faults_are_read_through_it(
    fault: Path, name: str
) -> None:
    net, _ = checkpoint.load(fault, encoding=name)
    options = {"rate": 0.05, "fault_weight": 10.0, "margin": 0.5, "ratios": (0.7,)}
    bench = Bench(net, images(), config(**options), seed=0, name="search")
    decisions = search(net, bench, ["layer1.0.conv2", "layer3.0.conv2"])
    assert any(d["ratio"] < 1 for d in decisions)
    kind = encoding.parse(name)
    for layer in weight_layers(net).values():
        assert np.isin(codes(layer).numpy(), kind.levels).all()
    mask = torch.zeros_like(codes(weight_layers(net)["fc"]))
    mask[0, 0] = 64  # what plain codes feel: in-place SECDED corrects it
    losses = []
    for pattern in ({}, {"fc": mask}):
        bench.patterns = [pattern] * 8  # each on an eighth of the images
        losses.append(bench.fault_losses(net))
    assert np.array_equal(*losses) == (name == "secded")


def test_ranges_of_activations_are_what_their_quantizers_saturate_at(fault: Path) -> None:
    net, _ = checkpoint.load(fault)
    found = ranges(net)
    assert len(found) == 7  # ResNet-8: one behind the stem, two in each of three blocks
    for name, top in found.items():
        module = net.get_submodule(name)
        with torch.no_grad():
            top.mul_(0.5)
        out = module(torch.tensor([0.0, 1e6]))
        assert float(out.value[1]) == pytest.approx(float(top)) and float(out.value[0]) == 0


def test_activations_are_searched_after_the_weights(fault: Path) -> None:
    net, _ = checkpoint.load(fault)
    before = {name: float(top) for name, top in ranges(net).items()}
    options = {"activations": True, "ratios": (0.8,), "rate": 0.02}
    bench = Bench(net, images(), config(**options), seed=0, name="search")
    decisions = search(net, bench, ["fc"])
    assert [d["layer"] for d in decisions] == ["fc", *before]
    for d in decisions[1:]:
        top = float(ranges(net)[d["layer"]])
        assert top == pytest.approx(d["ratio"] * before[d["layer"]])
        assert d["scale_after"] == pytest.approx(top / 255)
        assert (d["objective_after"] < d["objective_before"]) == (d["ratio"] < 1)


def test_bias_correction_restores_the_mean_outputs(fault: Path) -> None:
    reference, _ = checkpoint.load(fault)
    net = copy.deepcopy(reference)
    with torch.no_grad():
        for layer in weight_layers(net).values():
            layer.weight.copy_(clip(layer.weight, 0.5))  # type: ignore[union-attr, operator, arg-type]
    x = evaluate.tensor(images().x)
    target = output_means(reference, x)
    off = output_means(net, x)
    correct_biases(net, reference, images())
    after = output_means(net, x)
    for name in target:
        error, was = (
            (after[name] - target[name]).abs().max(),
            (off[name] - target[name]).abs().max(),
        )
        assert error < 0.05 * was + 1e-6, name


def test_worse_on_unseen_patterns_means_reverted(fault: Path) -> None:
    reference, _ = checkpoint.load(fault)
    net = copy.deepcopy(reference)
    with torch.no_grad():
        for layer in weight_layers(net).values():
            layer.weight.copy_(clip(layer.weight, 0.05))  # type: ignore[union-attr, operator, arg-type]
    kept, facts = confirm(net, reference, images(), config(), seed=0)
    assert kept is reference and facts["kept"] is False
    assert facts["after"]["objective"] > facts["before"]["objective"]


def test_equal_on_unseen_patterns_means_left_alone(fault: Path) -> None:
    reference, _ = checkpoint.load(fault)
    kept, facts = confirm(copy.deepcopy(reference), reference, images(), config(), seed=0)
    assert kept is reference and facts["change"]["value"] == 0


def test_clearly_better_on_unseen_patterns_is_kept(fault: Path) -> None:
    """The reference has lost its classifier; the candidate is whole."""
    net, _ = checkpoint.load(fault)
    reference = copy.deepcopy(net)
    with torch.no_grad():
        weight_layers(reference)["fc"].weight.mul_(-1)  # type: ignore[union-attr, operator]
    kept, facts = confirm(net, reference, images(), config(), seed=0)
    assert kept is net and facts["change"]["high"] < 0


def test_the_artefact_records_codes_before_and_after(tiny_run: Path) -> None:
    facts = artifacts.read_json(tiny_run / "adjust/checkpoint.json")
    before, _ = checkpoint.load(tiny_run / "fault/checkpoint.safetensors")
    after, _ = checkpoint.load(tiny_run / "adjust/checkpoint.safetensors")
    for name, layer in weight_layers(before).items():
        for key, net in (("before", before), ("after", after)):
            stored = codes(weight_layers(net)[name]).numpy().astype(int).ravel() + 128
            assert facts["codes"][name][key] == np.bincount(stored, minlength=256).tolist()
        assert sum(facts["codes"][name]["before"]) == layer.weight.numel()  # type: ignore[union-attr, operator]


def test_too_few_images_are_refused(fault: Path, tmp_path: Path) -> None:
    """Half of them decide, and every pattern sees an eighth of these."""
    with pytest.raises(InputError, match="15 calibration images given; stage 3 needs 16 or more"):
        adjust(fault, out=tmp_path, images=images().first(15), config=config())
    few = images().first(16)
    adjust(fault, out=tmp_path, images=few, config=config(patterns=8, ratios=(0.9,)))


def test_float_checkpoint_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    source = tiny_run / "float/checkpoint.safetensors"
    with pytest.raises(InputError, match="is a float checkpoint; stage 3 needs an int8 one"):
        adjust(source, out=tmp_path, images=images(), config=config())
