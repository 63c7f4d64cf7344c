"""Runs of programs on tensors without autograd: at once, or as operators where torch traces."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bridge_client.arguments import NUMBERS, Values
from bridge_client.programs import Positions, Program, tag_of
from bridge_client.session import Session
from bridge_client.torch import modes
from bridge_client.torch.families import AnyProgram, member_for, output_shapes
from bridge_client.torch.graphs import pin, pinned
from bridge_client.torch.memory import TORCH_DTYPES, from_blocks, place
from bridge_client.torch.profiling import profiled
from bridge_wire.errors import ResidualGone, StructureError
from bridge_wire.memory.pool import Block
from bridge_wire.specs import Spec

Tensors = Sequence[Tensor]
Function = Callable[..., Any]
Decorator = Callable[[Function], Function]


def run(program: AnyProgram, inputs: Values) -> Tensors:
    """Run a program without autograd: at once, or as an operator if torch only traces."""
    if modes.is_traced(inputs):
        return run_operator(program, inputs)
    placed, copied, gpu = place(program, inputs)
    session = program.session
    with profiled(program):
        outputs: Tensors = session.run(
            program,
            placed,
            copied=copied,
            make=lambda blocks: from_blocks(blocks, program.prepared.outputs, gpu),
            stream=None if gpu is None else gpu.stream,
        )
    return outputs if gpu is None else gpu.brought_back(outputs, session)


def run_operator(program: AnyProgram, inputs: Values) -> Tensors:
    """Run a program as an operator, which a graph can name."""
    _refuse_sharded(program, inputs)
    outputs: Tensors = _operators().run(_as_tensors(inputs), pin(program))
    return outputs


def run_keeping(program: AnyProgram, inputs: Values) -> tuple[Tensors, Tensor]:
    """Run a program that keeps a residual; return its outputs and the residual's handle.

    The residual is dropped with the handle's storage. The handle's content is the residual's id, so
    that a copy, which a saved-tensor hook may make, names the same residual, or none at all.
    """
    if modes.is_traced(inputs):
        *outputs, handle = run_operator(program, inputs)
        return outputs, handle
    placed, copied, gpu = place(program, inputs)
    session = program.session

    def make(blocks: list[Block], residual: int) -> tuple[Tensors, Tensor]:
        return from_blocks(blocks, program.prepared.outputs, gpu), _handle(
            session, residual
        )

    stream = None if gpu is None else gpu.stream
    with profiled(program):
        outputs, handle = session.run_keeping(
            program, placed, copied=copied, make=make, stream=stream
        )
    return outputs if gpu is None else gpu.brought_back(outputs, session), handle


def pull_back(
    program: AnyProgram,
    which: tuple[Positions, Positions, Positions],
    handle: Tensor,
    inputs: Values,
    cotangents: Values,
) -> Tensors:
    """Return the cotangents of the inputs, from the residual; if that is gone, run the inputs once
    more.

    `which`: the inputs that the residual was kept for, the inputs whose cotangents are returned,
    and the outputs that have cotangents.
    """
    kept, wrt, given = which
    if modes.is_traced([handle, *cotangents]):
        arrays = _as_tensors([*inputs, *cotangents])
        operator = _operators().pull_back
        traced: Tensors = operator(handle, arrays, pin(program), kept, wrt, given)
        return traced
    assert isinstance(program, Program), "a family is traced only"
    pullback = program.keeping(kept).pullback(wrt, given)
    session = program.session
    try:
        placed, copied, gpu = place(pullback, cotangents)
        with profiled(pullback):
            gradients: Tensors = session.run_pullback(
                pullback,
                int(handle),
                placed,
                copied=copied,
                make=lambda blocks: from_blocks(blocks, pullback.prepared.outputs, gpu),
                stream=None if gpu is None else gpu.stream,
            )
    except ResidualGone:
        made_by = program.on_model(tag_of(int(handle)))
        return run(made_by.vjp(wrt, given), [*inputs, *cotangents])
    return gradients if gpu is None else gpu.brought_back(gradients, session)


class _Handle(bytearray):
    """The id of a residual as the memory of a tensor; the residual is dropped with it."""

    session: Session
    residual: int

    def __del__(self) -> None:
        self.session.drop_residual(self.residual)


def _handle(session: Session, residual: int) -> Tensor:
    memory = _Handle(residual.to_bytes(8, "little"))
    memory.session = session
    memory.residual = residual
    return torch.frombuffer(memory, dtype=torch.int64)


def _refuse_sharded(program: AnyProgram, inputs: Values) -> None:
    """Raise StructureError for a DTensor: its memory holds this rank's shard."""
    # Without it there are no DTensors.
    sharding = sys.modules.get("torch.distributed.tensor")
    if sharding is None:
        return
    for value, label in zip(inputs, program.labels, strict=False):
        if isinstance(value, sharding.DTensor):
            raise StructureError(
                f"input `{label}` is a DTensor with placements {value.placements}; expected a whole"
                " tensor: pass value.full_tensor(), or for parameters apply fully_shard to the"
                " RemoteJaxFunction or a module around it, and call that module, whose hooks"
                " gather them"
            )


def _as_tensors(inputs: Values) -> list[Tensor]:
    return [x if isinstance(x, Tensor) else _number_as_tensor(x) for x in inputs]


def _number_as_tensor(number: Any) -> Tensor:
    spec = NUMBERS[type(number)]
    dtype = TORCH_DTYPES[spec.dtype.name]
    # On the host, even under torch.set_default_device.
    return torch.tensor(number, dtype=dtype, device="cpu")


def as_values(program: AnyProgram, tensors: Tensors) -> list[Any]:
    """Return an operator's inputs as values of a run, with Python numbers as such."""
    if not program.takes_numbers:
        return list(tensors)
    pairs = zip(tensors, program.inputs, strict=True)
    return [x.item() if spec.weak else x for x, spec in pairs]


def _empty(described: Sequence[Spec], shapes: Values, arrays: Tensors) -> list[Tensor]:
    """Return a run's outputs without values, on the first GPU of these arrays."""
    device = next((x.device for x in arrays if x.is_cuda), "cpu")
    dtypes = [TORCH_DTYPES[spec.dtype.name] for spec in described]
    return [
        torch.empty(shape, dtype=dtype, device=device)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def _operators() -> Any:
    """Return the operators that a graph is going to name: in code that torch.compile makes, those
    without derivatives.

    torch.compile has derived its graphs when they run, and an operator that has a derivative looks
    at each run for modes that record it: 15 µs of a forward and VJP (torch 2.13).
    """
    is_derived = modes.is_in_graph()
    return (
        torch.ops.torch_jax_bridge_derived if is_derived else torch.ops.torch_jax_bridge
    )


# Not by torch.library.custom_op: its wrappers took 15 µs of each call (torch 2.13).
LIBRARY = torch.library.Library("torch_jax_bridge", "DEF")
_DERIVED = torch.library.Library("torch_jax_bridge_derived", "DEF")
# A call waits for the worker, which no CUDA graph can replay.
_TAGS = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))


def _operator(schema: str) -> Decorator:
    """Make a function an operator of both libraries."""

    def register(function: Function) -> Function:
        for library in (LIBRARY, _DERIVED):
            library.define(schema, tags=_TAGS)
            library.impl(
                schema.partition("(")[0], function, "CompositeExplicitAutograd"
            )
        return function

    return register


def _fake(name: str) -> Decorator:
    """Make a function the implementation of both libraries' operator on tensors without values."""

    def register(function: Function) -> Function:
        for library in (LIBRARY, _DERIVED):
            torch.library.register_fake(f"{library.ns}::{name}", function, lib=library)
        return function

    return register


@_operator("run(Tensor[] arrays, int program) -> Tensor[]")
def _run_operator(arrays: Tensors, program: int) -> list[Tensor]:
    """Run a program; if it keeps a residual, the last output is the residual's handle."""
    member = member_for(pinned(program), arrays)
    inputs = as_values(member, arrays)
    if not member.keeps_residual:
        return list(run(member, inputs))
    outputs, handle = run_keeping(member, inputs)
    return [*outputs, handle]


@_fake("run")
def _(arrays: Tensors, program: int) -> list[Tensor]:
    named = pinned(program)
    handle = (
        [torch.empty(1, dtype=torch.int64, device="cpu")]
        if named.keeps_residual
        else []
    )
    return _empty(named.outputs, output_shapes(named, arrays), arrays) + handle


@_operator(
    "pull_back(Tensor handle, Tensor[] arrays, int program, int[] kept, int[] wrt, int[] given) ->"
    " Tensor[]"
)
def _pull_back_operator(
    handle: Tensor,
    arrays: Tensors,
    program: int,
    kept: Positions,
    wrt: Positions,
    given: Positions,
) -> list[Tensor]:
    """Return the cotangents of the inputs `wrt`, from the handle of a run's residual; see
    pull_back."""
    member = member_for(pinned(program), arrays)
    count = len(member.inputs)
    inputs, cotangents = as_values(member, arrays[:count]), arrays[count:]
    which = (tuple(kept), tuple(wrt), tuple(given))
    return list(pull_back(member, which, handle, inputs, cotangents))


@_fake("pull_back")
def _(
    handle: Tensor,
    arrays: Tensors,
    program: int,
    kept: Positions,
    wrt: Positions,
    given: Positions,
) -> list[Tensor]:
    inputs = pinned(program).inputs
    shapes = [tuple(arrays[i].shape) for i in wrt]
    return _empty([inputs[i] for i in wrt], shapes, arrays[len(inputs) :])
