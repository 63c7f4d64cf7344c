"""One client's session on the worker: its memory, programs, views and runs.

Imports no framework.
"""

import ctypes
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

from bridge_server.process.tokens import ANYONE
from bridge_server.runtime import Program, Runtime
from bridge_server.serving.meters import Meter
from bridge_server.serving.residuals import Kept, Residuals
from bridge_server.serving.run_queue import Client
from bridge_server.turns import Turn, turn_with
from bridge_wire.errors import CudaError, OutOfMemory, ProgramGone, ProtocolError
from bridge_wire.memory import cuda_words
from bridge_wire.memory.allocator import ALIGNMENT
from bridge_wire.memory.cuda import Device, device_of
from bridge_wire.memory.cuda_memory import (
    GpuSlab,
    copied_to_host,
    end_what_is_left,
    open_received,
)
from bridge_wire.memory.pool import Block, Pool
from bridge_wire.memory.slabs import Slab, map_received
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

_MAX_SLABS = 1024
_MAX_PROGRAMS = 16384
_MAX_CACHED = 16384
_FRESH = 16  # programs that a session keeps until it has prepared so many others
_MOST_PEEKED = 4096  # bytes


class _Place(NamedTuple):
    """An array's location in this process, in memory that the owner keeps alive.

    An empty array has the location _NOWHERE.
    """

    pointer: int
    nbytes: int
    owner: Slab | Block | None
    is_on_gpu: bool


_NOWHERE = _Place(0, 0, None, False)


class _Plan(NamedTuple):
    """A checked run: the locations of its arrays, and views of its inputs in host memory."""

    program: weakref.ref[Program]
    inputs: Sequence[_Place]
    views: Sequence[Any]
    outputs: Sequence[_Place]
    is_on_gpu: bool


def addressed(named: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return (address, size) of each array of an inline run; address 0 means sent by value."""
    if named and len(named) != len(sizes):
        raise ProtocolError(
            f"an inline run names {len(named)} addresses; its program expects {len(sizes)}"
        )
    return list(zip(named or [0] * len(sizes), sizes, strict=True))


def nbytes_of(specs: Sequence[Spec]) -> list[int]:
    """Return the sizes of arrays in bytes."""
    return [spec.nbytes for spec in specs]


def _is_on_gpu(place: _Place, spec: Spec) -> bool:
    if place.is_on_gpu and spec.weak:
        raise ProtocolError(
            "a Python number is in GPU memory; expected it in host memory"
        )
    return place.is_on_gpu


@dataclass(slots=True, eq=False)
class Session:
    """One client's slabs, programs and views.

    Several lanes use a session concurrently, one thread per lane.
    """

    token: bytes
    runtime: Runtime
    residuals: Residuals
    created: float = field(default_factory=time.monotonic)
    lanes: int = 0
    # Name of the grant with which the session was opened.
    owner: str = ANYONE.name
    is_closed: bool = False
    number: int = 0  # in the log
    client: Client = field(default_factory=Client)  # its share of the run queue
    # Everything is released.
    ended: threading.Event = field(default_factory=threading.Event)
    slabs: tuple[Slab, ...] = ()
    # By id. An evicted program lives on while a residual needs it.
    programs: dict[int, weakref.ref[Program]] = field(default_factory=dict)
    # A client can run what it has just prepared, however many others prepare.
    _fresh: deque[Program] = field(default_factory=lambda: deque(maxlen=_FRESH))
    _last_id: int = 0
    _room: int = 64  # for programs, before those that are gone are looked for
    # Memory for the arrays of inline calls; unused by clients that pass every tensor by address.
    scratch: Pool = field(default_factory=lambda: Pool(shareable=False))
    _views: dict[tuple[int, Spec], Any] = field(default_factory=dict)
    _plans: dict[tuple[int, tuple[int, ...], tuple[int, ...]], "_Plan"] = field(
        default_factory=dict
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_slab(self, descriptors: list[int], share: pb.Share, max_bytes: int) -> None:
        """Map a slab of the client, given by a handle or a descriptor.

        A mapped descriptor is removed from the list.
        """
        if share.cuda_handle:
            slab: Slab = open_received(
                self._device("memory"), share.cuda_handle, share.nbytes, share.base
            )
        elif len(descriptors) == 1:
            slab = map_received(descriptors.pop(), share.nbytes, share.base)
        else:
            raise ProtocolError(
                f"a slab needs a handle or exactly one descriptor, got {len(descriptors)}"
            )
        with self._lock:
            if len(self.slabs) >= _MAX_SLABS or slab.nbytes > max_bytes - sum(
                s.nbytes for s in self.slabs
            ):
                raise OutOfMemory(
                    f"a session may share at most {max_bytes} bytes in {_MAX_SLABS} slabs here"
                )
            if slab.base > 2**63 - slab.nbytes:
                raise ProtocolError("a slab ends beyond the address space")
            for other in self.slabs:
                if (
                    slab.base < other.base + other.nbytes
                    and other.base < slab.base + slab.nbytes
                ):
                    raise ProtocolError("a slab overlaps another slab of this session")
            self.slabs = (*self.slabs, slab)

    def take_turns(self, order: pb.Order, is_connected: Callable[[], bool]) -> Turn:
        """Return a lane's turn with the client on the GPU; the caller must close the turn.

        `is_connected` reports whether the client may still be alive.
        """
        device, words = self._device("work"), None
        if order.words:
            place = self._locate(order.words, cuda_words.NBYTES)
            if not place.is_on_gpu or order.words % cuda_words.NBYTES:
                raise ProtocolError(
                    "the words of a lane must lie on the GPU, aligned to their size"
                )
            words = place.pointer
        return turn_with(
            device, order.event, words, self.runtime.stream(), is_connected
        )

    def _device(self, what: str) -> Device:
        gpu = self.runtime.gpu()
        if gpu is None:
            raise CudaError(
                f"this worker's models run on no GPU, so it shares no GPU {what}; use host memory"
            )
        return device_of(gpu.uuid)

    def add_program(self, program: Program) -> int:
        """Add a program and return its id in this session."""
        with self._lock:
            if len(self.programs) >= self._room:
                self._forget_gone()
            if len(self.programs) >= _MAX_PROGRAMS:
                raise OutOfMemory(
                    f"a session may have at most {_MAX_PROGRAMS} programs; pad to fewer shapes"
                )
            self._last_id += 1  # an id is never used again
            self.programs[self._last_id] = weakref.ref(program)
            self._fresh.append(program)
            return self._last_id

    def _forget_gone(self) -> None:
        """Forget all about the programs that were evicted."""
        for id, known in list(self.programs.items()):
            if known() is None:
                self.programs.pop(id, None)
        for key, plan in list(self._plans.items()):
            if plan.program() is None:
                self._plans.pop(key, None)
        self._views.clear()
        self._room = min(2 * len(self.programs) + _FRESH, _MAX_PROGRAMS)

    def program(self, id: int) -> Program:
        """Return a program by its id.

        Raises:
          ProgramGone: it was evicted.
        """
        known = self.programs.get(id)
        program = None if known is None else known()
        if program is None and 0 < id <= self._last_id:
            raise ProgramGone(f"the program {id} was evicted; prepare it again")
        if program is None:
            raise ProtocolError(f"this session has prepared no program {id}")
        return program

    def run(
        self,
        request: pb.Run,
        turn: Turn | None,
        meter: Meter,
    ) -> None:
        """Run a program on the client's blocks; blocks on a GPU take the lane's turn there."""
        if request.released:
            self.residuals.drop(self, request.released)
        # A training loop repeats the same few combinations of blocks.
        key = (request.program, tuple(request.inputs), tuple(request.outputs))
        plan = self._plans.get(key) or self._plan(*key)
        program = plan.program() or self.program(request.program)
        if plan.is_on_gpu:
            self._run_in_turn(
                program, plan, request.residual, turn, request.turn, meter
            )
        else:
            views, outputs = plan.views, plan.outputs
            self._run(program, request.residual, views, outputs, None, meter)

    def take_back(self, request: pb.Run) -> None:
        """Drop the residual of a run that the client has abandoned.

        The client may have released the residual before.
        """
        known = self.programs.get(request.program)
        program = None if known is None else known()
        if program is not None and program.residual_nbytes is not None:
            self.residuals.drop(self, [request.residual])

    def run_inline(
        self,
        request: pb.Run,
        received: Sequence[Block],
        turn: Turn | None,
        meter: Meter,
    ) -> list[Block]:
        """Run a program on inputs received by value, and on the client's blocks on a GPU.

        Inputs received by value are in blocks of `scratch`, as are the returned outputs to send by
        value. A residual that aliases an input keeps the input's block.
        """
        program = self.program(request.program)
        named = addressed(request.outputs, program.output_nbytes)
        leaving = [
            self.scratch.lease(nbytes) for address, nbytes in named if not address
        ]
        sources = self._places(
            addressed(request.inputs, nbytes_of(program.inputs)), received
        )
        targets = self._places(named, leaving)
        views = [
            None
            if _is_on_gpu(place, spec)
            else self.runtime.view(place.pointer, spec, place.owner)
            for place, spec in zip(sources, program.inputs, strict=True)
        ]
        plan = _Plan(
            weakref.ref(program),
            sources,
            views,
            targets,
            any(place.is_on_gpu for place in (*sources, *targets)),
        )
        if plan.is_on_gpu:
            self._run_in_turn(
                program, plan, request.residual, turn, request.turn, meter
            )
        else:
            self._run(program, request.residual, views, targets, None, meter)
        return leaving

    def _run_in_turn(
        self,
        program: Program,
        plan: _Plan,
        residual: int,
        turn: Turn | None,
        number: int,
        meter: Meter,
    ) -> None:
        if turn is None:
            raise ProtocolError(
                "a lane must send `order` before it runs a program on GPU memory"
            )
        turn.begin(number)
        try:
            views = [
                self.runtime.view(place.pointer, spec, place.owner, turn)
                if place.is_on_gpu
                else view
                for place, spec, view in zip(
                    plan.inputs, program.inputs, plan.views, strict=True
                )
            ]
            self._run(program, residual, views, plan.outputs, turn, meter)
            turn.end()
        except BaseException:
            turn.finish()  # the client reuses its blocks when it receives the error
            raise

    def _run(
        self,
        program: Program,
        residual: int,
        inputs: Sequence[Any],
        targets: Sequence[_Place],
        turn: Turn | None,
        meter: Meter,
    ) -> None:
        """Run a program on views and write its outputs to the targets."""
        read = None
        if program.pullback_of is not None:
            kept = self.residuals.find(self, residual)
            if kept.program is not program.pullback_of:
                raise ProtocolError(
                    f"the residual {residual} was kept by another program"
                )
            read = kept.value
        program.used = begun = perf_counter()
        outputs, value = program.run(inputs, read)
        computed = perf_counter()
        write = self.runtime.write
        for output, (pointer, nbytes, _, is_on_gpu) in zip(
            outputs, targets, strict=True
        ):
            if nbytes:
                write(output, pointer, nbytes, turn if is_on_gpu else None)
        meter.note(program, computed - begun, perf_counter() - computed)
        if (kept_nbytes := program.residual_nbytes) is not None:
            if residual == 0:
                raise ProtocolError(
                    "the program keeps a residual, but the run's residual id is 0; expected an id"
                    " above 0"
                )
            self.residuals.keep(self, residual, Kept(program, value, kept_nbytes))

    def _plan(
        self, name: int, inputs: tuple[int, ...], outputs: tuple[int, ...]
    ) -> _Plan:
        """Check a run's addresses and return its plan."""
        program = self.program(name)
        if len(inputs) != len(program.inputs) or len(outputs) != len(program.outputs):
            raise ProtocolError(
                f"a run names {len(inputs)} inputs and {len(outputs)} outputs; "
                f"its program has {len(program.inputs)} and {len(program.outputs)}"
            )
        sources = [
            self._locate(address, spec.nbytes)
            for address, spec in zip(inputs, program.inputs, strict=True)
        ]
        views = [
            self._view(*named)
            for named in zip(inputs, sources, program.inputs, strict=True)
        ]
        targets = [
            self._locate(*named)
            for named in zip(outputs, program.output_nbytes, strict=True)
        ]
        plan = _Plan(
            weakref.ref(program),
            sources,
            views,
            targets,
            any(place.is_on_gpu for place in (*sources, *targets)),
        )
        # Python numbers are read at each run.
        if not any(spec.weak for spec in program.inputs):
            if len(self._plans) >= _MAX_CACHED:
                self._plans.clear()
            self._plans[name, inputs, outputs] = plan
        return plan

    def _view(self, address: int, place: _Place, spec: Spec) -> Any:
        """Return the view of an input in host memory, or None for a GPU input, viewed per run."""
        if _is_on_gpu(place, spec):
            return None
        view = self._views.get((address, spec))
        if view is None:
            view = self.runtime.view(place.pointer, spec, place.owner)
            if not spec.weak:
                if len(self._views) >= _MAX_CACHED:
                    self._views.clear()
                self._views[address, spec] = view
        return view

    def _places(
        self, named: Sequence[tuple[int, int]], by_value: Sequence[Block]
    ) -> list[_Place]:
        """Return the locations of arrays: GPU addresses, and the given blocks for the others."""
        blocks = iter(by_value)
        places = []
        for address, nbytes in named:
            if address:
                places.append(self._locate(address, nbytes))
                if not places[-1].is_on_gpu:
                    raise ProtocolError("an inline run names an address in host memory")
            else:
                block = next(blocks)
                places.append(_Place(block.pointer, nbytes, block, False))
        return places

    def _locate(self, address: int, nbytes: int) -> _Place:
        """Return the location of a client's block in this process."""
        if nbytes == 0:
            return _NOWHERE
        if address % ALIGNMENT:
            raise ProtocolError(f"a block is not aligned to {ALIGNMENT} bytes")
        for slab in self.slabs:
            # This order of comparisons cannot overflow or wrap for any numbers.
            if (
                slab.base <= address
                and nbytes <= slab.nbytes
                and address - slab.base <= slab.nbytes - nbytes
            ):
                return _Place(
                    slab.pointer + (address - slab.base),
                    nbytes,
                    slab,
                    isinstance(slab, GpuSlab),
                )
        raise ProtocolError(
            f"no shared slab holds a block of {nbytes} bytes at the given address"
        )

    def peek(self, request: pb.Peek) -> bytes:
        """Return a few bytes of the client's memory, as this process sees them."""
        if request.nbytes > _MOST_PEEKED:
            raise ProtocolError(
                f"a peek of {request.nbytes} bytes; the limit is {_MOST_PEEKED}"
            )
        place = self._locate(request.address, request.nbytes)
        if place.is_on_gpu:
            return copied_to_host(self._device("memory"), place.pointer, place.nbytes)
        return ctypes.string_at(place.pointer, place.nbytes)

    def usage(self) -> pb.Usage:
        """Return the worker's memory use for this session."""
        count, nbytes = self.residuals.usage(self)
        shared = self.shared_bytes()
        return pb.Usage(residuals=count, residual_bytes=nbytes, slab_bytes=shared)

    def shared_bytes(self) -> int:
        """Return the bytes of this session's slabs and scratch memory."""
        return sum(slab.nbytes for slab in self.slabs) + self.scratch.slab_bytes

    def discard(self) -> None:
        """Release everything; call only after the last lane has detached."""
        self.is_closed = True
        self.residuals.drop_all(self)
        self._plans.clear()
        self._views.clear()
        self.programs.clear()
        self._fresh.clear()
        self.slabs = ()
        self.scratch.close()
        end_what_is_left()
