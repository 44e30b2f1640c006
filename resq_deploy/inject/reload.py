"""The reload engine: change the initializer, serialize, build a session, run.

Flips between kernels stand as nodes in the optimized graph of the changed file, which then runs as
it is. Slow and obviously right: it is the definition that faster engines are tested against.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from resq_deploy import runtime
from resq_deploy.inject import activations, memory
from resq_deploy.inject.memory import Change, Flips
from resq_deploy.inject.space import Space


class Reload:
    """Outputs of a model of which some stored elements are read differently."""

    def __init__(
        self, model: onnx.ModelProto, space: Space, x: NDArray[Any], *, precise: bool | None = None
    ) -> None:
        """`model` and `space` from `discovery.discover`; images `x` (N, ...) as the data set's.

        `precise` as in `runtime.session`.
        """
        self._model = model
        self._space = {tensor.name: tensor for tensor in space.tensors}
        self._precise = precise
        self._x = x
        self._adapted: NDArray[Any] | None = None
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def changed(self, change: Change) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Numbers of the images whose output may differ, all of them, and their outputs."""
        output = self.run(change)
        return np.arange(len(output)), output

    def run(self, change: Change) -> NDArray[Any]:
        """First output (N, ...) where the elements of `change` are read with other values.

        Flips strike the run of every image once, at the same place. Refused when onnxruntime does
        not load or run the file with the change. The model is as before afterwards, whatever
        happens.
        """
        originals: dict[str, bytes] = {}
        flips = {name: entry for name, entry in change.items() if isinstance(entry, Flips)}
        try:
            for name, (offsets, values) in change.items():
                if name not in flips:
                    stored = self._tensors[name]
                    originals[name] = stored.raw_data
                    memory.write(stored, self._space[name].dtype, offsets, values)
            model, level = self._model.SerializeToString(), "all"
            if flips:
                model, level = self._struck(model, flips), "off"
            session = runtime.session(model, level=level, precise=self._precise)
            if self._adapted is None:
                self._adapted = runtime.adapt(self._x, session)
            return runtime.run(session, self._adapted)
        finally:
            for name, raw in originals.items():
                self._tensors[name].raw_data = raw

    def _struck(self, model: bytes, flips: dict[str, Flips]) -> bytes:
        best = runtime.optimized(model, precise=self._precise)
        masks = {name: entry.dense(self._space[name]) for name, entry in flips.items()}
        return bytes(activations.strike(best, masks).SerializeToString())
