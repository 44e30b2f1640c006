"""The fast engine: never recompute what a fault cannot reach, and change no bit of the result.

The network runs once without faults, and its values between the kernels are kept. A fault then
runs only the units behind it (`inject.graph`), only on the images whose values really changed, and
where a unit is an integer layer only the sums that changed (`inject.kernels`). What cannot be done
that way is done by the reload engine, which is the definition; `Network.reloaded` says what and
why.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy import runtime
from resq_deploy.inject import kernels
from resq_deploy.inject.changed import NO_CHANGE, Bytes, Changed, Images, Output
from resq_deploy.inject.graph import Unit
from resq_deploy.inject.layers import Layer
from resq_deploy.inject.memory import Change, Flips
from resq_deploy.inject.network import Kept, Network, Pace, as_bytes

Array = NDArray[Any]

FEW = 32
"""Changed elements up to which a layer is updated tap by tap; more and the layer runs densely."""

MANY, WHOLE = 8, 0.7
"""More changed elements than this, with more than this part of the network behind the first one:
the network is run as a whole."""

PLANES = 1024
"""Channels that go through a pooling unit in one call."""

NO_TAPS = np.empty((0, 4), np.int64)
NO_DELTA = np.empty(0, np.int64)


class Fast:
    """Outputs of a prepared model under changes, for the images of one golden run."""

    def __init__(self, network: Network, kept: Kept, x: Array) -> None:
        """`x` are the images of `kept`, as the data set has them."""
        self._network = network
        self._kept = kept
        self._images = x
        self._all = np.arange(kept.n)
        self._bytes = {name: as_bytes(value) for name, value in kept.values.items()}
        self._outputs: dict[str, Output] = {}

    def run(self, change: Change) -> Array:
        """First output (N, ...) where the elements of `change` are read with other values."""
        images, rows = self.changed(change)
        output = self._kept.output.copy()
        output[images] = rows
        return output

    def changed(self, change: Change) -> tuple[Images, Array]:
        """Numbers of the images whose output may differ from the golden one, and their outputs.

        Refused when onnxruntime does not load or run the file with this change.
        """
        output, network = self._kept.output, self._network
        if not network.in_place(change):
            return np.arange(len(output)), network.reload(self._images).run(change)
        change = network.read(change)
        if not change:
            return np.empty(0, np.int64), output[:0]
        n_elements = sum(len(offsets) for offsets, _ in change.values())
        if not self._kept.values or (n_elements > MANY and network.share_behind(change) > WHOLE):
            return np.arange(len(output)), network.whole(change, self._x)
        changed = self._propagate(change)
        if changed is None:
            return np.empty(0, np.int64), output[:0]
        images = changed.images
        real = images < len(output)  # the others only fill up a fixed batch
        images = images[real]
        rows = self._materialized(network.cut.output, images, changed, self._slot(changed))
        return images, rows.view(output.dtype).reshape(len(images), *output.shape[1:])

    @cached_property
    def _x(self) -> Array:
        return runtime.adapt(self._images, self._network.session)

    def _propagate(self, change: Change) -> Changed | None:
        """Run the units behind a change in their order, each on the images that changed so far."""
        passed: list[tuple[Pace, int, float]] = []
        output = self._behind(change, passed)
        for pace, images, start in passed:
            pace.add(images, time.thread_time() - start)
        return output

    def _behind(self, change: Change, passed: list[tuple[Pace, int, float]]) -> Changed | None:
        """`_propagate`, which notes where it could have run the rest in one, and when."""
        network = self._network
        changed: dict[str, Changed] = {}
        flips = {name: entry for name, entry in change.items() if isinstance(entry, Flips)}
        struck = network.last_struck(change)
        for name in flips.keys() - network.made:  # nothing can change it before
            changed[name] = self._flipped(name, flips[name], NO_CHANGE)
        for index in network.active:
            if index > struck and not changed:
                break
            if index > struck and index in network.ends:
                pace, images = self._pace(index, changed)
                end = network.end(index, self._kept)
                if end is not None and pace.slower(network.seconds_behind(index)):
                    return self._ended(end, changed)
                passed.append((pace, images, time.thread_time()))
            unit = network.cut.units[index]
            faulty = {name: change[name] for name in change.keys() & unit.initializers}
            inputs = {name: changed[name] for name in unit.inputs if name in changed}
            outputs = self._unit(index, inputs, faulty) if faulty or inputs else {}
            for name in unit.outputs:
                new = outputs.get(name, NO_CHANGE)
                if name in flips:
                    new = self._flipped(name, flips[name], new)
                if len(new.images):
                    changed[name] = new
            for name in unit.inputs:
                if network.last_use[name] == index:
                    changed.pop(name, None)
        return changed.get(network.cut.output)

    def _pace(self, index: int, changed: Mapping[str, Changed]) -> tuple[Pace, int]:
        """What is known about going on from unit `index`, and how many images would."""
        images = len(self._union(changed))
        entries = sum(len(new.places) + new.rows.size for new in changed.values())
        return self._network.pace(index, entries // images), images

    def _ended(self, end: Unit, changed: Mapping[str, Changed]) -> Changed:
        """What the rest of the network, run in one, makes of all that has changed."""
        (name,) = end.outputs
        output = self._output(name)
        self._dense(end, changed, {}, self._union(changed), {name: output})
        return output.changed()

    def _unit(self, index: int, inputs: dict[str, Changed], faulty: Change) -> dict[str, Changed]:
        """The outputs of one unit that change, given its changed inputs and initializers."""
        network = self._network
        unit = network.cut.units[index]
        outputs = {name: self._output(name) for name in unit.outputs}
        measured = index in self._kept.sums and index in network.limits
        layer = network.layers[index] if measured else None
        n_taps = sum(len(offsets) for offsets, _ in faulty.values())
        if layer and network.group is None and faulty.keys() <= {layer.weight} and n_taps <= FEW:
            self._layer(index, layer, inputs, faulty, outputs[unit.outputs[0]])
        elif index in network.tables and not faulty:
            self._elementwise(index, inputs, outputs[unit.outputs[0]])
        elif index in network.pools:
            self._pool(index, inputs, outputs[unit.outputs[0]])
        else:
            images = self._all if faulty else self._union(inputs)
            self._dense(unit, inputs, faulty, images, outputs)
        return {name: output.changed() for name, output in outputs.items()}

    def _flipped(self, name: str, flips: Flips, new: Changed) -> Changed:
        """The changes of a value whose bits flip in all images after the changes `new`."""
        images, kept = self._all, self._bytes[name]
        n, size = len(flips.offsets), kept.shape[1]
        if not len(new.images) and n < size // 5:  # lists that take no more room than rows
            return Changed(
                listed=images,
                first=np.arange(len(images) + 1) * n,
                places=np.tile(flips.offsets.astype(np.int32), len(images)),
                codes=(kept[:, flips.offsets] ^ flips.masks).reshape(-1),
                whole=NO_CHANGE.whole,
                rows=NO_CHANGE.rows,
            )
        rows = self._materialized(name, images, new, self._slot(new)) if len(new.images) else kept
        rows = np.array(rows)
        rows[:, flips.offsets] ^= flips.masks
        output = self._output(name)
        room, found = output.room(len(images))
        output.n_whole += kernels.differing(kept, images, rows, room, found)
        return output.changed()

    def _output(self, name: str) -> Output:
        if name not in self._outputs:
            self._outputs[name] = Output(self._kept.n, self._bytes[name].shape[1])
        self._outputs[name].clear()
        return self._outputs[name]

    def _union(self, inputs: Mapping[str, Changed]) -> Images:
        """Images of any changed input; whole groups where images only run together."""
        parts, group = [changed.images for changed in inputs.values()], self._network.group
        if group is None and len(parts) == 1:
            return parts[0]
        images = np.unique(np.concatenate(parts))
        if group is None:
            return images
        first = np.unique(images // group) * group
        whole = (first[:, None] + np.arange(group)).reshape(-1)
        return whole[whole < self._kept.n]

    def _slot(self, changed: Changed) -> Images:
        """(N,) for every image its place in `changed.images`, or -1."""
        slot = np.full(self._kept.n, -1)
        slot[changed.images] = np.arange(len(changed.images))
        return slot

    def _materialized(self, name: str, images: Images, changed: Changed, slot: Images) -> Bytes:
        """(K, bytes) a value as some images have it: new where it changed, else the kept one."""
        n_listed, at = len(changed.listed), slot[images]
        if len(at) and at[0] >= n_listed and (np.diff(at) == 1).all():
            return changed.rows[at[0] - n_listed : at[-1] - n_listed + 1]
        rows = np.empty((len(images), self._bytes[name].shape[1]), np.uint8)
        kernels.materialize(
            self._bytes[name], images, at, n_listed, changed.first, changed.places, changed.codes,
            changed.rows, rows,
        )  # fmt: skip
        return rows

    def _dense(
        self, unit: Unit, inputs: Mapping[str, Changed], faulty: Change, images: Images,
        outputs: Mapping[str, Output],
    ) -> None:  # fmt: skip
        """Run a unit on some images with onnxruntime; what comes out unchanged is dropped."""
        network, kept = self._network, self._kept
        session = network.runner.session(unit, network.faulty(faulty))
        slots = {name: self._slot(changed) for name, changed in inputs.items()}
        for start in range(0, len(images), step := network.group or runtime.CHUNK):
            part = images[start : start + step]
            feeds = [
                self._materialized(name, part, inputs[name], slots[name])
                .view(kept.values[name].dtype)
                .reshape(len(part), *kept.values[name].shape[1:])
                if name in inputs
                else kept.values[name][part]
                for name in unit.inputs
            ]
            results = network.runner.run(session, unit, feeds)
            for name, new in zip(unit.outputs, results, strict=True):
                rows, found = outputs[name].room(len(part))
                outputs[name].n_whole += kernels.differing(
                    self._bytes[name], part, as_bytes(new), rows, found
                )

    def _elementwise(self, index: int, inputs: Mapping[str, Changed], output: Output) -> None:
        """Look changed codes up in the table of an elementwise unit."""
        network = self._network
        unit = network.cut.units[index]
        table, linear = network.tables[index]
        images, y = self._union(inputs), self._bytes[unit.outputs[0]]
        names = (unit.inputs[0], unit.inputs[-1])
        sides = [inputs.get(name, NO_CHANGE) for name in names]
        slots = [self._slot(side) for side in sides]
        whole = np.zeros(len(images), np.bool_)  # an operand is a whole row
        for side, slot in zip(sides, slots, strict=True):
            whole |= slot[images] >= len(side.listed)
        lists, k = images[~whole], 0
        operands: list[Any] = [
            operand
            for name, side, slot in zip(names, sides, slots, strict=True)
            for operand in (self._bytes[name], slot[lists], side.first, side.places, side.codes)
        ]
        while True:
            k, output.n_listed, output.n_entries = kernels.elementwise_lists(
                lists, k, *operands, table, y, *output.lists
            )
            if k == len(lists) or not output.grow():
                break
        images = np.concatenate([images[whole], lists[k:]])
        values: list[Any] = [
            operand
            for name, side, slot in zip(names, sides, slots, strict=True)
            for operand in (
                self._bytes[name], slot[images], len(side.listed), side.first, side.places,
                side.codes, side.rows.reshape(-1, y.shape[1]),
            )
        ]  # fmt: skip
        rows, found = output.room(len(images))
        output.n_whole += kernels.elementwise_rows(images, *values, table, linear, y, rows, found)

    def _pool(self, index: int, inputs: Mapping[str, Changed], output: Output) -> None:
        """Run a unit that makes one code of each channel on the channels that changed."""
        network = self._network
        unit, last_axis = network.cut.units[index], network.pools[index]
        (name,), (target,) = unit.inputs, unit.outputs
        new, value = inputs[name], network.cut.values[name]
        x, y, dtype = self._bytes[name], self._bytes[target], self._kept.values[name].dtype
        channels = y.shape[1]
        shape = (*value.tail[:-1], 1) if last_axis else (1, *value.tail[1:])
        planes = np.empty((PLANES + channels, x.shape[1] // channels), np.uint8)
        numbers, which = (np.empty(len(planes), np.int64) for _ in range(2))
        seen, k = np.empty(channels, np.int64), 0
        session = network.runner.session(unit)
        whole = [new.whole]
        while k < len(new.listed):
            begin = k
            k, m = kernels.changed_channels(
                new.listed, k, x, new.first, new.places, new.codes, channels, last_axis, seen,
                numbers, which, planes,
            )  # fmt: skip
            while (full := output.n_entries + m > output.capacity) and output.grow():
                pass
            if full:
                whole.append(new.listed[begin:])
                break
            feed = planes[:m].view(dtype).reshape(m, *shape)
            codes = as_bytes(session.run(unit.outputs, {name: feed})[0]).reshape(-1)
            output.n_listed, output.n_entries = kernels.list_channels(
                new.listed, numbers[:m], which[:m], codes, y, *output.lists
            )
        images = np.concatenate(whole)
        if len(images):
            self._dense(unit, inputs, {}, images, {target: output})

    def _layer(
        self, index: int, layer: Layer, inputs: dict[str, Changed], faulty: Change, output: Output
    ) -> None:
        """Update an integer layer from its kept sums; images that changed too much run densely."""
        network = self._network
        unit = network.cut.units[index]
        (source,), (name,) = unit.inputs, unit.outputs
        taps, delta = self._taps(layer, faulty)
        x, y = layer.x(self._kept.values[source]), layer.y(self._kept.values[name])
        acc, g = self._kept.sums[index], layer.geometry
        new = inputs.get(source, NO_CHANGE)
        rows = new.rows.reshape(-1, *layer.x_shape)
        dense = np.empty(len(new.images), np.int64)
        n_dense = k = 0
        rest = np.empty(0, np.int64)
        if faulty:
            rest = np.delete(self._all, new.images) if len(new.images) else self._all
            kept, o = self._kept, taps[0, 0]
            while True:
                k, output.n_listed, output.n_entries = (
                    kernels.faulty_channel(
                        rest, k, kept.inputs_by_channel[index], kept.sums_by_channel[index][o],
                        o, acc.shape[3], layer.scale[o], g, taps, delta, *output.lists
                    )
                    if index in kept.sums_by_channel and (taps[:, 0] == o).all()
                    else kernels.faulty_weights(
                        rest, k, x, acc, y, layer.scale, g, taps, delta, *output.lists
                    )
                )  # fmt: skip
                if k == len(rest) or not output.grow():
                    break
            rest, k = rest[k:], 0
        weights = layer.patched(taps, delta) if faulty and len(new.images) else layer.weights
        while len(new.images):
            k, n_dense, output.n_listed, output.n_entries = kernels.changed_inputs(
                new.images, k, new.first, new.places, new.codes, rows, x, acc, y, weights,
                layer.shift, layer.scale, g, taps, delta, network.limits[index], n_dense, dense,
                *output.lists,
            )  # fmt: skip
            if k == len(new.images) or not output.grow():
                break
        left = new.images[k:] if len(new.images) else new.images
        images = np.concatenate([rest, new.images[dense[:n_dense]], left])
        if len(images):
            self._dense(unit, inputs, faulty, images, {name: output})

    def _taps(self, layer: Layer, faulty: Change) -> tuple[Images, Images]:
        """Changed weights of a layer as `kernels` takes them."""
        if not faulty:
            return NO_TAPS, NO_DELTA
        offsets, values = faulty[layer.weight]
        taps = layer.taps(offsets)
        order = np.argsort(taps[:, 0], kind="stable")
        delta = values.astype(np.int64) - layer.codes.reshape(-1)[offsets].astype(np.int64)
        return np.ascontiguousarray(taps[order]), delta[order]
