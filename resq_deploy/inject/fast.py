"""The fast engine: never recompute what a fault cannot reach, and change no bit of the result.

The network runs once without faults, and its values between the kernels are kept. A fault then
runs only the units behind it (`inject.graph`), only on the images whose values really changed, and
where a unit is an integer layer only the sums that changed (`inject.kernels`). What cannot be done
that way is done by the reload engine, which is the definition; `Network.reloaded` says what and
why.
"""

from __future__ import annotations

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
from resq_deploy.inject.decoders import Reader
from resq_deploy.inject.graph import Cut, Runner, Unit
from resq_deploy.inject.layers import Layer
from resq_deploy.inject.memory import Change, Flips
from resq_deploy.inject.reload import Reload
from resq_deploy.inject.space import ACTIVATION, Discovery

Array = NDArray[Any]
Images = NDArray[np.int64]

IN_PLACE = ("weight", "bias")
"""Targets whose values do not steer how onnxruntime optimizes a graph. The others (scales, zero
points, float weights, which it fuses and reorders) do, so that a graph optimized without the fault
is no longer the one that runs."""

FEW = 32
"""Changed elements up to which a layer is updated tap by tap; more and the layer runs densely."""

BYTE_NS, POSITION_NS, CODE_NS, RATE = 0.3, 35.0, 0.7, 42.0
"""Costs on one machine: nanoseconds per byte that goes in and out of a dense run; in the kernel
`changed_inputs` per output position and per code of it, and multiplications per nanosecond. They
choose between two ways to the same result."""

POSITION_MACS = 2**16
"""Where the layers behind one multiply less than this for each of its output positions, it is worth
having copies of it that lie channel by channel: without them, a position costs as much as some
2000 multiplications."""

MANY, WHOLE = 8, 0.7
"""More changed elements than this, with more than this part of the network behind the first one:
the network is run as a whole."""

NEXT_END = 0.75
"""From one place to the next where the rest of the network can be run in one go, its share of the
run time falls to this part or less: few places, and no more than this lost by waiting for one."""

PROOFS = 3
"""Faults that are compared with the reload engine before the fast one is used on a model."""

PLANES = 1024
"""Channels that go through a pooling unit in one call."""

CALIBRATION = 50
"""Images with which the dense way is timed."""

NO_TAPS = np.empty((0, 4), np.int64)
NO_DELTA = np.empty(0, np.int64)

ELEMENTWISE = {
    "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "DequantizeLinear",
    "QuantizeLinear", "Add", "Sub", "Mul", "Relu", "Clip", "Sigmoid", "LeakyRelu",
}  # fmt: skip


Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Changed:
    """What is new in a kept value: some images have their changes listed, others whole rows."""

    listed: Images
    """(L,) images with lists, in any order."""
    first: NDArray[np.int64]
    """(L + 1,) where the list of an image begins and ends."""
    places: NDArray[np.int32]
    """Bytes of an image's value, ascending for each image."""
    codes: Bytes
    """The new bytes there."""
    whole: Images
    """(W,) images with rows, in any order."""
    rows: Bytes
    """(W, bytes)"""

    @cached_property
    def images(self) -> Images:
        """(L + W,) all of them, those with lists first."""
        return np.concatenate([self.listed, self.whole])


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


NO_CHANGE = Changed(
    listed=np.empty(0, np.int64),
    first=np.zeros(1, np.int64),
    places=np.empty(0, np.int32),
    codes=np.empty(0, np.uint8),
    whole=np.empty(0, np.int64),
    rows=np.empty((0, 0), np.uint8),
)


class Output:
    """Where the changes of a value are written; used again by every trial."""

    def __init__(self, n: int, size: int) -> None:
        """Of a value with `size` bytes for each of `n` images."""
        self._n, self._size = n, size
        # Lists of all images together take no more room than their rows would.
        self._most = max(n * size // 5, size)
        self._found, self._first = np.empty(n, np.int64), np.zeros(n + 1, np.int64)
        self._places, self._codes = np.empty(size, np.int32), np.empty(size, np.uint8)
        self._whole, self._rows = np.empty(n, np.int64), np.empty((0, size), np.uint8)
        self.clear()

    def clear(self) -> None:
        self.n_listed = self.n_entries = self.n_whole = 0

    @property
    def lists(self) -> tuple[int, int, Images, NDArray[np.int64], NDArray[np.int32], Bytes]:
        """What kernels append to: listed images and entries so far, and the lists."""
        return (
            self.n_listed, self.n_entries, self._found, self._first, self._places, self._codes,
        )  # fmt: skip

    @property
    def capacity(self) -> int:
        """Entries that the lists have room for."""
        return len(self._places)

    def grow(self) -> bool:
        """More room for lists; False when there is enough already."""
        size = min(self._most, 4 * len(self._places))
        if size == len(self._places):
            return False
        self._places, self._codes = (
            np.concatenate([old, np.empty(size - len(old), old.dtype)])
            for old in (self._places, self._codes)
        )
        return True

    def room(self, n: int) -> tuple[Bytes, Images]:
        """Where the next n rows and the numbers of their images go."""
        end = self.n_whole + n
        if end > len(self._rows):
            rows = np.empty((min(self._n, max(end, 2 * len(self._rows))), self._size), np.uint8)
            rows[: self.n_whole] = self._rows[: self.n_whole]
            self._rows = rows
        return self._rows[self.n_whole : end], self._whole[self.n_whole : end]

    def changed(self) -> Changed:
        return Changed(
            listed=self._found[: self.n_listed],
            first=self._first[: self.n_listed + 1],
            places=self._places[: self.n_entries],
            codes=self._codes[: self.n_entries],
            whole=self._whole[: self.n_whole],
            rows=self._rows[: self.n_whole],
        )


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


Allocate = Callable[[tuple[int, ...], Any], Array]


class Network:
    """A model prepared for fast faults: its units, layers and tables, but no images."""

    def __init__(self, found: Discovery, x: Array, *, precise: bool | None = None) -> None:
        """`found` from `space.discover`; `x` images as the data set has them, some of which run."""
        self._found = found
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
        stored = {proto.name: proto for proto in self._found.model.graph.initializer}
        same = self._between & self.cut.values.keys()
        for name, tensor in self._types.items():
            if name in self._between:
                continue
            mine, optimized = stored[name], name
            read = self._found.decoders.read.get(name, ())
            if len(read) == 1 and tensor.width == 8 and name not in self.cut.initializers:
                reader = Reader(self._found.model, name, *read)
                mine, optimized = numpy_helper.from_array(reader.golden, reader.read), reader.read
                self._readers[name] = reader
            theirs = self.cut.initializers.get(optimized)
            if theirs is None or tensor.target not in IN_PLACE:
                continue
            if (mine.data_type, list(mine.dims)) != (theirs.data_type, list(theirs.dims)):
                continue
            # int4 numbers are packed in raw_data on both sides. A tensor that several operators
            # read may live on in another form for some of them: all must still read this one.
            models = (self._found.model, self.cut.model)
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
        return Fast(self, sample, x).run(change).tobytes() == self.reload(x).run(change).tobytes()

    def _found_raw(self, name: str) -> bytes:
        stored = {t.name: t.raw_data for t in self._found.model.graph.initializer}
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

    def in_place(self, change: Change) -> bool:
        """Can this change be made in the optimized graph?"""
        return not self.why and change.keys() <= self._in_place

    def reload(self, x: Array) -> Reload:
        """The reload engine for images (N, ...) as the data set has them."""
        return Reload(self._found.model, self._found.space, x, precise=self._precise)

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


class Fast:
    """Outputs of a prepared model under changes, for the images of one golden run."""

    def __init__(self, network: Network, kept: Kept, x: Array) -> None:
        """`x` are the images of `kept`, as the data set has them."""
        self._network = network
        self._kept = kept
        self._images = x
        self._all = np.arange(kept.n)
        self._bytes = {name: _bytes(value) for name, value in kept.values.items()}
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
                    self._bytes[name], part, _bytes(new), rows, found
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
            codes = _bytes(session.run(unit.outputs, {name: feed})[0]).reshape(-1)
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


def _bytes(value: Array) -> NDArray[np.uint8]:
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
