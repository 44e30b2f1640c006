"""The reload engine: change the initializer, serialize, build a session, run.

Slow and obviously right: it is the definition that faster engines are tested against.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from resq_deploy import bits, runtime
from resq_deploy.inject.space import Flat, Space


class Reload:
    """Outputs of a model whose stored weights have been corrupted."""

    def __init__(
        self, model: onnx.ModelProto, space: Space, x: NDArray[Any], *, precise: bool | None = None
    ) -> None:
        """`model` and `space` from `space.discover`; images `x` (N, ...) as a data set has them.

        `precise` as in `runtime.session`.
        """
        self._model = model
        self._space = space
        self._precise = precise
        self._x = x
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def run(self, flips: Flat) -> NDArray[Any]:
        """First output (N, ...) with the bits `flips` (flat indices) inverted.

        The model is as before afterwards, whatever happens.
        """
        originals: dict[str, bytes] = {}
        try:
            for index, (offsets, positions) in self._space.split(flips).items():
                tensor = self._space.tensors[index]
                stored = self._tensors[tensor.name]
                originals[tensor.name] = stored.raw_data
                codes = np.frombuffer(stored.raw_data, tensor.dtype)
                stored.raw_data = bits.flip_sites(codes, offsets, positions).tobytes()
            session = runtime.session(self._model.SerializeToString(), precise=self._precise)
            return runtime.run(session, runtime.adapt(self._x, session))
        finally:
            for name, raw in originals.items():
                self._tensors[name].raw_data = raw
