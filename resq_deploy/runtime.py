"""onnxruntime behind a few functions: read a file, build a session, feed images, say where we ran.

The rest of the package never talks to onnxruntime itself, so that golden runs, fault trials
and parity checks all use the same options, the same chunks and the same input rules.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import helper

from resq_deploy.errors import InputError, Refused

Array = NDArray[Any]

CHUNK = 50
"""Images a run: fresh sessions fault their memory in, and that cost grows with the chunk."""

LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
VNNI_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8")
X86 = ("x86_64", "amd64", "i686", "i386")

_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
}


def read_model(path: Path) -> bytes:
    """The bytes of an ONNX file; InputError when it is missing, broken, or not complete.

    Tensors in external files are refused: one file, one digest.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); an ONNX file expected"
        ) from None
    parse_model(raw, str(path))
    return raw


def parse_model(raw: bytes, name: str = "the model") -> onnx.ModelProto:
    """The model in the bytes of an ONNX file; InputError when they are not one."""
    try:
        model = onnx.load_model_from_string(raw)
    except DecodeError:
        model = onnx.ModelProto()
    if not model.graph.node:
        raise InputError(f"{name} is not an ONNX model, or a truncated one; export it again")
    external = [t.name for t in _tensors(model.graph) if t.external_data]
    if external:
        raise InputError(
            f"{name} keeps {len(external)} tensors (first: {external[0]}) in external data files; "
            "save it as one file (onnx.save_model with save_as_external_data=False)"
        )
    return model


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)


def cpu_features(cpuinfo: str | None = None, machine: str | None = None) -> dict[str, Any]:
    """What the CPU does with 8-bit products: `machine`, `name`, `vnni`, `x64quantprecision`.

    x86 CPUs without VNNI add pairs of u8*s8 products in 16 bits and saturate (onnxruntime issue
    16105); a flipped sign bit makes just such weights. There `x64quantprecision` is true:
    sessions are then built with slower kernels that do not saturate. Both arguments are for
    tests; by default they come from /proc/cpuinfo (where absent, VNNI counts as absent).
    """
    if cpuinfo is None:
        file = Path("/proc/cpuinfo")
        cpuinfo = file.read_text() if file.is_file() else ""
    machine = machine or platform.machine()
    fields: dict[str, str] = {}  # of the first core; the others repeat it
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    vnni = sorted(set(VNNI_FLAGS) & set(fields.get("flags", "").split()))
    return {
        "machine": machine,
        "name": fields.get("model name", "unknown"),
        "vnni": vnni,
        "x64quantprecision": machine.lower() in X86 and not vnni,
    }


def cpu_warnings(cpu: dict[str, Any]) -> list[str]:
    """What a reader of results from this CPU must know."""
    if not cpu["x64quantprecision"]:
        return []
    return [
        "x86 CPU without VNNI: sessions run with session.x64quantprecision=1, because its u8*s8 "
        "products saturate at 16 bits; latency and some outputs differ from a default session"
    ]


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    try:
        own = metadata.version("resq-deploy")
    except metadata.PackageNotFoundError:
        own = "unknown"
    return {
        "resq_deploy": own,
        "onnx": onnx.__version__,
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


@cache
def saturates() -> bool:
    """Does this CPU need session.x64quantprecision (`cpu_features`)?"""
    return bool(cpu_features()["x64quantprecision"])


def build(
    model: bytes,
    *,
    threads: int = 1,
    level: str = "all",
    precise: bool | None = None,
    optimized_to: Path | None = None,
) -> ort.InferenceSession:
    """A CPU session of serialized model bytes with any number of inputs.

    `level` is a key of LEVELS. `precise` sets session.x64quantprecision (default: where
    `cpu_features` asks for it). `optimized_to`: write the graph that will run there. Refused
    when onnxruntime does not load the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions; standard error is ours
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = LEVELS[level]
    # Planning which buffers to use again takes time that grows with the square of the operators
    # (three quarters of building a Swin-Tiny); the arena uses them again anyway.
    options.enable_mem_reuse = False
    if saturates() if precise is None else precise:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized_to is not None:
        options.optimized_model_filepath = str(optimized_to)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise Refused(f"onnxruntime cannot load the model: {_one_line(error)}") from None


def session(
    model: bytes, *, threads: int = 1, level: str = "all", precise: bool | None = None
) -> ort.InferenceSession:
    """A session of a classifier: `build`, and InputError unless it has exactly one input."""
    built = build(model, threads=threads, level=level, precise=precise)
    if len(built.get_inputs()) != 1:
        names = ", ".join(i.name for i in built.get_inputs())
        raise InputError(f"the model has the inputs {names}; a classifier with one input expected")
    return built


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def optimized(model: bytes, *, precise: bool | None = None) -> onnx.ModelProto:
    """The graph that onnxruntime really runs for a file, as a model."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "optimized.onnx"
        build(model, precise=precise, optimized_to=file)
        return onnx.load(file)


def count(model: onnx.ModelProto) -> dict[str, int]:
    """Number of nodes of each type, most first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def kernels(model: bytes) -> dict[str, int]:
    """`count` of the graph that onnxruntime really runs for a file."""
    return count(optimized(model))


def constant_part(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """A model that computes values from some initializers, which become its inputs.

    `outputs` must depend on initializers alone.
    """
    producer = {out: node for node in model.graph.node for out in node.output}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    wanted = set(outputs)
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            wanted.update(node.input)
    nodes = [node for node in model.graph.node if wanted & set(node.output)]
    unknown = [name for name in wanted if name and name not in stored and name not in producer]
    if unknown:
        raise InputError(f"{outputs[0]!r} depends on {unknown[0]!r}, which is not constant")
    graph = helper.make_graph(
        nodes,
        "constant",
        [
            helper.make_tensor_value_info(name, stored[name].data_type, list(stored[name].dims))
            for name in inputs
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [tensor for name, tensor in stored.items() if name in wanted and name not in inputs],
    )
    part = helper.make_model(
        graph, opset_imports=list(model.opset_import), ir_version=model.ir_version
    )
    return bytes(part.SerializeToString())


def input_type(want: Any) -> np.dtype[Any] | None:
    """numpy type of an input of a session; None for those that no images have."""
    return _TYPES.get(want.type)


def adapt(x: Array, built: ort.InferenceSession) -> Array:
    """Images (N, ...) in the type of the model's input.

    The model's own type and shape goes in as it is; uint8 for a float input is divided by 255.
    InputError for anything else: silent casts would make a campaign about other images.
    """
    want = built.get_inputs()[0]
    dtype, shape = input_type(want), list(want.shape)
    fits = len(shape) == x.ndim and all(
        not isinstance(size, int) or size == given
        for size, given in zip(shape[1:], x.shape[1:], strict=True)
    )
    if fits and x.dtype == dtype:
        return x
    if fits and x.dtype == np.uint8 and dtype is not None and dtype.kind == "f":
        return np.asarray(x.astype(dtype) / dtype.type(255))
    hint = ""
    if dtype is not None and dtype.kind == "f":
        hint = " or uint8 pixels, which are divided by 255"
    raise InputError(
        f"the model's input {want.name} takes {want.type} of shape {_shape(shape)}{hint}; "
        f"the data has {x.dtype} of shape {_shape(['N', *x.shape[1:]])}"
    )


def _shape(sizes: list[Any]) -> str:
    return "(" + ", ".join(str(size) if size is not None else "?" for size in sizes) + ")"


def run(built: ort.InferenceSession, x: Array, *, chunk: int = CHUNK) -> Array:
    """First output (N, ...) for images (N, ...), `chunk` images at a time.

    Images are adapted (`adapt`) as they go in, where they are not yet. A model with a fixed batch
    size is fed that many; the last chunk is padded with its last image and the padding cut off
    again. Refused when onnxruntime does not run the model.
    """
    want = built.get_inputs()[0]
    fixed = want.shape[0] if want.shape and isinstance(want.shape[0], int) else None
    size = fixed or chunk
    outputs = []
    for start in range(0, len(x), size):
        part = adapt(x[start : start + size], built)
        n = len(part)
        if fixed and n < fixed:
            part = np.concatenate([part, np.repeat(part[-1:], fixed - n, axis=0)])
        try:
            output = built.run([built.get_outputs()[0].name], {want.name: part})[0]
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise Refused(f"onnxruntime cannot run the model: {_one_line(error)}") from None
        if not isinstance(output, np.ndarray) or output.ndim < 2 or len(output) != len(part):
            raise InputError(
                f"the model's first output {built.get_outputs()[0].name} is "
                f"{getattr(output, 'shape', type(output).__name__)} for {len(part)} images; "
                "one row of class scores an image expected"
            )
        outputs.append(output[:n])
    return np.concatenate(outputs)
