"""Runs in the environment of LiteRT: run_litert.py MODEL.tflite IMAGES.npy OUT.npy KERNELS

IMAGES: uint8 (N, C, H, W); OUT: logits (N, n_classes); KERNELS: name of an OpResolverType.
"""

import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

model, images, out, kernels = sys.argv[1:]
kind = getattr(OpResolverType, kernels)
net = Interpreter(model, num_threads=1, experimental_op_resolver_type=kind)
net.allocate_tensors()
(source,), (sink,) = net.get_input_details(), net.get_output_details()
scale, zero = sink["quantization"]
logits = []
for image in np.load(images).transpose(0, 2, 3, 1):
    net.set_tensor(source["index"], (image[None].astype(np.int16) - 128).astype(np.int8))
    net.invoke()
    logits.append(scale * (net.get_tensor(sink["index"])[0].astype(np.int64) - zero))
np.save(out, np.array(logits))
