"""64-bit integers without x64: torch models take and return them, while jax has 32-bit ones.

On the host NumPy converts them (bridge_client.jax.memory); on a GPU XLA does, by these functions.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge_wire.errors import DTypeError


def converted(value: Any, dtype: np.dtype) -> Any:
    """Return an array, traced or not, in a dtype that may be a 64-bit one; see `extremes` for
    whether a narrower dtype holds it. Other values stay unchanged."""
    if not isinstance(value, jax.Array) or value.dtype == dtype:
        return value
    with jax.enable_x64(True):
        return jax.lax.convert_element_type(value, dtype)


def extremes(wide: Any) -> Any:
    """Return the smallest and the largest element.

    As floats: those around 2**32, which decide, are exact.
    """
    with jax.enable_x64(True):
        return jnp.stack([wide.min(), wide.max()]).astype(np.float64)


def check_range(
    extremes: Sequence[Any] | np.ndarray, wide: np.dtype, narrow: np.dtype, label: str
) -> None:
    """Raise DTypeError unless integers between these two fit the narrower type."""
    bounds, (low, high) = np.iinfo(narrow), extremes
    if low < bounds.min or high > bounds.max:
        raise DTypeError(
            f"{label} has dtype {wide} and values from {int(low)} to {int(high)}, which {narrow}"
            " cannot hold: run both jax and the worker with x64"
        )
