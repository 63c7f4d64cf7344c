"""Residuals in JAX: a handle is an array of two words, the residual's id.

Outside compiled code the handle array owns the residual, which is dropped with it. In compiled code
there is no sign of a number's last copy: there the first pullback drops the residual, and the
oldest unused residuals are evicted first. A pullback with the handle of a dropped residual
recomputes from the inputs.
"""

import ctypes
import threading
import weakref
from collections import OrderedDict
from typing import NamedTuple

import jax
import numpy as np

from bridge_client.programs import Program
from bridge_client.session import Session
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import ResidualGone
from bridge_wire.memory.pool import Block, block_at
from bridge_wire.specs import Spec

HANDLE = Spec(BY_NAME["uint32"], (2,))
# As many steps of a scan can be differentiated without recomputing.
_MOST_UNCLAIMED = 16384


class _Kept(NamedTuple):
    """A residual on the worker: the program that kept it, and how much memory here it may alias."""

    program: (
        int  # its key: programs hold their session, which must not keep itself alive
    )
    nbytes: int


class _Words:
    """The memory of handles. Each stays until many more have come, since a GPU copies handles
    later."""

    def __init__(self) -> None:
        self._words = (ctypes.c_uint64 * _MOST_UNCLAIMED)()

    def holding(self, id: int) -> Block:
        """Return the handle of a residual in memory."""
        slot = id % _MOST_UNCLAIMED
        self._words[slot] = id
        return block_at(
            ctypes.addressof(self._words) + HANDLE.nbytes * slot, HANDLE.nbytes, self
        )

    def append(self, address: int) -> None:
        """Do nothing: a block has died, and its memory stays."""


class Residuals:
    """The residuals of one session that JAX holds handles of. Thread-safe."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._lock = threading.Lock()
        self._owned: dict[int, _Kept] = {}
        self._unclaimed: OrderedDict[int, _Kept] = OrderedDict()
        self._unclaimed_nbytes = 0
        self._words = _Words()

    def own(self, id: int, program: Program) -> jax.Array:
        """Return the array that is a residual's handle and owns it."""
        # By device_put, a transfer that jax.transfer_guard("disallow") accepts as explicit.
        handle: jax.Array = jax.device_put(
            np.frombuffer(id.to_bytes(HANDLE.nbytes, "little"), HANDLE.dtype.name)
        )
        self._owned[id] = _Kept(program.key, 0)
        weakref.finalize(handle, self._disown, id).atexit = False
        return handle

    def leave(self, id: int, program: Program, nbytes: int, max_bytes: int) -> Block:
        """Keep a residual until it is claimed or evicted; return its handle, for compiled code to
        hold.

        `nbytes` is the size of the memory here that the residual keeps leased, `max_bytes` that of
        all memory.
        """
        kept = _Kept(program.key, nbytes)
        dropped: list[int] = []
        with self._lock:
            self._unclaimed[id] = kept
            self._unclaimed_nbytes += kept.nbytes
            while len(self._unclaimed) > 1 and (
                # A quarter of the memory for residuals that may never be used.
                len(self._unclaimed) > _MOST_UNCLAIMED
                or self._unclaimed_nbytes > max_bytes // 4
            ):
                oldest, entry = self._unclaimed.popitem(last=False)
                self._unclaimed_nbytes -= entry.nbytes
                dropped.append(oldest)
        for oldest in dropped:
            program.session.drop_residual(oldest)
        return self._words.holding(id)

    def check(self, id: int, program: Program) -> None:
        """Raise ResidualGone unless a residual of this very program is kept under the id."""
        kept = self._kept(id)
        if kept is None or kept.program != program.key:
            raise ResidualGone("no residual of this program has this handle")

    def is_of_another(self, id: int, program: Program) -> bool:
        """Whether a residual of another program is kept under the id."""
        kept = self._kept(id)
        return kept is not None and kept.program != program.key

    def claim(self, id: int) -> None:
        """Release a residual whose handle nobody owns: its pullback has run."""
        with self._lock:
            entry = self._unclaimed.pop(id, None)
            if entry is None:
                return
            self._unclaimed_nbytes -= entry.nbytes
        self._drop(id)

    def _kept(self, id: int) -> _Kept | None:
        return self._owned.get(id) or self._unclaimed.get(id)

    def _disown(self, id: int) -> None:
        """Release a residual whose handle is gone. For finalizers: takes no lock."""
        if self._owned.pop(id, None) is not None:
            self._drop(id)

    def _drop(self, id: int) -> None:
        session = self._session()
        if session is not None:
            session.drop_residual(id)


_by_session: "weakref.WeakKeyDictionary[Session, Residuals]" = (
    weakref.WeakKeyDictionary()
)


def residuals_of(session: Session) -> Residuals:
    """Return the residuals of a session."""
    residuals = _by_session.get(session)
    return residuals or _by_session.setdefault(session, Residuals(session))
