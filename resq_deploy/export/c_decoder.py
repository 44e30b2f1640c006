"""The decoder of an encoding as C99 source, for firmware that reads the stored bytes itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.encoding import ByByte, Checked, Encoding, InPlaceSecded, secded
from resq_deploy.export.c_arrays import integers, lines

HEADER = """\
/* Decoder of weights stored as {name}. Generated: do not edit. */
#ifndef RESQ_MODEL_DECODE_H
#define RESQ_MODEL_DECODE_H

#include <stdint.h>

/* Writes the codes that the network computes with for the stored bytes of one weight. `elements`
   and `channels` are those of its shape, output channels first. `codes` may be `stored` itself. */
void resq_model_decode(int8_t *codes, const uint8_t *stored, uint32_t elements, uint32_t channels);

#endif
"""

TABLE = """
    (void)channels;
    for (uint32_t i = 0; i < elements; i++)
        codes[i] = table[stored[i]];
"""

MEAN = """
    const uint32_t size = elements / channels;
    for (uint32_t c = 0; c < channels; c++, codes += size, stored += size) {
        float total = 0, count = 0;
        for (uint32_t i = 0; i < size; i++) {
            total += table[stored[i]];
            count += good[stored[i]];
        }
        const int8_t mean = (int8_t)rintf(count > 0 ? total / count : 0); /* half to even */
        for (uint32_t i = 0; i < size; i++)
            codes[i] = good[stored[i]] ? table[stored[i]] : mean;
    }
"""

SECDED = """
    (void)channels;
    uint32_t at = 0;
    for (; at + 8 <= elements; at += 8) {
        uint8_t syndrome = 0;
        for (int i = 0; i < 8; i++)
            syndrome ^= checks[i][stored[at + i]];
        for (int i = 0; i < 8; i++)
            codes[at + i] = keep[syndrome] & read[i][stored[at + i] ^ correction[syndrome][i]];
    }
    for (; at < elements; at++) /* an incomplete word is stored as it is */
        codes[at] = (int8_t)stored[at];
"""


def _array(kind: str, name: str, values: NDArray[Any]) -> str:
    """A table by byte or by syndrome, or a matrix of them."""
    size = "".join(f"[{n}]" for n in values.shape)
    rows = [lines(integers(row)) for row in np.atleast_2d(values.astype(np.int64))]
    text = rows[0] if values.ndim == 1 else ",\n".join(f"{{\n{row}\n}}" for row in rows)
    return f"static const {kind} {name}{size} = {{\n{text}\n}};\n"


def sources(encoding: Encoding) -> dict[str, bytes]:
    """`decode.h` and `decode.c`; nothing for the encoding plain, whose bytes are the codes."""
    if encoding.name == "plain":
        return {}
    if isinstance(encoding, InPlaceSecded):
        keep = np.where(secded.DOUBLE & encoding.zero, 0, -1)
        arrays = [
            _array("uint8_t", "checks", secded.CHECKS),
            _array("uint8_t", "correction", secded.CORRECTION),
            _array("int8_t", "read", secded.READ),
            _array("int8_t", "keep", keep),
        ]
        body = SECDED
    else:
        assert isinstance(encoding, ByByte)
        arrays, body = [_array("int8_t", "table", encoding.table)], TABLE
        if isinstance(encoding, Checked) and encoding.policy == "mean":
            arrays.append(_array("uint8_t", "good", encoding.good))
            body = MEAN
    include = "#include <math.h>\n\n" if body is MEAN else ""
    source = (
        f'/* Generated: do not edit. */\n#include "decode.h"\n\n{include}' + "\n".join(arrays) +
        "\nvoid resq_model_decode(int8_t *codes, const uint8_t *stored, uint32_t elements,\n"
        f"                       uint32_t channels) {{{body}}}\n"
    )  # fmt: skip
    return {"decode.h": HEADER.format(name=encoding.name).encode(), "decode.c": source.encode()}
