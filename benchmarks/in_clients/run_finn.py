"""Runs in the environment of FINN+: run_finn.py MODEL.qonnx.onnx IMAGES.npy OUT.npy

The front end: QONNX to FINN's own operators, where every quantizer is a MultiThreshold, then
streamlining, which moves scales through the graph and absorbs them. What it made runs in qonnx's
executor, as FINN itself verifies these steps. IMAGES: uint8 (N, C, H, W); OUT: logits
(N, n_classes). Prints the number of operators of each kind as JSON.
"""

import json
import sys
from collections import Counter

import finn.transformation.streamline.absorb as absorb
import numpy as np
from finn.transformation.qonnx.convert_qonnx_to_finn import ConvertQONNXtoFINN
from finn.transformation.streamline import Streamline
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.fold_constants import FoldConstants
from qonnx.transformation.infer_datatypes import InferDataTypes
from qonnx.transformation.infer_shapes import InferShapes
from qonnx.util.cleanup import cleanup_model

model, images, out = sys.argv[1:]
net = cleanup_model(ModelWrapper(model))
for step in (
    ConvertQONNXtoFINN(), InferShapes(), FoldConstants(), InferDataTypes(),
    absorb.AbsorbScalarBiasIntoMultiThreshold(), Streamline(),
):  # fmt: skip
    net = net.transform(step)
source, sink = net.graph.input[0].name, net.graph.output[0].name
pixels = np.load(images).astype(np.float32) / 255
np.save(out, np.concatenate([execute_onnx(net, {source: x[None]})[sink] for x in pixels]))
print(json.dumps(Counter(node.op_type for node in net.graph.node)))
