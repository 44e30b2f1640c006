"""Runs in the environment of hls4ml: run_hls4ml.py MODEL.qonnx.onnx IMAGES.npy OUT.npy PROJECT

Makes a project of the file for the profile po2-tensor, compiles its C++ model and runs it. IMAGES:
uint8 (N, C, H, W); OUT: logits (N, n_classes); PROJECT: a folder that is written.
"""

import sys

import hls4ml
import numpy as np
from onnx import helper
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
from qonnx.transformation.gemm_to_matmul import GemmToMatMul
from qonnx.util.cleanup import cleanup_model

CHANNELS_LAST = "qonnx.custom_op.channels_last"
PIXELS = "ufixed<8,0>"


def pool_channels_last(model):
    """Let the global average read its input as the rest of the network has it, (N, H, W, C).

    qonnx has no such operator and leaves a transposition in front of it, behind which hls4ml's code
    divides by zero (docs/clients.md). It does have an average over windows: one as large as the
    image. Returns the exact type of its result, by the name of the node.
    """
    types = {}
    for pool in [n for n in model.graph.node if n.op_type == "GlobalAveragePool"]:
        transposed = model.find_producer(pool.input[0])
        (source,) = transposed.input
        _, *window, channels = model.get_tensor_shape(source)
        scale, _, bits = (model.get_initializer(i) for i in model.find_producer(source).input[1:])
        whole = int(bits + np.log2(scale))
        types[pool.name] = f"ufixed<{int(bits + np.log2(np.prod(window)))},{whole}>"
        new = helper.make_node(
            "AveragePool", [source], list(pool.output), pool.name, domain=CHANNELS_LAST,
            kernel_shape=window, strides=window, pads=[0] * 4,
        )  # fmt: skip
        model.graph.node.insert(list(model.graph.node).index(pool), new)
        model.graph.node.remove(transposed)
        model.graph.node.remove(pool)
        model.set_tensor_shape(new.output[0], [1, 1, 1, channels])
    return types


def holding(values):
    """The ap_fixed type that holds all values exactly."""
    values, fraction = values.astype(np.float64), 0
    while (values * 2**fraction % 1).any():
        fraction += 1
    whole = int(np.ceil(np.log2(np.abs(values).max() + 1))) + 1
    return f"fixed<{whole + fraction},{whole}>"


def convert(path, project):
    """The hls4ml model of a QONNX file, channels last.

    hls4ml takes the type behind a quantizer from it, and infers sums that do not overflow. What
    has no quantizer is given its type here: biases get the default, which would cut off bits; an
    average would be cut off to the type of what it averages.
    """
    model = ModelWrapper(path)
    model = model.transform(ConvertToChannelsLastAndClean(make_input_channels_last=True))
    model = cleanup_model(model.transform(GemmToMatMul()))
    averages = pool_channels_last(model)
    added = [n.input[-1] for n in model.graph.node if n.op_type in ("Conv", "Add")]
    biases = [b.ravel() for b in map(model.get_initializer, added) if b is not None]
    config = hls4ml.utils.config_from_onnx_model(
        model,
        granularity="name",
        backend="Vitis",
        default_precision=holding(np.concatenate(biases)),
    )
    config["Model"]["Strategy"] = "Resource"
    for name, kind in {**averages, model.graph.input[0].name: PIXELS}.items():
        config["LayerName"][name]["Precision"]["result"] = kind
    return hls4ml.converters.convert_from_onnx_model(
        model, output_dir=project, io_type="io_stream", backend="Vitis", hls_config=config
    )


path, images, out, project = sys.argv[1:]
net = convert(path, project)
net.compile()
byte = np.load(images).transpose(0, 2, 3, 1).astype(np.int64)
codes = np.minimum(byte + (byte >> 7), 255)  # of scale 1/256: models/README.md, model.profile
logits = net.predict(np.ascontiguousarray(codes / 256, np.float32))
np.save(out, logits.reshape(len(codes), -1))
