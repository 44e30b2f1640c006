"""Every network: folds, quantizes, keeps its names, survives a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from resq_deploy import artifacts, quantize
from resq_deploy.errors import InputError
from resq_deploy.nets import NETS, build, checkpoint
from resq_deploy.nets.quantized import (
    QuantAdd,
    calibrate,
    codes,
    fold,
    value,
    weight_layers,
)
from resq_deploy.nets.quantized import quantize as to_int8

X = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained_like(name: str) -> nn.Module:
    """A float network whose batch norms do something."""
    net = build(name, n_classes=7, in_channels=3, seed=1)
    generator = torch.Generator().manual_seed(2)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return net.eval()


@pytest.mark.parametrize("name", sorted(NETS))
class TestNet:
    def test_folding_keeps_the_function(self, name: str) -> None:
        net = trained_like(name)
        folded = fold(net)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        torch.testing.assert_close(folded(X), net(X), rtol=1e-4, atol=1e-5)

    def test_quantized_network_is_close_and_keeps_weight_names(self, name: str) -> None:
        net = trained_like(name)
        int8 = to_int8(net)
        calibrate(int8, X)
        expected = {n for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        assert set(weight_layers(int8)) == expected
        error = (value(int8(X)) - net(X)).abs().max() / net(X).abs().max()
        assert error < 0.1

    def test_codes_are_those_of_quantize(self, name: str) -> None:
        """Brevitas' integer weights equal our definition, code by code."""
        for layer in weight_layers(to_int8(trained_like(name))).values():
            w = layer.weight.detach().numpy()  # type: ignore[union-attr, operator]
            expected = quantize.quantize(w, quantize.weight_scale(w), axis=0)
            assert (codes(layer).numpy() == expected).all()

    def test_every_addition_has_two_quantized_inputs(self, name: str) -> None:
        int8 = to_int8(trained_like(name))
        additions = [m for m in int8.modules() if isinstance(m, QuantAdd)]
        assert len(additions) == (3 if name == "resnet8" else 9)
        assert sum(a.skip is not None for a in additions) == 2  # the two that change the shape

    def test_checkpoint_restores_the_outputs_bit_for_bit(self, name: str, tmp_path: Path) -> None:
        int8 = to_int8(trained_like(name))
        calibrate(int8, X)
        facts = {"net": {"name": name, "n_classes": 7, "in_channels": 3}, "quantized": True}
        path = tmp_path / "checkpoint.safetensors"
        checkpoint.save(path, int8, inputs={"a": 1}, **facts)
        loaded, _ = checkpoint.load(path)
        assert torch.equal(value(loaded(X)), value(int8.eval()(X)))
        assert artifacts.is_current(path, {"a": 1}) and not artifacts.is_current(path, {"a": 2})


def test_mlperf_tiny_shape() -> None:
    """ResNet-8 of MLPerf Tiny: 77,360 weights, of which 10 x 64 in the classifier."""
    net = build("resnet8", n_classes=10, in_channels=3)
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sum(m.weight.numel() for m in layers) == 77_360


def test_input_scale_is_exactly_one_pixel_step() -> None:
    int8 = to_int8(trained_like("resnet8"))
    calibrate(int8, X)
    pixels = torch.arange(256).float().reshape(1, 1, 16, 16) / 255
    with torch.no_grad():
        quantized = int8.get_submodule("input")(pixels)
    assert torch.equal(torch.round(quantized.value * 255), torch.round(pixels * 255))
    assert float(quantized.scale) == pytest.approx(1 / 255, rel=1e-7)


def test_unknown_net_is_named() -> None:
    with pytest.raises(InputError, match="'resnet9' is unknown; expected one of .*resnet20"):
        build("resnet9", n_classes=10, in_channels=3)


def test_batch_norm_without_convolution_is_refused() -> None:
    with pytest.raises(InputError, match="does not follow a convolution"):
        fold(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.bias"), "'fc.bias' is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "'extra' does not belong"),
        (lambda t: t.update({"fc.bias": torch.zeros(3)}), r"shape \(3,\), the network needs"),
        (lambda t: t["fc.bias"].fill_(float("nan")), "NaN or infinite"),
    ],
    ids=["missing", "surplus", "shape", "nan"],
)
def test_tensors_that_do_not_fit_are_named(change: object, message: str) -> None:
    net = build("resnet8", n_classes=10, in_channels=3)
    tensors = {k: v.clone() for k, v in net.state_dict().items()}
    change(tensors)  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        checkpoint.load_state(net, tensors, "file")


def test_changed_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    net = build("resnet8", n_classes=10, in_channels=3)
    facts = {"net": {"name": "resnet8", "n_classes": 10, "in_channels": 3}, "quantized": False}
    checkpoint.save(path, net, inputs={}, **facts)
    other = build("resnet8", n_classes=10, in_channels=3, seed=9)
    checkpoint.write_tensors(path, other.state_dict())
    with pytest.raises(InputError, match="is not the file that checkpoint.json describes"):
        checkpoint.load(path)


def test_checkpoint_without_sidecar_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no sidecar checkpoint.json beside it"):
        checkpoint.load(tmp_path / "checkpoint.safetensors")


def test_pickle_is_never_opened(tmp_path: Path) -> None:
    """A torch.save file with another ending is refused, not executed."""
    path = tmp_path / "checkpoint.safetensors"
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        checkpoint.read_tensors(path)
