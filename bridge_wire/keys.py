"""Typed random keys of JAX, where JAX is not."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Key:
    """An array of typed random keys, as `jax.random.key` makes them.

    Attributes:
      data: the keys' words, uint32; the last axis is that of a key's words.
      implementation: the name of the keys' algorithm in JAX, such as "threefry2x32".
    """

    data: Any
    implementation: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array of keys."""
        return tuple(self.data.shape[:-1])
