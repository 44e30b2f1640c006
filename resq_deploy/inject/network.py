"""A model prepared for the fast engine: its units, what is kept of them, and which ways are exact.

Everything is tried on some images first: what is not equal bit for bit to a session of the file is
not used, and `Network.reloaded` says what is then left to the reload engine, and why.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from resq_deploy import bits, runtime
from resq_deploy.errors import InputError
from resq_deploy.inject import activations, graph, kernels, layers, memory
from resq_deploy.inject.changed import Bytes, Images
from resq_deploy.inject.decoders import Reader
from resq_deploy.inject.discovery import Discovery
from resq_deploy.inject.graph import Cut, Runner, Unit
from resq_deploy.inject.layers import Layer
from resq_deploy.inject.memory import Change, Flips
from resq_deploy.inject.reload import Reload
from resq_deploy.inject.space import ACTIVATION

Array = NDArray[Any]

IN_PLACE = ("weight", "bias")
"""Targets whose values do not steer how onnxruntime optimizes a graph. The others (scales, zero
points, float weights, which it fuses and reorders) do, so that a graph optimized without the fault
is no longer the one that runs."""

BYTE_NS, POSITION_NS, CODE_NS, RATE = 0.3, 35.0, 0.7, 42.0
"""Costs on one machine: nanoseconds per byte that goes in and out of a dense run; in the kernel
`changed_inputs` per output position and per code of it, and multiplications per nanosecond. They
choose between two ways to the same result."""

POSITION_MACS = 2**16
"""Where the layers behind one multiply less than this for each of its output positions, it is worth
having copies of it that lie channel by channel: without them, a position costs as much as some
2000 multiplications."""

NEXT_END = 0.75
"""From one place to the next where the rest of the network can be run in one go, its share of the
run time falls to this part or less: few places, and no more than this lost by waiting for one."""

PROOFS = 3
"""Faults that are compared with the reload engine before the fast one is used on a model."""

CALIBRATION = 50
"""Images with which the dense way is timed."""

ELEMENTWISE = {
    "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "DequantizeLinear",
    "QuantizeLinear", "Add", "Sub", "Mul", "Relu", "Clip", "Sigmoid", "LeakyRelu",
}  # fmt: skip

Allocate = Callable[[tuple[int, ...], Any], Array]


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of the golden run of some images; arrays may be shared between processes."""

    n: int
    """Images; more than were given where a fixed batch had to be filled up."""
    output: Array
    """(N, ...) what the model answers."""
    values: Mapping[str, Array]
    """(N, rows, ...) of the values that a fault can change or that are read beside them; none
    where the model is reloaded."""
    sums: Mapping[int, NDArray[np.int32]]
    """(N, P, Q, O) accumulators of the integer layers, by unit."""
    inputs_by_channel: Mapping[int, Bytes]
    """(C, N, H, W) bytes that layers read, by unit, where such a copy is worth its room."""
    sums_by_channel: Mapping[int, NDArray[np.int32]]
    """(O, N, P, Q) of the same layers."""


class Pace:
    """What trials that went on from some place, unit by unit, took from there to their end."""

    def __init__(self, like: Pace | None = None) -> None:
        """`like` is that of a similar place: what is believed until a trial went on here."""
        self._visits, self._next = 0, 1
        self._images = 0
        self._seconds = 0.0
        if like is not None and like._images:
            self._next, self._images, self._seconds = 4, 1, like._seconds / like._images

    def slower(self, seconds: float) -> bool:
        """Is going on likely to take longer than `seconds` for one image?

        Tried when nothing is known, and again at some later visits, ever fewer.
        """
        self._visits += 1
        if self._visits == self._next:
            self._next *= 4
            return False
        return self._seconds > seconds * self._images

    def add(self, images: int, seconds: float) -> None:
        """A trial with so many changed images went on, and took so long."""
        self._images += images
        self._seconds += seconds


class Network:
    """A model prepared for fast faults: its units, layers and tables, but no images."""

    def __init__(self, found: Discovery, x: Array, *, precise: bool | None = None) -> None:
        """`found` from `discovery.discover`; `x` images as the data set has them; some run."""
        self.found = found
        """The file it was made from; that with other contents where `holding` made it."""
        self._precise = precise
        self._model = found.model.SerializeToString()
        session = self.session
        fixed = session.get_inputs()[0].shape[0]
        self.group: int | None = fixed if isinstance(fixed, int) else None
        """Images that only run together, as in a plain run; None when any images may."""
        self.cut: Cut
        self.why = ""
        """Why the whole model is reloaded; empty when it is not."""
        self.layers: dict[int, Layer] = {}
        self.tables: dict[int, tuple[NDArray[np.uint8], NDArray[np.float32]]] = {}
        self.limits: dict[int, int] = {}
        self.pools: dict[int, bool] = {}
        """Units that make one code of every channel: are the channels the last axis?"""
        self.ends: dict[int, Unit] = {}
        """By unit, all from that one on in one, which takes less time where most of it changes."""
        self._paces: dict[int, dict[int, Pace]] = {}
        self._types = {tensor.name: tensor for tensor in found.space.tensors}
        self._readers: dict[str, Reader] = {}
        """By stored weight, where a decoder stands behind it that onnxruntime has folded."""
        self._between = {t.name for t in found.space.tensors if t.target == ACTIVATION}
        x = runtime.adapt(x[: max(self.group or 0, CALIBRATION)], session)
        if runtime.saturates() if precise is None else precise:
            self.why = (
                "x86 CPU without VNNI: onnxruntime converts weights depending on their values"
            )
            return
        try:
            self.cut = graph.cut(self._model, x, fixed=self.group, apart=self._between)
        except InputError as error:
            self.why = str(error)
            return
        self._in_place = self._find_in_place()
        if not self._in_place:
            self.why = next(iter(self.reloaded.values()))
            return
        self._reach()
        self._probe(x)

    @cached_property
    def session(self) -> Any:
        """The file itself, without faults."""
        return runtime.session(self._model, precise=self._precise)

    @cached_property
    def runner(self) -> Runner:
        """Runs units."""
        return Runner(self.cut, precise=self._precise)

    def __getstate__(self) -> dict[str, Any]:
        """All but sessions, which belong to a process."""
        return {k: v for k, v in vars(self).items() if k not in ("session", "runner")}

    @property
    def reloaded(self) -> dict[str, str]:
        """Tensors whose faults go to the reload engine, and why."""
        if self.why:
            return dict.fromkeys(self._types, self.why)
        return {
            name: "scales, zero points and float weights steer how onnxruntime optimizes the graph"
            if tensor.target not in IN_PLACE
            else "onnxruntime stores it in another form in the optimized graph"
            for name, tensor in self._types.items()
            if name not in self._in_place
        }

    def _find_in_place(self) -> set[str]:
        """Tensors that the optimized graph holds as the file does, or as a decoder reads them, and
        its activations."""
        stored = {proto.name: proto for proto in self.found.model.graph.initializer}
        same = self._between & self.cut.values.keys()
        for name, tensor in self._types.items():
            if name in self._between:
                continue
            mine, optimized = stored[name], name
            read = self.found.decoders.read.get(name, ())
            if len(read) == 1 and tensor.width == 8 and name not in self.cut.initializers:
                reader = Reader(self.found.model, name, *read)
                mine, optimized = numpy_helper.from_array(reader.golden, reader.read), reader.read
                self._readers[name] = reader
            theirs = self.cut.initializers.get(optimized)
            if theirs is None or tensor.target not in IN_PLACE:
                continue
            if (mine.data_type, list(mine.dims)) != (theirs.data_type, list(theirs.dims)):
                continue
            # int4 numbers are packed in raw_data on both sides. A tensor that several operators
            # read may live on in another form for some of them: all must still read this one.
            models = (self.found.model, self.cut.model)
            users = [graph.users(model, optimized) for model in models]
            if theirs.raw_data == mine.raw_data and users[0] == users[1]:
                same.add(name)
        return same

    def _optimized(self, name: str) -> str:
        """What the optimized graph calls a tensor of the file, once it is read."""
        return self._readers[name].read if name in self._readers else name

    def read(self, change: Change) -> Change:
        """A change that can be made in the optimized graph as the change of its initializers."""
        found: Change = {}
        for name, entry in change.items():
            if name in self._readers:
                entry = self._readers[name].changed(*entry)
            if len(entry[0]):
                found[self._optimized(name)] = entry
        return found

    def _reach(self) -> None:
        """Find the units that a fault can reach, and the values that must be kept for them."""
        reached: set[str] = self._between & self._in_place
        changing = {self._optimized(name) for name in self._in_place}
        self.active: list[int] = []
        wanted: set[str] = set(reached)
        for index, unit in enumerate(self.cut.units):
            if unit.initializers & changing or reached & set(unit.inputs):
                reached.update(unit.outputs)
                wanted.update(unit.inputs, unit.outputs)
                self.active.append(index)
        self.kept_values = [name for name in self.cut.values if name in wanted]
        self.last_use = {
            name: max(users) for name, users in self.cut.consumers.items() if name in wanted
        }
        self.made = {name for index in self.active for name in self.cut.units[index].outputs}

    def _probe(self, x: Array) -> None:
        """Run some images every way that will be used: what is not exactly equal is not used."""
        n = max(self.group or 0, CALIBRATION)
        x = np.resize(x, (n, *x.shape[1:]))
        sample = self.keep(x)
        if self.why:
            return
        if self.group is None and any(
            n.op_type.startswith("DynamicQuantize") for u in self.cut.units for n in u.nodes
        ):
            self.group = runtime.CHUNK
        if self.group is None and not self._any_images(sample):
            self.group = runtime.CHUNK
        if self.group is not None and not self._whole_groups(sample):
            self.why = "its kernels do not repeat bit for bit when run one by one"
            return
        self._seconds = {index: self._time(index, sample) for index in self.active}
        self._find_ends()
        for index in self.active:
            if index in self.layers:
                self.limits[index] = self._limit(index)
            elif (table := self._table(index)) is not None:
                if self._table_holds(index, table, sample):
                    self.tables[index] = table, self._linear(index, table)
            elif (last_axis := self._pools(index, sample)) is not None:
                self.pools[index] = last_axis
        some = sorted(self._in_place)[:: max(1, len(self._in_place) // PROOFS)]
        if not all(self._agrees(name, sample, x) for name in some):
            self.why = "a fault gave another output than in a session of its own"

    def _agrees(self, name: str, sample: Kept, x: Array) -> bool:
        """Does a fault in the middle of a tensor give what the reload engine gives?"""
        tensor = self._types[name]
        if name in self._between:
            change: Change = {name: Flips(np.array([tensor.size // 2]), np.array([4], np.uint8))}
            return self._same(change, sample, x)
        stored = np.frombuffer(self._found_raw(name), np.uint8)
        codes = (
            bits.unpack(stored, tensor.size, tensor.dtype)
            if tensor.width < 8
            else stored.view(tensor.dtype)
        )
        offset = np.array([tensor.size // 2])
        change = {name: (offset, codes[offset] ^ codes.dtype.type(1 << 2))}
        return self._same(change, sample, x)

    def _same(self, change: Change, sample: Kept, x: Array) -> bool:
        from resq_deploy.inject.fast import Fast  # which needs this module

        return Fast(self, sample, x).run(change).tobytes() == self.reload(x).run(change).tobytes()

    def _found_raw(self, name: str) -> bytes:
        stored = {t.name: t.raw_data for t in self.found.model.graph.initializer}
        return bytes(stored[name])

    def _any_images(self, sample: Kept) -> bool:
        """Does every unit give the kept rows again for a few images in any company?"""
        some: list[list[int]] = [[3], [7, 1, 4], [0, 2, 5, 6, 8, 9, 11], [*range(12, 29)]]
        return all(
            self._repeats(self.cut.units[index], sample, np.array(images, np.int64))
            for index in self.active
            for images in some
        )

    def _whole_groups(self, sample: Kept) -> bool:
        assert self.group is not None
        images = np.arange(self.group)
        return all(self._repeats(self.cut.units[i], sample, images) for i in self.active)

    def _repeats(self, unit: Unit, kept: Kept, images: Images) -> bool:
        feeds = [kept.values[name][images] for name in unit.inputs]
        outputs = self.runner.run(self.runner.session(unit), unit, feeds)
        return all(
            output.tobytes() == kept.values[name][images].tobytes()
            for name, output in zip(unit.outputs, outputs, strict=True)
        )

    def _time(self, index: int, sample: Kept) -> float:
        """Seconds of computing that a unit takes for one image."""
        n, unit = self.group or CALIBRATION, self.cut.units[index]
        feeds = [sample.values[name][:n] for name in unit.inputs]
        session, seconds = self.runner.session(unit), []
        for _ in range(4):
            start = time.thread_time()
            self.runner.run(session, unit, feeds)
            seconds.append(time.thread_time() - start)
        return min(seconds) / n

    def share_behind(self, names: Iterable[str]) -> float:
        """The part of the run time of the network behind the first unit that reads `names`."""
        units, hit = self.cut.units, set(names)
        first = [i for i in self.active if hit & (units[i].initializers | set(units[i].inputs))]
        if not first:
            return 0.0
        behind = sum(self._seconds[i] for i in self.active if i >= first[0])
        return behind / sum(self._seconds.values())

    def _find_ends(self) -> None:
        before = float("inf")
        for at, index in enumerate(self.active[:-1]):
            behind = sum(self._seconds[i] for i in self.active[at:])
            if self.cut.units[index].heavy and behind <= NEXT_END * before:
                unit = self.cut.joined(self.active[at:])
                if unit is not None:
                    self.ends[index], before = unit, behind

    def end(self, index: int, kept: Kept) -> Unit | None:
        """Unit `index` and all behind it in one; None where that does not repeat `kept`."""
        unit = self.ends.get(index)
        if unit is not None and not self.runner.has(unit):
            images = np.arange(min(kept.n, self.group or runtime.CHUNK))
            if not self._repeats(unit, kept, images):
                self.ends.pop(index)
                return None
        return unit

    def last_struck(self, change: Change) -> int:
        """The last unit that reads a changed initializer or whose output flips; -1: none."""
        struck = (
            index
            for index in self.active
            if change.keys()
            & (self.cut.units[index].initializers | {*self.cut.units[index].outputs})
        )
        return max(struck, default=-1)

    def pace(self, index: int, entries: int) -> Pace:
        """What going on from unit `index` costs where `entries` codes of an image have changed."""
        found, size = self._paces.setdefault(index, {}), entries.bit_length() // 3
        if size not in found:
            near = min(found, key=lambda other: abs(other - size), default=size)
            found[size] = Pace(found.get(near))
        return found[size]

    def seconds_behind(self, index: int) -> float:
        """Seconds that the units from `index` on take for one image."""
        return sum(self._seconds[i] for i in self.active if i >= index)

    def _limit(self, index: int) -> int:
        """Changed input codes of an image up to which updating a layer beats running it."""
        if self.group is not None:
            return 0
        layer, dense = self.layers[index], 1e9 * self._seconds[index]
        dense += BYTE_NS * (np.prod(layer.x_shape) + np.prod(layer.y_shape))
        g = layer.geometry
        positions, out = int(np.prod(layer.y_shape[:2])), layer.y_shape[2]
        position = POSITION_NS + CODE_NS * out
        reach = g.kernel_h * g.kernel_w / (g.stride_h * g.stride_w)
        code = reach * out / g.groups / (RATE if g.groups == 1 else 1.0)
        everywhere = (dense - positions * position) / code
        apart = dense / (reach * position + code)
        return int(min(max(everywhere, apart), np.prod(layer.x_shape)))

    def _pools(self, index: int, sample: Kept) -> bool | None:
        """Does a unit make one code of every channel, by itself? Then: are they the last axis?"""
        unit = self.cut.units[index]
        if self.group is not None or len(unit.inputs) != 1 or len(unit.outputs) != 1:
            return None
        x, y = self.cut.values[unit.inputs[0]], self.cut.values[unit.outputs[0]]
        scalars = all(
            np.prod(self.cut.initializers[name].dims, dtype=np.int64) == 1
            for name in unit.initializers
        )
        if unit.heavy or not scalars or x.rows != 1 or y.rows != 1 or len(x.tail) != 3:
            return None
        if x.dtype.itemsize != 1 or y.dtype.itemsize != 1:
            return None
        channels = int(np.prod(y.tail, dtype=np.int64))
        images = sample.values[x.name].reshape(sample.n, *x.tail)
        expected = sample.values[y.name].reshape(sample.n, channels)
        for last_axis, axis in ((True, 2), (False, 0)):
            if x.tail[axis] != channels:
                continue
            planes = np.moveaxis(images, 1 + axis, 1).reshape(-1, *np.delete(x.tail, axis))
            feed = np.expand_dims(planes, 1 + axis)
            found = self.runner.attempt(unit, {x.name: feed})
            if found is not None and found.tobytes() == expected.tobytes():
                return last_axis
        return None

    def _table(self, index: int) -> NDArray[np.uint8] | None:
        """What an elementwise unit makes of every pair of codes; None for other units."""
        unit = self.cut.units[index]
        shapes = {
            (v.rows, v.tail, v.dtype.itemsize)
            for v in (self.cut.values[name] for name in (*unit.inputs, *unit.outputs))
        }
        scalars = all(
            np.prod(self.cut.initializers[name].dims, dtype=np.int64) == 1
            for name in unit.initializers
        )
        if len(shapes) != 1 or len(unit.outputs) != 1 or not 1 <= len(unit.inputs) <= 2:
            return None
        rows, tail, size = shapes.pop()
        if size != 1 or not scalars or not all(n.op_type in ELEMENTWISE for n in unit.nodes):
            return None
        pairs = np.arange(2**16)
        each = rows * int(np.prod(tail, dtype=np.int64))
        n = -(-pairs.size // each)
        if self.group is not None:
            n = -(-n // self.group) * self.group
        codes = np.resize(pairs, n * each)
        feeds = [
            (codes >> shift & 255).astype(np.uint8).view(self.cut.values[name].dtype)
            .reshape(n, rows, *tail)
            for name, shift in zip(unit.inputs, (8, 0), strict=False)
        ]  # fmt: skip
        session, outputs = self.runner.session(unit), []
        for start in range(0, n, step := self.group or n):
            part = [feed[start : start + step] for feed in feeds]
            outputs.append(self.runner.run(session, unit, part)[0])
        return np.concatenate(outputs).view(np.uint8).reshape(-1)[: 2**16].copy()

    def _linear(self, index: int, table: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Factors and constant of a QLinearAdd of uint8 codes; NaN where they miss the table."""
        unit = self.cut.units[index]
        none = np.full(3, np.nan, np.float32)
        types = {self.cut.values[name].dtype for name in (*unit.inputs, *unit.outputs)}
        (node, *more) = unit.nodes
        if more or node.op_type != "QLinearAdd" or types != {np.dtype(np.uint8)}:
            return none
        if node.input[0] != unit.inputs[0] or node.input[3] != unit.inputs[-1]:
            return none
        scale_a, zero_a, scale_b, zero_b, scale, zero = (
            graph.array(self.cut.initializers[node.input[i]]).reshape(-1)[0].astype(np.float32)
            for i in (1, 2, 4, 5, 6, 7)
        )
        by_a, by_b = scale_a / scale, scale_b / scale
        found = np.array([by_a, by_b, zero - (by_a * zero_a + by_b * zero_b)], np.float32)
        return found if kernels.is_linear(found, table) else none

    def _table_holds(self, index: int, table: NDArray[np.uint8], sample: Kept) -> bool:
        unit = self.cut.units[index]
        codes = [sample.values[name].view(np.uint8).astype(np.int64) for name in unit.inputs]
        found = table[codes[0] << 8 | codes[-1]]
        return bool((found == sample.values[unit.outputs[0]].view(np.uint8)).all())

    def bytes_per_image(self, workers: int = 1) -> int:
        """Memory for one image: what `keep` makes, and what every worker writes changes into."""
        if self.why:
            return 1
        values = sum(self.cut.values[name].bytes_per_image for name in self.kept_values)
        sums = sum(layer.acc_bytes for layer in self.layers.values())
        copies = sum(
            int(np.prod(layer.x_shape)) + layer.acc_bytes
            for index, layer in self.layers.items()
            if self._worth_copying(index)
        )
        adapted = self.cut.values[self.cut.input].bytes_per_image
        return values + sums + copies + workers * (2 * values + adapted)

    def keep_nothing(self, output: Array) -> Kept:
        """For changes that are run through the whole network: `output` is that without faults."""
        return Kept(
            n=len(output), output=output, values={}, sums={}, inputs_by_channel={},
            sums_by_channel={},
        )  # fmt: skip

    def keep(self, x: Array, allocate: Allocate = np.empty) -> Kept:
        """The golden run of images (N, ...) as the data set has them.

        `allocate(shape, dtype)` makes the arrays that are kept.
        """
        output = runtime.run(self.session, x)
        if self.why:
            return self.keep_nothing(output)
        if self.group:
            short = -len(x) % self.group if len(x) % self.group and self._fixed else 0
            x = np.concatenate([x, np.repeat(x[-1:], short, axis=0)])
        c = self.cut
        names = [name for name in self.kept_values if name != c.input]
        values = {
            name: allocate(
                (len(x), c.values[name].rows, *c.values[name].tail), c.values[name].dtype
            )
            for name in self.kept_values
        }
        session = runtime.build(c.whole_model(names), level="off", precise=self._precise)
        for start in range(0, len(x), step := self.group or runtime.CHUNK):
            part = runtime.adapt(x[start : start + step], self.session)
            if c.input in values:
                values[c.input][start : start + step] = part[:, None]
            outputs = session.run(names, {c.input: part})
            for name, rows in zip(names, outputs, strict=True):
                values[name][start : start + step] = rows.reshape(
                    len(part), *values[name].shape[1:]
                )
        if values[c.output][: len(output)].tobytes() != output.tobytes():
            self.why = "the optimized graph, stored and loaded again, answers otherwise"
            return self.keep_nothing(output)
        sums = self._sums(values, allocate)
        copied = [index for index in sums if self._worth_copying(index)]
        return Kept(
            n=len(x),
            output=output,
            values=values,
            sums=sums,
            inputs_by_channel={i: _by_channel(self._input(i, values), allocate) for i in copied},
            sums_by_channel={i: _by_channel(sums[i], allocate) for i in copied},
        )

    def _input(self, index: int, values: Mapping[str, Array]) -> Bytes:
        return self.layers[index].x(values[self.cut.units[index].inputs[0]])

    def _worth_copying(self, index: int) -> bool:
        """Does a fault in a layer cost much there, compared with what it can cost behind?

        Then copies that lie channel by channel are kept.
        """
        layer = self.layers[index]
        behind = sum(other.macs for i, other in self.layers.items() if i > index)
        positions = int(np.prod(layer.y_shape[:2]))
        return layer.y_shape[2] > 1 and positions * POSITION_MACS > behind

    @property
    def _fixed(self) -> bool:
        return isinstance(self.session.get_inputs()[0].shape[0], int)

    def _sums(self, values: Mapping[str, Array], allocate: Allocate) -> dict[int, Array]:
        """Accumulators of every layer for which our requantizing gives the kept output."""
        sums: dict[int, Array] = {}
        for index in self.active:
            unit = self.cut.units[index]
            layer = self.layers.get(index) or layers.recognize(unit, self.cut)
            if layer is None:
                continue
            x = layer.x(values[unit.inputs[0]])
            acc = layer.accumulators(x, allocate((len(x), *layer.y_shape), np.int32))
            if layer.reproduces(acc, layer.y(values[unit.outputs[0]])):
                sums[index] = acc
                self.layers[index] = layer
        return sums

    def holding(self, change: Change) -> Network:
        """The network of the file that stores the values of `change` (no `Flips`) for good.

        It is not prepared anew: what is known of kernels and times holds for other weights too,
        and `keep` tries whether the units answer as the file does.
        """
        other = copy.copy(self)
        other.__dict__.pop("session", None)
        other.found = memory.stored(self.found, change)
        other._model = other.found.model.SerializeToString()
        if self.why:
            return other
        if not self.in_place(change):
            other.why = "scales, zero points or float weights are not those that were prepared"
            return other
        changed = self.faulty(self.read(change))
        other.cut = self.cut.holding(changed)
        other.runner = self.runner.holding(other.cut, changed)
        other._readers = self._readers | {
            name: Reader(other.found.model, name, self._readers[name].read)
            for name in change.keys() & self._readers.keys()
        }
        struck = {i for i in self.active if changed.keys() & self.cut.units[i].initializers}
        other.layers = {i: layer for i, layer in self.layers.items() if i not in struck}
        other.tables = {i: table for i, table in self.tables.items() if i not in struck}
        other.ends = dict(self.ends)
        return other

    def in_place(self, change: Change) -> bool:
        """Can this change be made in the optimized graph?"""
        return not self.why and change.keys() <= self._in_place

    def reload(self, x: Array) -> Reload:
        """The reload engine for images (N, ...) as the data set has them."""
        return Reload(self.found.model, self.found.space, x, precise=self._precise)

    def whole(self, change: Change, x: Array) -> Array:
        """Output (N, ...) of the whole optimized graph under a change, for adapted images."""
        model = self.cut.whole_model([self.cut.output], self.faulty(change))
        masks = self.masks(change)
        if masks:
            model = activations.strike(onnx.load_from_string(model), masks).SerializeToString()
        session = runtime.build(model, level="off", precise=self._precise)
        return runtime.run(session, x)

    def faulty(self, change: Change) -> dict[str, onnx.TensorProto]:
        """The initializers of the optimized graph with changed elements."""
        changed = {}
        for name, (offsets, values) in change.items():
            if name in self._between:
                continue
            changed[name] = onnx.TensorProto()
            changed[name].CopyFrom(self.cut.initializers[name])
            # what decoders read are bytes
            dtype = self._types[name].dtype if name in self._types else str(values.dtype)
            memory.write(changed[name], dtype, offsets, values)
        return changed

    def masks(self, change: Change) -> dict[str, Array]:
        """What is flipped in the activations of a change, as `activations.strike` takes it."""
        return {
            name: entry.dense(self._types[name])
            for name, entry in change.items()
            if isinstance(entry, Flips)
        }


def as_bytes(value: Array) -> NDArray[np.uint8]:
    """(N, ...) as (N, bytes)."""
    return np.ascontiguousarray(value).reshape(len(value), -1).view(np.uint8)


def _by_channel(value: Array, allocate: Allocate) -> Array:
    """A copy (C, N, H, W) of (N, H, W, C)."""
    n, height, width, channels = value.shape
    copy = allocate((channels, n, height, width), value.dtype)
    for start in range(0, n, runtime.CHUNK):  # in parts that stay in the cache
        part = slice(start, start + runtime.CHUNK)
        copy[:, part] = value[part].transpose(3, 0, 1, 2)
    return copy
