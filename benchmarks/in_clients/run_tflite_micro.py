"""Runs in the environment of TFLite Micro: run_tflite_micro.py MODEL.tflite IMAGES.npy OUT.npy

IMAGES: uint8 (N, C, H, W); OUT: logits (N, n_classes).
"""

import sys

import numpy as np
from tflite_micro import runtime

model, images, out = sys.argv[1:]
net = runtime.Interpreter.from_file(model)
(scale,), (zero,) = (
    net.get_output_details(0)["quantization_parameters"][k] for k in ("scales", "zero_points")
)
logits = []
for image in np.load(images).transpose(0, 2, 3, 1):
    net.set_input((image[None].astype(np.int16) - 128).astype(np.int8), 0)
    net.invoke()
    logits.append(scale * (net.get_output(0)[0].astype(np.int64) - zero))
np.save(out, np.array(logits))
