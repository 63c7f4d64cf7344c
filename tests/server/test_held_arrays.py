"""The search for arrays that a function holds: it may warn, and never fails."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

from bridge_client.torch import RemoteJaxFunction
from bridge_server.held_arrays import arrays_held


class Failing(Mapping[str, Any]):
    """A mapping that cannot be read."""

    def __getitem__(self, key: str) -> Any:
        raise RuntimeError("not now")

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("not now")

    def __len__(self) -> int:
        return 1


class Slotted:
    """A class whose slots are not all set."""

    __slots__ = ("__weakref__", "scale", "unset")

    def __init__(self) -> None:
        self.scale = jnp.float32(2.0)


class Lazy:
    """A class whose attributes cannot be listed."""

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("not now")


HELD = [
    jnp.float32(2.0),
    jax.random.key(0),
    jnp.arange(3),
    Slotted(),
    Failing(),
    Lazy(),
    {1: [Failing(), jnp.float32(1.0)]},
    iter([]),
]


@pytest.mark.parametrize("held", HELD, ids=lambda held: type(held).__name__)
def test_a_function_is_served_with_any_closure(held: Any) -> None:
    def doubled(x: Any) -> Any:
        assert held is not None
        return 2 * x

    assert RemoteJaxFunction(doubled)(torch.ones(2)).tolist() == [2.0, 2.0]


def test_arrays_behind_what_cannot_be_read_are_found() -> None:
    held = [Failing(), Lazy(), Slotted(), jnp.arange(3)]

    def of(x: Any) -> Any:
        return x + held[3]

    def is_vector(value: Any) -> bool:
        return isinstance(value, jax.Array) and value.ndim == 1

    assert arrays_held(of, is_vector) == ["held[3]"]
