"""Tables of SECDED codes, made from the columns of their parity-check matrix.

Hsiao, "A class of optimal minimum odd-weight-column SEC-DED codes", IBM Journal of Research and
Development 14 (1970): distinct columns of odd weight. One flip gives a syndrome of odd weight, the
column of its place; two give one of even weight that is not 0.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def columns(rows: int, weight: int) -> list[int]:
    """All columns with `weight` ones in `rows` rows; bit i stands for row i."""
    return [sum(1 << i for i in ones) for ones in combinations(range(rows), weight)]


def checks(places: Bytes) -> Bytes:
    """(n, 256) check codes of each value of each of the n bytes with the columns `places` (8 n,).

    Those of a word are their exclusive or.
    """
    table = np.zeros((len(places) // 8, 256), np.uint8)
    for bit, column in enumerate(places.tolist()):
        table[bit // 8, (np.arange(256) >> bit % 8 & 1) == 1] ^= np.uint8(column)
    return table


def syndromes(table: Bytes, words: Bytes) -> Bytes:
    """(k,) exclusive or of the entries of words (k, n) in `checks`."""
    found: Bytes = np.bitwise_xor.reduce(table[np.arange(len(table)), words], axis=1)
    return found
