"""Keys of a call's random streams."""

import zlib
from collections.abc import Iterable
from typing import Any

import jax


def rng_streams_of(key: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the key of each named stream, derived from the call's key: uint32[2].

    A stream's key is `fold_in(wrap_key_data(key, impl="threefry2x32"), crc32(name))`. So it depends
    neither on the other streams, nor on the process, nor on jax_default_prng_impl.
    """
    root = jax.random.wrap_key_data(key, impl="threefry2x32")
    return {name: jax.random.fold_in(root, zlib.crc32(name.encode())) for name in names}
