"""State of one trace: its random key, its parameters, its tensors, its writes into constants.

Imports torchax: only `bridge_environment.py` imports this module.
"""

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import torch
from torch import Tensor
from torchax.tensor import RuntimeProperty

from bridge_server.torch_via_xla.holders import holder_of
from bridge_server.torch_via_xla.plain_torch import plain_torch, storage_of
from bridge_wire.errors import CallerError, DTypeError


class Trace(RuntimeProperty):
    """State of one trace, in one thread."""

    refusal: DTypeError | None = None

    def __init__(self, mesh: Any, prng: jax.Array | None, autocast_dtype: Any) -> None:
        super().__init__(mesh, prng, autocast_dtype)
        self.tensors: list[weakref.ref[Any]] = []
        self.stand_ins: dict[int, tuple[Tensor, Tensor]] = {}
        self._written: dict[int, tuple[Tensor, Tensor]] = {}

    def share(self, outer: "Trace") -> None:
        """Become a part of an outer trace."""
        self.tensors = outer.tensors
        self.stand_ins = outer.stand_ins

    def stand_in(self, original: Tensor, traced: Tensor) -> None:
        """Replace a parameter or buffer by a traced tensor, through any reference to it."""
        self.stand_ins[storage_of(original)] = original, traced

    def note_write(self, constant: Tensor) -> None:
        """Save the value of an untraced tensor before the code writes into it."""
        if id(constant) not in self._written:
            self._written[id(constant)] = constant, constant.detach().clone()

    def restore(self) -> None:
        """Undo the code's writes into untraced tensors."""
        with plain_torch(), torch.no_grad():
            for constant, before in self._written.values():
                constant.copy_(before)
        self._written.clear()

    def get_and_rotate_prng_key(self) -> jax.Array:
        if self.prng is None:
            raise CallerError(
                "the torch code draws random numbers: pass rng=, a key of jax.random.key"
            )
        key: jax.Array = super().get_and_rotate_prng_key()
        return key

    def survivors(self) -> Iterator[Any]:
        """Yield the tensors of this trace that still exist; a list would keep them alive."""
        tensors = (reference() for reference in self.tensors)
        return filter(lambda tensor: tensor is not None, tensors)


@contextlib.contextmanager
def ending(trace: Trace) -> Iterator[None]:
    """End the tensors of a trace with it.

    Raises:
      CallerError: the code has kept one of them.
    """
    try:
        yield
        trace.stand_ins.clear()
        if next(trace.survivors(), None) is not None:
            gc.collect()  # some may be in cycles
        for survivor in trace.survivors():
            raise CallerError(
                f"the torch code has kept a traced tensor of shape {list(survivor.shape)} in"
                f" {holder_of(survivor)}, where it would outlive the call: return it, make it again"
                " in each call, or keep it in an attribute of the traced module, which is put"
                " back after each call"
            )
    finally:
        for survivor in trace.survivors():
            survivor.place.end()
        trace.tensors.clear()
        trace.stand_ins.clear()
