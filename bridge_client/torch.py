"""Remote JAX functions as torch modules. The only client file that imports torch; it never imports jax.

A call's tensors are placed in the session's memory (those that lie there already are passed as they are), the worker
writes the outputs into blocks, and each output tensor's storage is its block. A forward under grad keeps a residual
on the worker; the autograd node holds it through a saved tensor, so that it goes exactly when torch lets go of what
the node saved.
"""

import ctypes
import dataclasses
import functools
import itertools
import struct
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from bridge_client.connecting import connect
from bridge_client.programs import Program
from bridge_client.session import Placed, Session
from bridge_wire import specs, trees
from bridge_wire.dtypes import BY_NAME, NARROWED, NEEDS_X64, DType
from bridge_wire.errors import CallerError, DTypeError, ResidualGone, SpecError, StructureError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.pool import Block
from bridge_wire.specs import Spec

_TORCH_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in BY_NAME}
_DTYPES: Mapping[torch.dtype, DType] = {dtype: BY_NAME[name] for name, dtype in _TORCH_DTYPES.items()}


class _Number(NamedTuple):
    """How a Python number travels; on the worker it is one again, and takes its type from the other operands."""

    spec: Spec
    pack: Callable[[Any], bytes]
    dtype: torch.dtype


_NUMBERS: Mapping[type, _Number] = {
    int: _Number(Spec(BY_NAME["int64"], (), weak=True), struct.Struct("<q").pack, torch.int64),
    float: _Number(Spec(BY_NAME["float64"], (), weak=True), struct.Struct("<d").pack, torch.float64),
    complex: _Number(
        Spec(BY_NAME["complex128"], (), weak=True), lambda z: struct.pack("<dd", z.real, z.imag), torch.complex128
    ),
}
_NAMESPACE = "torch-jax-bridge"


class RemoteJaxFunction(nn.Module):
    """A JAX function, or a model with parameters, that runs in a worker process, as a differentiable torch module.

    Call it with pytrees (dict, list, tuple, namedtuple, dataclass, None) of tensors and Python numbers; strings,
    bools and None are static, and so is what `static_argnames` names. Outputs have the model's dtypes and live in the
    session's memory; gradients have their input's dtype.

    Args:
      target: a worker's address, or a Session.
      name: which of the worker's models; needed only where it hosts several.
      parameters: "client" makes the model's parameters nn.Parameters of this module, named by their tree path (such as
        `params.Dense_0.kernel`) and trained by any torch optimizer; "worker" leaves them there, frozen.
      static_argnames: arguments whose numbers are part of the program instead of its data.
      timeout_s: seconds for each call; None takes the session's.
    Raises:
      WorkerUnavailable: no worker answers.
      UnknownModel: the worker hosts no such model, or several and no name was given.
    """

    def __init__(
        self,
        target: str | Session,
        *,
        name: str | None = None,
        parameters: str = "client",
        static_argnames: str | Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> None:
        super().__init__()
        if parameters not in ("client", "worker"):
            raise CallerError(f"parameters={parameters!r}; expected 'client' or 'worker'")
        if isinstance(target, str):
            target = connect(target)
        if not isinstance(target, Session):
            raise CallerError(f"the target is a {type(target).__qualname__}; expected a worker's address or a Session")
        self.session = target
        self.timeout_s = timeout_s
        self._model = target.model(name)
        self._static_argnames = frozenset([static_argnames] if isinstance(static_argnames, str) else static_argnames)
        self._calls: dict[Hashable, _Call] = {}
        self._classes = trees.Classes(adopt=_register_dataclass)
        self._key = self._be_known()
        self._owners: list[tuple[nn.Module, str]] = []
        if parameters == "client" and self._model.parameters:
            self._fetch_parameters()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
          DTypeError, StructureError, SpecError: an argument cannot be sent; nothing was.
          RemoteModelError: the model raised; with the remote traceback.
          WorkerDied: the worker died during the call; the next one reconnects.
          CallTimeout: no answer within the time allowed.
        """
        own = self._own_tensors()
        if torch.compiler.is_compiling():
            return _traced_call(self._key, own, args, kwargs)
        for tensor in own:
            if type(tensor) is nn.Parameter:
                self._keep_in_slab(tensor)
        return self._call(own, args, kwargs)

    def _call(self, own: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, structure = _flatten((args, kwargs))
        statics = self._static_leaves(args, kwargs) if self._static_argnames else frozenset()
        signature: list[Any] = [structure]
        inputs: list[Any] = list(own)
        for i, leaf in enumerate(leaves):
            kind = type(leaf)
            if i in statics or kind is bool or kind is str:
                signature.append((kind, leaf if kind is not float else leaf.hex()))
                continue
            if kind in _NUMBERS:
                signature.append(kind)
            else:
                if kind is not Tensor and not isinstance(leaf, Tensor):
                    if _register_if_dataclass(kind):
                        return self._call(own, args, kwargs)  # that leaf has become a node
                    leaf = leaves[i] = _as_tensor(leaf, functools.partial(_path_of, (args, kwargs), i))
                signature.append(leaf.dtype)
                signature.append(leaf.shape if kind is Tensor else _shape_of(leaf))
            inputs.append(leaf)
        for tensor in own:
            signature.append(tensor.dtype)
            signature.append(_shape_of(tensor))
        key = tuple(signature)
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = self._prepare(args, kwargs, leaves, statics, own)
        return call.rebuild(_apply(call.program, inputs))

    def extra_repr(self) -> str:
        return f"{self._model.name!r}, lane={self.session.lane!r}, memory={self.session.memory!r}"

    def __getstate__(self) -> dict[str, Any]:
        # Programs and classes belong to this process: a copy makes its own.
        return {key: value for key, value in self.__dict__.items() if key not in ("_calls", "_classes", "_key")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._calls = {}
        self._classes = trees.Classes(adopt=_register_dataclass)
        self._key = self._be_known()

    def _be_known(self) -> int:
        """Return a number by which compiled code can name this function."""
        key = next(_function_keys)
        _functions[key] = self
        return key

    def _fetch_parameters(self) -> None:
        """Make the model's parameters this module's own: computed by the worker into blocks that they live in."""
        program = self.session.prepare_parameters(self._model.name)
        tensors = [_from_block(*made) for made in zip(self.session.run(program, ()), program.outputs, strict=True)]
        for info, tensor in zip(self._model.parameters, tensors, strict=True):
            owner: nn.Module = self
            *branches, leaf = info.path.split(".")
            for branch in branches:
                owner = owner._modules.setdefault(branch, _Branch())  # type: ignore[assignment]
            # Not by setattr: a model's own names, such as "forward", must not hide this class's.
            if info.trainable:
                owner._parameters[leaf] = nn.Parameter(tensor)
            else:
                owner._buffers[leaf] = tensor
            self._owners.append((owner, leaf))

    def _own_tensors(self) -> list[Tensor]:
        tensors: list[Tensor] = []
        for owner, name in self._owners:
            if (tensor := owner._parameters.get(name)) is not None:
                tensors.append(tensor)
            elif (buffer := owner._buffers.get(name)) is not None:
                tensors.append(buffer)
            else:  # torch.nn.utils.parametrize has made it a property
                tensors.append(getattr(owner, name))
        return tensors

    def _keep_in_slab(self, tensor: nn.Parameter) -> None:
        """Move a parameter's memory into the slab if it is elsewhere: after deepcopy, to(dtype), unpickling, a fork."""
        nbytes = tensor.nbytes
        if nbytes == 0 or self.session.pool.address_of(tensor.data_ptr(), nbytes) is not None:
            return
        is_ours_alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == nbytes
        if not is_ours_alone or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
            return
        if torch.is_inference_mode_enabled() or tensor.is_inference():
            return
        spec = Spec(_DTYPES[tensor.dtype], tuple(tensor.shape))
        moved = _from_block(self.session.pool.lease(nbytes), spec)
        tensor.data = moved.copy_(tensor.detach())

    def _static_leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[int]:
        """Return which leaves belong to static arguments."""
        names = self._model.arguments[: len(args)]
        static_args = [i < len(names) and names[i] in self._static_argnames for i in range(len(args))]
        marks = (
            tuple(_marked(arg, mark) for arg, mark in zip(args, static_args, strict=True)),
            {key: _marked(value, key in self._static_argnames) for key, value in kwargs.items()},
        )
        return frozenset(i for i, mark in enumerate(_flatten(marks)[0]) if mark)

    def _prepare(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: Sequence[Any],
        statics: frozenset[int],
        own: Sequence[Tensor],
    ) -> "_Call":
        """Describe a call of a signature that is new here, and have it prepared."""
        structure = _flatten((args, kwargs))[1]
        slots = [leaf if i in statics or isinstance(leaf, bool | str) else _Slot(i) for i, leaf in enumerate(leaves)]
        slotted: Any = optree.tree_unflatten(structure, slots)
        encoded_args, first = trees.encode(slotted[0], _is_slot, self._classes, root="args")
        encoded_kwargs, second = trees.encode(slotted[1], _is_slot, self._classes, root="kwargs")
        order = [slot.leaf for slot in (*first, *second)]
        if order != sorted(order):
            raise StructureError("a dict of the arguments has keys that cannot be sorted; use strings only")
        arguments = trees.arguments(encoded_args, encoded_kwargs)
        paths = [info.path for info in self._model.parameters[: len(own)]] + trees.argument_paths(arguments)
        inputs = [*own, *(leaves[i] for i in order)]
        x64 = self.session.x64
        described = [_spec_of(value, path, x64) for value, path in zip(inputs, paths, strict=True)]
        program = self.session.prepare_call(
            pb.Call(
                model=self._model.name,
                arguments=arguments,
                inputs=[specs.encode(spec) for spec in described],
                parameters=bool(own),
            ),
            labels=paths,
            timeout_s=self.timeout_s,
        )
        return _Call(program, _rebuilder(program.result, self._classes))


class _Branch(nn.Module):
    """A node of the parameters' tree."""


class _Slot(NamedTuple):
    """Stands for the array leaf of this index."""

    leaf: int


class _Call(NamedTuple):
    """What a signature needs: the program, and the way from its outputs to the result."""

    program: Program
    rebuild: Callable[[Sequence[Tensor]], Any]


# Calls ---------------------------------------------------------------------------------------------------------


def _apply(program: Program, inputs: Sequence[Any]) -> Sequence[Tensor]:
    """Run a program, recorded by autograd where a gradient can be asked for, and seen by torch.func's transforms."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _Transformable.apply(program, *inputs)
    if torch.is_grad_enabled():
        wrt = tuple(i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad)
        if wrt:
            return _Recorded.apply(program, wrt, *inputs)
    return _run(program, inputs)


def _apply_derivative(program: Program, inputs: Sequence[Any]) -> Sequence[Tensor]:
    """Run a derivative as `_apply` does, also on the batched tensors of `is_grads_batched` and `vectorize=True`.

    These come from the vmap that torch had before torch.func, of which autograd.Function knows nothing. They too are
    one call, of the program's batched kind.
    """
    is_batched = [isinstance(x, Tensor) and _is_legacy_batch(x) for x in inputs]
    if not any(is_batched):
        return _apply(program, inputs)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    physical = [torch._remove_batch_dim(x, level, 1, 0) if b else x for x, b in zip(inputs, is_batched, strict=True)]
    size = next(x.shape[0] for x, b in zip(physical, is_batched, strict=True) if b)
    outputs = _apply(program.vmap(tuple(0 if b else -1 for b in is_batched), size), physical)
    return [torch._add_batch_dim(y, 0, level) for y in outputs]


class _Recorded(torch.autograd.Function):
    """A run that keeps a residual, and its VJP."""

    @staticmethod
    def forward(ctx: Any, program: Program, wrt: tuple[int, ...], *inputs: Any) -> tuple[Tensor, ...]:
        outputs, handle = _run_keeping(program.keeping(wrt), inputs)
        numbers = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.call = (program, wrt, numbers)
        # So the residual goes when torch drops the saved tensors: after a backward without retain_graph, with the
        # node, or with whatever a saved-tensor hook makes of them.
        ctx.save_for_backward(handle, *(x for x in inputs if isinstance(x, Tensor)))
        _mark_integers(ctx, program, outputs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        handle, *saved = ctx.saved_tensors
        program, kept, numbers = ctx.call
        # One edge per tensor among the inputs; only what this backward pass is going to use is worth computing.
        edges = iter(ctx.next_functions)
        wanted = [number is None and _is_wanted(next(edges)[0]) for number in numbers]
        wrt = tuple(i for i in kept if wanted[i])
        given = tuple(i for i, ct in enumerate(cotangents) if ct is not None)
        gradients: list[Tensor | None] = [None] * (2 + len(numbers))
        if wrt and given:
            # jax.vjp is linear and torch's gradient is conjugate-linear in the cotangent.
            arrays = [*_merged(numbers, saved), *(_conjugated(ct) for ct in cotangents if ct is not None)]
            # With create_graph the derivative must be a program that can be derived again; in a batch, one of its kind.
            if torch.is_grad_enabled() or any(map(_is_legacy_batch, arrays[len(numbers) :])):
                made = _apply_derivative(program.vjp(wrt, given), arrays)
            else:
                made = _pull_back(program, (kept, wrt, given), handle, arrays)
            for i, gradient in zip(wrt, made, strict=True):
                gradients[2 + i] = _conjugated(gradient)
        return tuple(gradients)


class _Transformable(torch.autograd.Function):
    """A run whose every derivative, and batched version, is the run of another program: for torch.func, forward-mode
    derivatives and their compositions, to any depth. It keeps no residual, since each derivative must be a function
    that can be transformed again."""

    @staticmethod
    def forward(program: Program, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(_run(program, inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        program, *values = inputs
        numbers = [None if isinstance(x, Tensor) else x for x in values]
        tensors = [x for x in values if isinstance(x, Tensor)]
        ctx.call = (program, numbers)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        _mark_integers(ctx, program, output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        program, numbers = ctx.call
        needed = ctx.needs_input_grad[1:]
        return (None, *_gradients(program, _merged(numbers, ctx.saved_tensors), needed, cotangents))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> tuple[Tensor | None, ...]:
        program, numbers = ctx.call
        inputs = _merged(numbers, ctx.saved_tensors)
        wrt = tuple(i for i, t in enumerate(tangents) if isinstance(t, Tensor) and program.inputs[i].dtype.is_inexact)
        outputs = tuple(i for i, spec in enumerate(program.outputs) if spec.dtype.is_inexact)
        made: list[Tensor | None] = [None] * len(program.outputs)
        if wrt and outputs:
            derived = _apply_derivative(program.jvp(wrt, outputs), [*inputs, *(tangents[i] for i in wrt)])
            for i, tangent in zip(outputs, derived, strict=True):
                made[i] = tangent
        return tuple(made)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], program: Program, *inputs: Any) -> tuple[Any, Any]:
        axes = tuple(-1 if dim is None else dim for dim in in_dims[1:])
        outputs = _apply(program.vmap(axes, info.batch_size), inputs)
        return tuple(outputs), (0,) * len(outputs)


def _gradients(
    program: Program, inputs: Sequence[Any], needed: Sequence[bool], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradient of each input that needs one, by the program that is this one's VJP."""
    wrt = tuple(i for i, spec in enumerate(program.inputs) if needed[i] and spec.dtype.is_inexact and not spec.weak)
    given = tuple(i for i, ct in enumerate(cotangents) if ct is not None)
    gradients: list[Tensor | None] = [None] * len(inputs)
    if wrt and given:
        selected = [_conjugated(ct) for ct in cotangents if ct is not None]
        made = _apply_derivative(program.vjp(wrt, given), [*inputs, *selected])
        for i, gradient in zip(wrt, made, strict=True):
            gradients[i] = _conjugated(gradient)
    return gradients


def _mark_integers(ctx: Any, program: Program, outputs: Sequence[Tensor]) -> None:
    """Tell autograd which outputs have no derivative, and that absent cotangents should stay absent."""
    if program.discrete_outputs:
        ctx.mark_non_differentiable(*(outputs[i] for i in program.discrete_outputs))
    ctx.set_materialize_grads(False)


def _merged(numbers: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """Return the inputs of a call: its tensors, with the Python numbers in their places."""
    restored = iter(tensors)
    return [next(restored) if number is None else number for number in numbers]


def _is_wanted(node: Any) -> bool:
    """Whether the backward pass under way will use the gradient that goes to this node."""
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # of a leaf that torch.autograd.grad was asked for by name
        return True


def _conjugated(tensor: Tensor) -> Tensor:
    return tensor.conj() if tensor.is_complex() else tensor


# Runs ----------------------------------------------------------------------------------------------------------


def _run(program: Program, inputs: Sequence[Any]) -> Sequence[Tensor]:
    """Run a program, unseen by autograd: at once, or as an operator where torch only traces."""
    if _is_traced(inputs):
        return torch.ops.torch_jax_bridge.run(_as_tensors(inputs), program.key)
    placed, copied = _place(program, inputs)
    return _from_blocks(program.session.run(program, placed, copied=copied), program.outputs)


def _run_keeping(program: Program, inputs: Sequence[Any]) -> tuple[Sequence[Tensor], Tensor]:
    """Run a program that keeps a residual; return its outputs and the residual's handle.

    The residual goes with the handle's storage. The handle's content is its id, so that a copy, which a saved-tensor
    hook may make, still names it, or nothing at all.
    """
    if _is_traced(inputs):
        *outputs, handle = torch.ops.torch_jax_bridge.run(_as_tensors(inputs), program.key)
        return outputs, handle
    placed, copied = _place(program, inputs)
    blocks, residual = program.session.run_keeping(program, placed, copied=copied)
    handle = torch.frombuffer(_Handle(program.session, residual), dtype=torch.int64)
    return _from_blocks(blocks, program.outputs), handle


def _pull_back(
    program: Program,
    which: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    handle: Tensor,
    arrays: Sequence[Any],
) -> Sequence[Tensor]:
    """Return the cotangents of the inputs, from the residual; if that is gone, by running the inputs once more.

    `which` are the inputs that the residual was kept for, those that are wanted, and the outputs whose cotangents
    follow the inputs in `arrays`.
    """
    kept, wrt, given = which
    if _is_traced([handle, *arrays]):
        return torch.ops.torch_jax_bridge.pull_back(handle, _as_tensors(arrays), program.key, kept, wrt, given)
    pullback = program.keeping(kept).pullback(wrt, given)
    try:
        placed, copied = _place(pullback, arrays[len(program.inputs) :])
        blocks = program.session.run_pullback(pullback, int(handle), placed, copied=copied)
        return _from_blocks(blocks, pullback.outputs)
    except ResidualGone:
        return _run(program.vjp(wrt, given), arrays)


class _Handle(bytearray):
    """The id of a residual as the memory of a tensor; the residual goes with it."""

    def __init__(self, session: Session, residual: int) -> None:
        super().__init__(residual.to_bytes(8, "little"))
        self._session = session
        self._residual = residual

    def __del__(self) -> None:
        self._session.drop_residual(self._residual)


# Tracing -------------------------------------------------------------------------------------------------------

# By which number compiled code names a function.
_functions: "weakref.WeakValueDictionary[int, RemoteJaxFunction]" = weakref.WeakValueDictionary()
_function_keys = itertools.count()
_PLAIN = {Tensor, nn.Parameter, *_NUMBERS}
_is_legacy_batch = torch._C._functorch.is_legacy_batchedtensor


@torch._dynamo.nonstrict_trace
def _traced_call(key: int, own: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function while torch.compile traces, with tensors that have types only: its runs become operators."""
    return _functions[key]._call(own, args, kwargs)


def _is_traced(inputs: Sequence[Any]) -> bool:
    """Whether an input has no memory here to be read, or somebody watches the operators."""
    return torch._C._len_torch_dispatch_stack() > 0 or not _PLAIN.issuperset(map(type, inputs))


def _shape_of(tensor: Tensor) -> tuple[int, ...]:
    # A program has fixed sizes: of a symbolic one, this makes torch.compile guard the size that it has now.
    return tensor.shape if type(tensor) in _PLAIN else tuple(map(int, tensor.shape))


def _as_tensors(inputs: Sequence[Any]) -> list[Tensor]:
    return [x if isinstance(x, Tensor) else torch.tensor(x, dtype=_NUMBERS[type(x)].dtype) for x in inputs]


def _as_values(program: Program, tensors: Sequence[Tensor]) -> list[Any]:
    return [x.item() if spec.weak else x for x, spec in zip(tensors, program.inputs, strict=True)]


def _empty(described: Sequence[Spec]) -> list[Tensor]:
    return [torch.empty(spec.shape, dtype=_TORCH_DTYPES[spec.dtype.name]) for spec in described]


@torch.library.custom_op("torch_jax_bridge::run", mutates_args=())
def _run_operator(arrays: Sequence[Tensor], program: int) -> list[Tensor]:
    """Run a program; one that keeps a residual has the residual's handle as its last output."""
    known = Program.of(program)
    inputs = _as_values(known, arrays)
    if not known.keeps_residual:
        return list(_run(known, inputs))
    outputs, handle = _run_keeping(known, inputs)
    return [*outputs, handle]


@_run_operator.register_fake
def _(arrays: Sequence[Tensor], program: int) -> list[Tensor]:
    known = Program.of(program)
    handle = [torch.empty(1, dtype=torch.int64)] if known.keeps_residual else []
    return _empty(known.outputs) + handle


def _save_run(ctx: Any, inputs: tuple[Sequence[Tensor], int], output: Sequence[Tensor]) -> None:
    arrays, ctx.program = inputs
    ctx.save_for_backward(*arrays)
    ctx.set_materialize_grads(False)


def _differentiate_run(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[list[Tensor | None], None]:
    program = Program.of(ctx.program)
    arrays = ctx.saved_tensors
    inputs = _as_values(program, arrays)
    needed = [x.requires_grad for x in arrays]
    return _gradients(program, inputs, needed, cotangents[: len(program.outputs)]), None


_run_operator.register_autograd(_differentiate_run, setup_context=_save_run)


@torch.library.custom_op("torch_jax_bridge::pull_back", mutates_args=())
def _pull_back_operator(
    handle: Tensor,
    arrays: Sequence[Tensor],
    program: int,
    kept: Sequence[int],
    wrt: Sequence[int],
    given: Sequence[int],
) -> list[Tensor]:
    """Return the cotangents of the inputs `wrt` of a run whose residual this is the handle of; see _pull_back."""
    known = Program.of(program)
    numbers = _as_values(known, arrays[: len(known.inputs)])
    return list(
        _pull_back(known, (tuple(kept), tuple(wrt), tuple(given)), handle, [*numbers, *arrays[len(known.inputs) :]])
    )


@_pull_back_operator.register_fake
def _(
    handle: Tensor,
    arrays: Sequence[Tensor],
    program: int,
    kept: Sequence[int],
    wrt: Sequence[int],
    given: Sequence[int],
) -> list[Tensor]:
    known = Program.of(program)
    return _empty([known.inputs[i] for i in wrt])


# Memory --------------------------------------------------------------------------------------------------------


class _InSlab(NamedTuple):
    """A tensor that lies in the session's memory already, by its storage: that keeps no autograd graph alive."""

    address: int
    storage: torch.UntypedStorage


def _place(program: Program, inputs: Sequence[Any]) -> tuple[list[Placed], int]:
    """Return each input in the session's memory, as the program wants it, and the bytes that had to be copied."""
    pool = program.session.pool
    placed: list[Placed] = []
    copied = 0
    for i, (value, spec) in enumerate(zip(inputs, program.inputs, strict=True)):
        if spec.weak:
            block = pool.lease(spec.dtype.itemsize)
            block.buffer[:] = _packed(value, program.labels[i], program.session)
            placed.append(block)
            continue
        nbytes = value.nbytes
        if _DTYPES.get(value.dtype) is not spec.dtype:
            _check_range(value, spec, program.labels[i])
        elif value.is_contiguous() and not value.is_conj() and not value.is_neg():
            pointer = value.data_ptr()
            address = pool.address_of(pointer, nbytes)
            if address is not None:
                placed.append(_InSlab(address, value.untyped_storage()))
                continue
            block = pool.lease(nbytes)
            # Not copy_: the threads that it wakes for a large copy go on spinning, on the cores that the worker needs.
            ctypes.memmove(block.pointer, pointer, nbytes)
            placed.append(block)
            copied += nbytes
            continue
        block = pool.lease(spec.nbytes)
        if block.nbytes:
            _from_block(block, spec).copy_(value)
            copied += block.nbytes
        placed.append(block)
    return placed, copied


def _from_blocks(blocks: Sequence[Block], described: Sequence[Spec]) -> list[Tensor]:
    return [_from_block(block, spec) for block, spec in zip(blocks, described, strict=True)]


def _from_block(block: Block, spec: Spec) -> Tensor:
    """Return the tensor whose storage is the block: the lease ends with the storage."""
    dtype = _TORCH_DTYPES[spec.dtype.name]
    if block.nbytes == 0:
        return torch.empty(spec.shape, dtype=dtype)
    # Not a view of the flat tensor: autograd forbids in-place changes of views that a Function returns.
    flat = torch.frombuffer(block.memory, dtype=dtype)
    return flat if len(spec.shape) == 1 else flat.resize_(spec.shape)


def _spec_of(value: Any, path: str, x64: bool) -> Spec:
    """Return the type that a value has on the worker.

    Raises:
      DTypeError, SpecError, StructureError: the worker, or this session's memory, cannot hold it.
    """
    if not isinstance(value, Tensor):
        return _NUMBERS[type(value)].spec
    if value.layout is not torch.strided:
        raise StructureError(f"input `{path}` is {value.layout}; make it dense with .to_dense()")
    if value.device.type != "cpu":
        raise SpecError(
            f"input `{path}` is on {value.device}, but this session's memory is the host's; move it with .cpu()"
        )
    dtype = _DTYPES.get(value.dtype)
    if dtype is None:
        raise DTypeError(f"input `{path}` has dtype {value.dtype}, which has no counterpart in JAX; cast it")
    if dtype.name in NEEDS_X64 and not x64:
        narrowed = NARROWED.get(dtype.name)
        if narrowed is None:
            raise DTypeError(
                f"input `{path}` has dtype {dtype.name}, but the worker runs without x64; cast it to a 32-bit type "
                "or start the worker with --x64"
            )
        dtype = narrowed
    return Spec(dtype, tuple(map(int, value.shape)))


def _check_range(value: Tensor, spec: Spec, path: str) -> None:
    """Raise DTypeError unless each integer fits the narrower type that it is going to have on the worker."""
    if value.numel() == 0:
        return
    bounds = torch.iinfo(_TORCH_DTYPES[spec.dtype.name])
    wide = value if value.dtype is torch.int64 else value.view(torch.int64)  # torch cannot order uint64
    low, high = (int(extreme) for extreme in torch.aminmax(wide))
    floor = bounds.min if value.dtype is torch.int64 else 0
    if low < floor or high > bounds.max:
        raise DTypeError(
            f"input `{path}` has dtype {value.dtype} and values from {low} to {high}; the worker runs without x64 and "
            f"holds {spec.dtype.name} only: start it with --x64"
        )


def _packed(value: Any, path: str, session: Session) -> bytes:
    """Return a Python number as bytes.

    Raises:
      DTypeError: an integer that the worker's widest type cannot hold.
    """
    if type(value) is int and not -(2**31) <= value < 2**31:
        if not -(2**63) <= value < 2**63:
            raise DTypeError(f"input `{path}` is the integer {value}, which does not fit in 64 bits; pass a float")
        if not session.x64:
            raise DTypeError(
                f"input `{path}` is the integer {value}; the worker runs without x64 and holds int32 only: start it "
                "with --x64 or pass a float"
            )
    return _NUMBERS[type(value)].pack(value)


def _as_tensor(leaf: Any, path: Callable[[], str]) -> Tensor:
    """Return a leaf that is no tensor, but an array of another library, as one; `path` names it in errors."""
    if hasattr(leaf, "__dlpack__") or hasattr(leaf, "__array__"):
        flags = getattr(leaf, "flags", None)
        if flags is not None and (not flags.writeable or any(stride < 0 for stride in leaf.strides)):
            leaf = leaf.copy()  # of these NumPy arrays torch makes no tensor, or warns
        try:
            return torch.as_tensor(leaf)
        except (TypeError, ValueError, RuntimeError) as error:
            raise StructureError(
                f"`{path()}` is a {type(leaf).__qualname__} that torch cannot read: {error}"
            ) from error
    raise StructureError(
        f"`{path()}` is a {type(leaf).__module__}.{type(leaf).__qualname__}; expected a tensor, a number, bool, str "
        "or None, or a dict, list, tuple, namedtuple or dataclass of these"
    )


# Structures ----------------------------------------------------------------------------------------------------


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    return optree.tree_flatten(tree, namespace=_NAMESPACE)


def _path_of(arguments: tuple[tuple[Any, ...], dict[str, Any]], position: int) -> str:
    """Return the path of a leaf of a call's arguments, such as `args[0]['w']`."""
    tree: Any = arguments
    accessor = optree.tree_accessors(tree, namespace=_NAMESPACE)[position]
    return accessor[1:].codify("args" if accessor[0].entry == 0 else "kwargs")


def _register_if_dataclass(cls: type) -> bool:
    """Make a dataclass that is met for the first time a pytree node; return whether it is one."""
    if not dataclasses.is_dataclass(cls):
        return False
    _register_dataclass(cls, tuple(field.name for field in dataclasses.fields(cls)))
    return True


def _register_dataclass(cls: type, fields: tuple[str, ...]) -> None:
    """Make a dataclass a pytree node here; static fields travel as values."""

    def flatten(value: Any) -> Any:
        return [getattr(value, field) for field in fields], None, fields

    def unflatten(_: Any, children: Any) -> Any:
        return trees.instantiate(cls, fields, children)

    optree.register_pytree_node(cls, flatten, unflatten, namespace=_NAMESPACE)


def _marked(value: Any, mark: bool) -> Any:
    return optree.tree_map(lambda _: mark, value, namespace=_NAMESPACE)


def _is_slot(value: Any) -> bool:
    return type(value) is _Slot


def _rebuilder(tree: pb.Tree, classes: trees.Classes) -> Callable[[Sequence[Tensor]], Any]:
    """Return the function from a result's leaves to the result."""
    kind = tree.WhichOneof("kind")
    if kind == "leaf":
        return lambda leaves: leaves[0]
    return lambda leaves: trees.build(tree, leaves, classes)
