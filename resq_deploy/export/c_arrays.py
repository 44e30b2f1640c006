"""The stored tensors and the golden vectors as C99 sources.

Arrays are constants without any code. `weights.c` is one array of bytes, so that the linker keeps
the order and the gaps of the memory map, in a section of its own.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy import encoding
from resq_deploy.encoding import Encoding
from resq_deploy.export.golden import Golden
from resq_deploy.memory_map import MemoryMap, Stored

COLUMNS = 16
"""Numbers on a line."""

WEIGHTS_H = """\
/* Stored tensors of {model} (SHA-256 {digest}).
   Generated: do not edit. Layout: memory_map.json. */
#ifndef RESQ_MODEL_WEIGHTS_H
#define RESQ_MODEL_WEIGHTS_H

#include <stdint.h>

#define RESQ_MODEL_BYTES {bytes}u
#define RESQ_MODEL_CRC32 0x{crc:08x}u
#define RESQ_MODEL_ALIGNMENT {alignment} /* bytes; of the array and of every tensor */
#define RESQ_MODEL_N_TENSORS {n}u
#define RESQ_MODEL_MOST_ELEMENTS {most}u /* of a tensor */
#define RESQ_MODEL_ENCODED {encoded} /* 1: read 8-bit weights through decode.h ({encoding}) */

/* The section of the array: -DRESQ_MODEL_SECTION='".flash.model"'. Where a compiler needs other
   words for it, define RESQ_MODEL_PLACE as a whole. */
#ifndef RESQ_MODEL_SECTION
#define RESQ_MODEL_SECTION ".rodata.resq_model"
#endif
#ifndef RESQ_MODEL_PLACE
#if defined(__GNUC__)
#define RESQ_MODEL_PLACE \\
    __attribute__((section(RESQ_MODEL_SECTION), aligned(RESQ_MODEL_ALIGNMENT)))
#else
#define RESQ_MODEL_PLACE
#endif
#endif

typedef struct {{
    const char *name;      /* as in model.qdq.onnx */
    uint32_t offset;       /* first byte in resq_model_weights */
    uint32_t bytes;
    uint32_t elements;     /* in C order of their shape */
    uint32_t bits;         /* of an element: 8; 4, two a byte, low half first; 32, little endian */
    uint32_t crc32;        /* of the bytes */
    uint32_t codes_crc32;  /* of the codes, decoded where the weights are encoded */
    uint32_t channels;     /* length of the first axis */
    const float *scales;   /* value = element * scale; of an encoded weight once decoded */
    uint32_t n_scales;     /* 1, or one for each channel */
}} resq_model_tensor;

extern const uint8_t resq_model_weights[RESQ_MODEL_BYTES];
extern const resq_model_tensor resq_model_tensors[RESQ_MODEL_N_TENSORS];

/* Indices into resq_model_tensors. */
enum {{
{indices}
}};

#endif
"""

WEIGHTS_C = """\
/* Generated: do not edit. */
#include "weights.h"

const uint8_t resq_model_weights[RESQ_MODEL_BYTES] RESQ_MODEL_PLACE = {{
{data}
}};

{scales}

const resq_model_tensor resq_model_tensors[RESQ_MODEL_N_TENSORS] = {{
{rows}
}};
"""

GOLDEN_H = """\
/* Golden vectors of {model}. Generated: do not edit. */
#ifndef RESQ_MODEL_GOLDEN_H
#define RESQ_MODEL_GOLDEN_H

#include <stdint.h>

#define RESQ_GOLDEN_VECTORS {n}u
#define RESQ_GOLDEN_INPUT_BYTES {inputs}u /* an image of {shape}, uint8 pixels */
#define RESQ_GOLDEN_CLASSES {classes}u
#define RESQ_GOLDEN_SCALE {scale} /* output = (code - zero point) * scale */
#define RESQ_GOLDEN_ZERO_POINT {zero}
#define RESQ_GOLDEN_TOLERANCE {tolerance} /* steps of the output code that a client may be off */
#define RESQ_GOLDEN_ROUNDINGS {rows}u

extern const uint8_t resq_golden_input[RESQ_GOLDEN_VECTORS][RESQ_GOLDEN_INPUT_BYTES];
extern const uint8_t resq_golden_code[RESQ_GOLDEN_VECTORS][RESQ_GOLDEN_CLASSES];
extern const float resq_golden_output[RESQ_GOLDEN_VECTORS][RESQ_GOLDEN_CLASSES];

/* What the quantizers of the model must round and saturate to: ties go to the even code. */
typedef struct {{
    float value;
    float scale;
    int32_t zero_point;
    uint8_t code;
}} resq_golden_rounding;

extern const resq_golden_rounding resq_golden_roundings[RESQ_GOLDEN_ROUNDINGS];

#endif
"""

GOLDEN_C = """\
/* Generated: do not edit. */
#include "golden.h"

const uint8_t resq_golden_input[RESQ_GOLDEN_VECTORS][RESQ_GOLDEN_INPUT_BYTES] = {{
{inputs}
}};

const uint8_t resq_golden_code[RESQ_GOLDEN_VECTORS][RESQ_GOLDEN_CLASSES] = {{
{codes}
}};

const float resq_golden_output[RESQ_GOLDEN_VECTORS][RESQ_GOLDEN_CLASSES] = {{
{outputs}
}};

const resq_golden_rounding resq_golden_roundings[RESQ_GOLDEN_ROUNDINGS] = {{
{roundings}
}};
"""


def real(value: Any) -> str:
    """A float32 as a C literal: nine significant digits give the same number again."""
    return f"{float(np.float32(value)):.8e}f"


def lines(literals: Sequence[str], indent: str = "    ") -> str:
    """Literals in the rows of an initializer."""
    rows = (literals[i : i + COLUMNS] for i in range(0, len(literals), COLUMNS))
    return ",\n".join(indent + ",".join(row) for row in rows)


def _rows(literals: Iterable[Sequence[str]]) -> str:
    return ",\n".join(f"    {{\n{lines(row, '        ')}\n    }}" for row in literals)


def integers(values: NDArray[Any]) -> list[str]:
    """Numbers of an array, in C order, as literals."""
    return [str(value) for value in values.reshape(-1).tolist()]


def _identifiers(names: Iterable[str]) -> list[str]:
    """RESQ_MODEL_LAYER1_0_CONV1_WEIGHT for layer1.0.conv1.weight; a number where two are alike."""
    found: dict[str, None] = {}
    for name in names:
        plain = "RESQ_MODEL_" + re.sub(r"\W", "_", name, flags=re.ASCII).upper()
        number = 2
        unique = plain
        while unique in found:
            unique, number = f"{plain}_{number}", number + 1
        found[unique] = None
    return list(found)


def _codes_crc32(tensor: Stored, image: bytes, how: Encoding) -> int:
    """CRC-32 of what is read of a tensor."""
    if tensor.target != "weight" or tensor.bits != 8:
        return tensor.crc32
    stored = np.frombuffer(image, np.int8, tensor.elements, tensor.address)
    return zlib.crc32(how.decode(stored.reshape(tensor.shape)).tobytes())


def weights(mapped: MemoryMap, image: bytes) -> dict[str, bytes]:
    """`weights.h` and `weights.c` of a memory map and its `weights.bin`."""
    names = _identifiers(tensor.name for tensor in mapped.tensors)
    header = WEIGHTS_H.format(
        model=mapped.model,
        digest=mapped.model_sha256,
        bytes=mapped.bytes,
        crc=mapped.crc32,
        alignment=mapped.alignment,
        n=len(mapped.tensors),
        encoded=int(mapped.encoding != "plain"),
        encoding=mapped.encoding,
        most=max(tensor.elements for tensor in mapped.tensors),
        indices=",\n".join(f"    {name} = {i}" for i, name in enumerate(names)),
    )
    how = encoding.parse(mapped.encoding)
    scales, rows = [], []
    for i, tensor in enumerate(mapped.tensors):
        values = lines([real(value) for value in tensor.scale])
        scales.append(f"static const float scales_{i}[{len(tensor.scale)}] = {{\n{values}\n}};")
        rows.append(
            f'    {{"{tensor.name}", {tensor.address}u, {tensor.bytes}u, {tensor.elements}u, '
            f"{tensor.bits}u, 0x{tensor.crc32:08x}u, 0x{_codes_crc32(tensor, image, how):08x}u, "
            f"{tensor.shape[0]}u, scales_{i}, {len(tensor.scale)}u}}"
        )
    source = WEIGHTS_C.format(
        data=lines([str(byte) for byte in image]),
        scales="\n".join(scales),
        rows=",\n".join(rows),
    )
    return {"weights.h": header.encode(), "weights.c": source.encode()}


def golden(vectors: Golden, model: str) -> dict[str, bytes]:
    """`golden.h` and `golden.c`."""
    n, *shape = vectors.x.shape
    header = GOLDEN_H.format(
        model=model,
        n=n,
        inputs=int(np.prod(shape)),
        shape=" x ".join(map(str, shape)),
        classes=vectors.codes.shape[1],
        scale=real(vectors.scale),
        zero=vectors.zero_point,
        tolerance=vectors.tolerance,
        rows=len(vectors.roundings.code),
    )
    table = vectors.roundings
    source = GOLDEN_C.format(
        inputs=_rows(integers(x) for x in vectors.x),
        codes=_rows(integers(row) for row in vectors.codes),
        outputs=_rows([real(v) for v in row] for row in vectors.outputs),
        roundings=",\n".join(
            f"    {{{real(value)}, {real(scale)}, {zero}, {code}}}"
            for value, scale, zero, code in zip(
                table.value, table.scale, table.zero_point.tolist(), table.code.tolist(),
                strict=True,
            )
        ),
    )  # fmt: skip
    return {"golden.h": header.encode(), "golden.c": source.encode()}
