"""Cases as values: the entry of a database, its dtype and variant, and the sample.

Imports no framework.
"""

import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Variants of an operator's call, and of a module's.
OPERATOR_KINDS = ("plain", "strided", "inplace")
MODULE_KINDS = ("train", "eval")
WIDE = ("float64", "complex128")


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a database in one dtype: `op/sin/float32/strided`.

    Databases: `op` and `module` are torch's OpInfo and ModuleInfo, `jax` is JAX's primitive
    harnesses.
    """

    database: str
    name: str
    dtype: str
    kind: str

    def __str__(self) -> str:
        return f"{self.database}/{self.name}/{self.dtype}/{self.kind}"

    @property
    def is_wide(self) -> bool:
        return self.dtype in WIDE

    @property
    def seed(self) -> int:
        """The seed of the entry's samples; all kinds of one operator have the same samples."""
        return seed_of(f"{self.database}/{self.name}/{self.dtype}")


def parse_entry(text: str) -> Entry:
    database, rest = text.split("/", 1)
    name, dtype, kind = rest.rsplit("/", 2)
    return Entry(database, name, dtype, kind)


def seed_of(text: str) -> int:
    return zlib.crc32(text.encode())


def chosen_samples(count: int, wanted: int, seed: int) -> Sequence[int]:
    """Return the first sample and a seeded choice of others, `wanted` in all."""
    others = (
        random.Random(seed).sample(range(1, count), max(0, min(wanted, count) - 1))
        if count > 1
        else []
    )
    return [0, *sorted(others)][: min(count, wanted)]


def share(entries: Iterable[Entry], fraction: float, seed: int) -> list[Entry]:
    """Return a seeded share of the entries in random order: the first N are a fair sample."""
    ordered = list(entries)
    random.Random(seed).shuffle(ordered)
    return ordered[: max(1, round(fraction * len(ordered)))] if ordered else []
