"""Host memory of in-process sessions: any memory of this process. Imports no framework."""

import weakref
from typing import Any

from bridge_client.session import Placed
from bridge_server.runtime import Runtime
from bridge_wire.memory.allocator import ALIGNMENT
from bridge_wire.memory.cuda_memory import FIRST_ADDRESS, is_on_gpu
from bridge_wire.memory.pool import Block, Pool, block_at
from bridge_wire.specs import Spec


class ProcessMemory(Pool):
    """Passes inputs with XLA's alignment, and adopts outputs, in place; slabs hold copies.

    An address is therefore a pointer, except for leased blocks, which have both.
    """

    def __init__(self) -> None:
        super().__init__(shareable=False)
        self._adopted: set[int] = set()

    def address_of(self, pointer: int, nbytes: int) -> int | None:
        return None if pointer % ALIGNMENT else pointer

    def adopt(self, pointer: int, nbytes: int, owner: Any) -> Block:
        """Return a block over `owner`'s memory; the block keeps the owner alive."""
        return block_at(pointer, nbytes, _Adopted(owner, self._adopted))

    def live_blocks(self) -> int:
        return super().live_blocks() + len(self._adopted)


class _Adopted:
    """Keeps the owner of a block's memory alive, and counts the live block."""

    __slots__ = ("_live", "_owner")

    def __init__(self, owner: Any, live: set[int]) -> None:
        self._owner = owner
        self._live = live
        live.add(id(self))

    def append(self, address: int) -> None:
        self._live.discard(id(self))


class Views:
    """The runtime's arrays over inputs, cached per tensor storage.

    A cached array dies before its storage and does not keep the storage alive. After a call, only a
    holder of the input may keep the array.
    """

    def __init__(self, serving: Runtime) -> None:
        self._runtime = serving
        self._known: dict[tuple[int, Spec], tuple[weakref.ref[Any], Any]] = {}

    def of(self, placed: Placed, spec: Spec) -> Any:
        """Return the array over an input; for a weak spec, its Python number."""
        storage = getattr(placed, "storage", None)
        if storage is None or spec.weak:
            return self._runtime.view(pointer_of(placed), spec, placed)
        key = placed.address, spec
        known = self._known.get(key)
        if (
            known is not None
            and known[0]() is storage
            and self._runtime.is_usable(known[1])
        ):
            return known[1]
        view, views = self._runtime.view(placed.address, spec, None), self._known
        views[key] = weakref.ref(storage, lambda _: views.pop(key, None)), view
        return view


def pointer_of(placed: Placed) -> int:
    """Return an input's pointer in this process."""
    if isinstance(placed, Block):
        return placed.pointer
    return (
        placed.address - FIRST_ADDRESS if is_on_gpu(placed.address) else placed.address
    )
