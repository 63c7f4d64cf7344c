"""RemoteJaxFunction: signatures, parameters, and the way in from torch.compile."""

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from bridge_client.arguments import NUMBERS, Slot, encode, marked_static, names_of
from bridge_client.futures import completed
from bridge_client.programs import Program
from bridge_client.remote.connecting import session_for
from bridge_client.session import Session, checked_limit
from bridge_client.torch import compiled
from bridge_client.torch.derivatives import apply, prepared
from bridge_client.torch.families import Seen, for_all_sizes, seen
from bridge_client.torch.memory import (
    DTYPES,
    TORCH_DTYPES,
    as_tensor,
    cast_floats,
    copied_into,
    from_block,
    is_sole_owner,
    spec_of,
)
from bridge_client.torch.pytrees import (
    flatten,
    marked,
    path_of,
    rebuilder,
    register_dataclass,
    register_if_container,
)
from bridge_client.torch.runs import PLAIN, is_traced
from bridge_client.torch.threads import autocast_is_on, is_bound_to_this_thread, thread_state
from bridge_wire import specs, trees
from bridge_wire.errors import BridgeError, CallerError, SpecError, StructureError
from bridge_wire.pb import bridge_pb2 as pb

_log = logging.getLogger(__name__)


class RemoteJaxFunction(nn.Module):
    """A JAX function, or a model with parameters, that runs in a worker process, as a
    differentiable torch module.

    Call it with pytrees (dict, list, tuple, namedtuple, dataclass, None) of tensors and Python
    numbers; strings, bools and None are static, and so is what `static_argnames` names. Outputs
    have the model's dtypes and live in the session's memory; gradients have their input's dtype.

    Args:
      target: a worker's address, a Session, or a JAX function or model, which then runs in this
        process.
      name: which of the worker's models; needed only where it hosts several.
      parameters: "client" makes the model's parameters nn.Parameters of this module, named by their
        tree path (such as `params.Dense_0.kernel`) and trained by any torch optimizer; "worker"
        leaves them there, frozen.
      static_argnames: arguments whose numbers are part of the program instead of its data.
      rngs: names of the random streams that the model draws from in training mode, such as
        "dropout". Each call then takes a new key from torch's default generator, so that
        torch.manual_seed decides what is drawn.
      mutable: whether calls in training mode change the model's buffers, such as the statistics of
        a BatchNorm. Their new values are written into this module's buffers after the call.
      timeout_s: seconds for each call; None takes the session's.
      cast_inputs: under torch.autocast, cast float arguments and parameters, but not float64, to
        this dtype, as torch.amp.custom_fwd does. None: autocast changes nothing, and the model
        computes in the dtypes it is given.
    Raises:
      WorkerUnavailable: no worker answers.
      TargetError: the target is nothing that can be served.
      UnknownModel: the worker hosts no such model, or several and no name was given.
    """

    def __init__(
        self,
        target: str | Session | Any,
        *,
        name: str | None = None,
        parameters: str = "client",
        static_argnames: str | Sequence[str] = (),
        rngs: str | Sequence[str] = (),
        mutable: bool = False,
        timeout_s: float | None = None,
        cast_inputs: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if parameters not in ("client", "worker"):
            raise CallerError(f"parameters={parameters!r}; expected 'client' or 'worker'")
        if cast_inputs is not None and not (
            isinstance(cast_inputs, torch.dtype) and cast_inputs.is_floating_point
        ):
            raise CallerError(
                f"cast_inputs={cast_inputs!r}; expected a float dtype such as torch.bfloat16, or"
                " None"
            )
        if mutable and parameters == "worker":
            raise CallerError(
                "mutable=True needs parameters='client': the worker's own are the same for every"
                " client"
            )
        if isinstance(target, nn.Module):
            raise CallerError(
                f"the target is a {type(target).__qualname__}, which torch can call as it is;"
                " expected a worker's address, a Session or a JAX model"
            )
        self.session = session = session_for(target, "jax")
        self.timeout_s = checked_limit(timeout_s)
        self.cast_inputs = cast_inputs
        self._model = session.model(name)
        self._static_argnames = frozenset(names_of("static_argnames", static_argnames))
        self._rngs = names_of("rngs", rngs)
        self._is_mutable = mutable
        self._is_stateful = mutable or bool(self._rngs)
        self._mode = int(pb.MODE_UNSPECIFIED)
        self._buffer_positions: list[int] = []
        self._calls: dict[Hashable, _Call] = {}
        self._classes = trees.Classes(adopt=register_dataclass)
        self._key = compiled.name(self)
        self._owners: list[tuple[nn.Module, str]] = []
        if parameters == "client" and self._model.parameters:
            self._fetch_parameters()
        if mutable and all(info.trainable for info in self._model.parameters):
            raise CallerError(
                f"mutable=True, but the model {self._model.name!r} has no buffers that could change"
            )

    def train(self, mode: bool = True) -> "RemoteJaxFunction":
        """Set training mode, in which calls draw keys and change buffers, or leave it.

        A flax.nnx or equinox model is put into that mode at each later call. Before the first
        `train` or `eval`, of this module or one that contains it, such a model has the mode in
        which it was loaded.
        """
        super().train(mode)
        if self._model.has_modes:
            self._mode = int(pb.MODE_TRAINING if mode else pb.MODE_INFERENCE)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
          DTypeError, StructureError, SpecError: an argument cannot be sent; nothing was.
          RemoteModelError: the model raised; with the remote traceback.
          WorkerDied: the worker died during the call; the next one reconnects.
          CallTimeout: no answer within the time allowed.
        """
        own = self._own_tensors()
        if self._is_stateful and self.training:
            return self._call_stateful(own, args, kwargs)
        if torch.compiler.is_compiling():
            return compiled.call(self._key, own, args, kwargs, self._mode)
        for tensor in own:
            if type(tensor) is nn.Parameter:
                self._keep_in_slab(tensor)
        return self._call(own, args, kwargs, self._mode)

    def _call_stateful(
        self, own: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the model in training mode: with a new key, and with buffers that change."""
        given = list(own)
        if self._is_mutable and torch.is_grad_enabled():
            # Autograd keeps these values: a backward pass may need them after the buffers
            # themselves have changed.
            for i in self._buffer_positions:
                given[i] = self._cloned(own[i])
        if self._rngs:
            given.append(self._key_for_call())
        if torch.compiler.is_compiling():
            result, changed = compiled.call(
                self._key, given, args, kwargs, self._mode, is_stateful=True
            )
        else:
            result, changed = self._call(given, args, kwargs, self._mode, is_stateful=True)
        if self._is_mutable:
            with torch.no_grad():
                for i, value in zip(self._buffer_positions, changed, strict=True):
                    own[i].copy_(value)
        return result

    def _key_for_call(self) -> Tensor:
        """Return a new key; of a submitted call the one that was drawn when it was submitted."""
        if torch.compiler.is_compiling():
            return _draw_key()
        function, key = _submitted.get()
        return key if function is self and key is not None else _draw_key()

    def _call(
        self,
        own: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        mode: int,
        is_stateful: bool = False,
        shape_of: "Callable[[Tensor], tuple[Any, ...]] | None" = None,
    ) -> Any:
        """Call the model with these parameters (and key). Return the result, of a stateful call
        with its buffers.

        `shape_of` says which of the sizes that are symbolic may stay so; None: there are none.
        """
        if self.cast_inputs is not None and autocast_is_on():
            cast, args, kwargs = cast_floats((own, args, kwargs), self.cast_inputs)
            for i in self._buffer_positions:  # statistics would lose what a step adds to them
                cast[i] = own[i]
            own = cast
        statics = self._static_leaves(args, kwargs) if self._static_argnames else frozenset()
        if shape_of is None:
            is_jit_tracing = torch._C._get_tracing_state() is not None  # then sizes are tensors
            shape_of = _fixed_shape_of if is_jit_tracing else _shape_of
        signature: list[Any] = []
        for tensor in own:
            signature.append(tensor.dtype)
            signature.append(shape_of(tensor))
        inputs: list[Any] = list(own)
        if (
            not kwargs
            and not statics
            and shape_of is _shape_of
            and _TENSORS.issuperset(map(type, args))
        ):
            for tensor in args:  # the usual call
                signature.append(tensor.dtype)
                signature.append(tensor.shape)
            signature.append(len(args))
            inputs += args
            leaves, structure = list(args), None
        else:
            leaves, structure = flatten((args, kwargs))
            signature.append(structure)
            for i, leaf in enumerate(leaves):
                kind = type(leaf)
                if kind in _SYMBOLIC and (i in statics or kind is torch.SymBool):
                    kind = _SYMBOLIC[kind]
                    leaf = leaves[i] = kind(leaf)  # has torch compile anew for another value
                if i in statics or kind is bool or kind is str:
                    if kind not in _STATIC:
                        if register_if_container(kind):
                            return self._call(
                                own, args, kwargs, mode, is_stateful, shape_of
                            )  # that leaf is a node now
                        raise _not_static(leaf, path_of((args, kwargs), i))
                    # By its text a number differs from what equals it: 0.0 from -0.0.
                    signature.append((kind, leaf if kind is str else repr(leaf)))
                    continue
                if kind in _SYMBOLIC:
                    kind = _SYMBOLIC[kind]
                    leaves[i] = kind()
                    # By arithmetic, which torch.compile can follow with a float that stays
                    # symbolic.
                    leaf = (
                        torch.ones((), dtype=TORCH_DTYPES[NUMBERS[kind].dtype.name], device="cpu")
                        * leaf
                    )
                if kind in NUMBERS:
                    signature.append(kind)
                else:
                    if kind is not Tensor and not isinstance(leaf, Tensor):
                        if register_if_container(kind):
                            return self._call(
                                own, args, kwargs, mode, is_stateful, shape_of
                            )  # that leaf is a node now
                        leaf = leaves[i] = as_tensor(
                            leaf, functools.partial(path_of, (args, kwargs), i)
                        )
                    signature.append(leaf.dtype)
                    signature.append(shape_of(leaf))
                inputs.append(leaf)
        if is_stateful:
            signature.append("stateful")
        if mode:
            signature.append(mode)
        key = tuple(signature)
        call = self._calls.get(key)
        if call is None:
            if structure is None:
                structure = flatten((args, kwargs))[1]
            call = self._calls[key] = self._prepare(
                structure, leaves, statics, own, mode, is_stateful, shape_of
            )
        outputs = apply(call.program, inputs)
        if is_stateful:
            results = len(outputs) - call.program.changed
            return call.rebuild(outputs[:results]), outputs[results:]
        return call.rebuild(outputs)

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Begin a call, and return its future; `gather` waits for several. Submitted calls run side
        by side, at most 32 of a session, and beside this thread's own work.

        Grad mode and autocast are the caller's, and the result is part of the autograd graph. Do
        not change the arguments in place until the result is there. A future that is cancelled
        before its call has begun never calls; one whose call is under way cannot be cancelled, and
        a result that nobody waits for is dropped when it comes. Where this thread is tracing,
        transforming or packing saved tensors, which other threads cannot do for it, the call is
        made at once. What random streams are going to draw is decided here.

        Raises:
          CallerError: the call would change the model's buffers, which calls side by side cannot.
        """
        if is_bound_to_this_thread():
            return completed(lambda: self(*args, **kwargs))
        if self._is_mutable and self.training:
            raise CallerError(
                "a call that changes buffers cannot be submitted: call it at once, or use .eval()"
            )
        key = _draw_key() if self._rngs and self.training else None
        inherit = thread_state()

        def call() -> Any:
            with inherit(), _submitting(self, key):
                return self(*args, **kwargs)

        return self.session.submit(call)

    def extra_repr(self) -> str:
        try:
            return (
                f"{self._model.name!r}, lane={self.session.lane!r}, memory={self.session.memory!r}"
            )
        except BridgeError:  # the session is closed, or its worker gone: to print must not raise
            return repr(self._model.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RemoteJaxFunction":
        # Written out, since torch.nn.utils.parametrize replaces __getstate__ by one that raises.
        copied = memo[id(self)] = self.__new__(type(self))
        copied.__setstate__(copy.deepcopy(RemoteJaxFunction.__getstate__(self), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # Programs and classes belong to this process: a copy makes its own.
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("_calls", "_classes", "_key")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._calls = {}
        self._classes = trees.Classes(adopt=register_dataclass)
        self._key = compiled.name(self)
        self._keep_all_in_slab()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RemoteJaxFunction":
        super()._apply(fn, recurse)
        self._keep_all_in_slab()
        return self

    def _fetch_parameters(self) -> None:
        """Make the model's parameters this module's own: computed by the worker into blocks that
        they live in."""
        program = self.session.prepare_parameters(self._model.name)
        tensors = [
            from_block(*made)
            for made in zip(self.session.run(program, ()), program.outputs, strict=True)
        ]
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
                self._buffer_positions.append(len(self._owners))
            self._owners.append((owner, leaf))

    def _own_tensors(self) -> list[Tensor]:
        tensors: list[Tensor] = []
        refreshed: list[nn.Module] = []
        for owner, name in self._owners:
            if (tensor := owner._parameters.get(name)) is not None:
                tensors.append(tensor)
            elif (buffer := owner._buffers.get(name)) is not None:
                tensors.append(buffer)
            else:
                # a property, by torch.nn.utils.parametrize, or an attribute that hooks set before
                # each call
                if owner is not self and owner not in refreshed:
                    refreshed.append(owner)
                    owner()
                tensors.append(getattr(owner, name))
        return tensors

    def _keep_all_in_slab(self) -> None:
        """Move parameters and buffers before anybody can hold views of them, such as a
        state_dict."""
        if self.session.is_closed:  # a model that was trained can still be copied and cast
            return
        for owner, name in self._owners:
            for tensor in (owner._parameters.get(name), owner._buffers.get(name)):
                if tensor is not None and type(tensor) in PLAIN:
                    self._keep_in_slab(tensor)

    def _keep_in_slab(self, tensor: Tensor) -> None:
        """Move a tensor's memory into the slab if it is elsewhere: after deepcopy, to(dtype),
        unpickling, a fork.

        Memory that anything else uses stays where it is, and is copied for each call: other
        processes (share_memory), views, and owners that write into the storage later, such as
        FSDP2's all-gather.
        """
        nbytes = tensor.nbytes
        pool = self.session.gpu_pool() if tensor.is_cuda else self.session.pool
        if nbytes == 0 or pool is None or pool.address_of(tensor.data_ptr(), nbytes) is not None:
            return
        is_whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == nbytes
        if not is_whole or (tensor.is_cpu and tensor.is_shared()) or tensor.dtype not in DTYPES:
            return
        if not is_sole_owner(tensor):
            return
        if torch.is_inference_mode_enabled() or tensor.is_inference():
            return
        moved = copied_into(self.session, tensor)
        if moved is not None:
            tensor.data = moved

    def _cloned(self, buffer: Tensor) -> Tensor:
        if (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or is_traced([buffer])
        ):
            return buffer.clone()
        is_sendable = buffer.dtype in DTYPES and buffer.layout is torch.strided
        copied = copied_into(self.session, buffer) if is_sendable else None
        return buffer.clone() if copied is None else copied

    def _static_leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[int]:
        """Return which leaves belong to static arguments."""
        marks = marked_static(args, kwargs, self._model.arguments, self._static_argnames, marked)
        return frozenset(i for i, mark in enumerate(flatten(marks)[0]) if mark)

    def _prepare(
        self,
        structure: Any,
        leaves: Sequence[Any],
        statics: frozenset[int],
        own: Sequence[Tensor],
        mode: int,
        is_stateful: bool,
        shape_of: Callable[[Tensor], tuple[Any, ...]],
    ) -> "_Call":
        """Describe a call of a signature that is new here, and have it prepared."""
        slots = [
            leaf if i in statics or isinstance(leaf, bool | str) else Slot(i)
            for i, leaf in enumerate(leaves)
        ]
        slotted: Any = optree.tree_unflatten(structure, slots)
        arguments, order = encode(slotted, self._classes)
        if order != sorted(order):
            raise StructureError(
                "a dict of the arguments has keys that cannot be sorted; use strings only"
            )
        rngs = self._rngs if is_stateful else ()
        paths = [info.path for info in self._model.parameters] if self._owners else []
        paths += ["the key"] * bool(rngs) + trees.argument_paths(arguments)
        inputs = [*own, *(leaves[i] for i in order)]
        x64 = self.session.x64
        shapes = [shape_of(value) if isinstance(value, Tensor) else () for value in inputs]
        now = [tuple([getattr(size, "now", size) for size in shape]) for shape in shapes]
        described = [
            spec_of(value, path, x64, shape)
            for value, path, shape in zip(inputs, paths, now, strict=True)
        ]
        program = self.session.described_call(
            pb.Call(
                model=self._model.name,
                arguments=arguments,
                inputs=[specs.encode(spec) for spec in described],
                parameters=bool(self._owners),
                rngs=rngs,
                mutable=is_stateful and self._is_mutable,
                mode=mode,  # type: ignore[arg-type]
            ),
            labels=paths,
            timeout_s=self.timeout_s,
        )
        program = prepared(program, inputs)
        if any(isinstance(size, Seen) for shape in shapes for size in shape):
            program = for_all_sizes(program, shapes)
        return _Call(program, rebuilder(program.result, self._classes))

    def _call_traced(
        self,
        own: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        mode: int,
        is_stateful: bool,
    ) -> Any:
        """Call with symbolic sizes, as torch.compile traces them; if that cannot be, with those
        that they have now."""
        if not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0:
            try:
                return self._call(own, args, kwargs, mode, is_stateful, _seen_shape_of)
            except SpecError as error:
                _log.debug("a call is compiled for its present sizes, since %s", error)
        return self._call(own, args, kwargs, mode, is_stateful, _fixed_shape_of)


_TENSORS = {Tensor}
_STATIC = {bool, str, *NUMBERS}
# Numbers that torch.compile has found to change between calls: data of the graph, as they are of a
# call.
_SYMBOLIC: Mapping[type, type] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}


class _Branch(nn.Module):
    """A node of the parameters' tree.

    A call runs its hooks, of which pruning and weight_norm have theirs.
    """

    def forward(self) -> None:
        """Do nothing: the worker uses the parameters."""


class _Call(NamedTuple):
    """What a signature needs: the program, and the way from its outputs to the result."""

    program: Program
    rebuild: Callable[[Sequence[Tensor]], Any]


# The function whose submitted call runs in this thread, and the key that was drawn for it.
_submitted: "ContextVar[tuple[RemoteJaxFunction | None, Tensor | None]]" = ContextVar(
    "_submitted", default=(None, None)
)


@contextlib.contextmanager
def _submitting(function: "RemoteJaxFunction", key: Tensor | None) -> Iterator[None]:
    token = _submitted.set((function, key))
    try:
        yield
    finally:
        _submitted.reset(token)


def _not_static(leaf: Any, path: str) -> StructureError:
    return StructureError(
        f"`{path}` is a {type(leaf).__module__}.{type(leaf).__qualname__}, and static; expected a"
        " number, bool, str or None, or a dict, list, tuple, namedtuple or dataclass of these"
    )


def _draw_key() -> Tensor:
    """Return a key for the worker's random streams, from torch's default generator."""
    return torch.randint(0, 2**32, (2,), dtype=torch.uint32, device="cpu")


def _shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tensor.shape if type(tensor) in PLAIN else _fixed_shape_of(tensor)


def _seen_shape_of(tensor: Tensor) -> tuple[int | Seen, ...]:
    return tuple(map(seen, tensor.shape))


def _fixed_shape_of(tensor: Tensor) -> tuple[int, ...]:
    if tensor.is_nested:
        raise StructureError(
            "an argument is a nested tensor; pad it with .to_padded_tensor(...), or call for each"
            " of its parts"
        )
    # A program has fixed sizes: of a symbolic one, this makes torch.compile guard the size that it
    # has now.
    return tuple(map(int, tensor.shape))
