"""RemoteJaxFunction: a module whose calls find a prepared program by their signature."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bridge_client.arguments import (
    Args,
    Kwargs,
    Values,
    check_arguments,
    marked_static,
    method_name,
    names_of,
    present_as,
    recipes_for,
)
from bridge_client.futures import completed
from bridge_client.programs import Recent
from bridge_client.remote.connecting import session_for
from bridge_client.session import Session, as_html, checked_limit
from bridge_client.torch import graphs, modes, signatures
from bridge_client.torch.derivatives import apply, prepare
from bridge_client.torch.families import AnyProgram, Seen, for_all_sizes, now
from bridge_client.torch.memory import cast_floats, spec_of
from bridge_client.torch.parameters import (
    Owners,
    cloned,
    fetch,
    keep_all_in_slab,
    keep_parameters_in_slab,
    tensors_of,
)
from bridge_client.torch.pytrees import (
    flatten,
    flatten_fully,
    marked,
)
from bridge_client.torch.signatures import TENSORS, ShapeOf
from bridge_wire import specs, trees
from bridge_wire.errors import BridgeError, CallerError, SpecError
from bridge_wire.pb import bridge_pb2 as pb

_log = logging.getLogger(__name__)

_NO_LEAVES: frozenset[int] = frozenset()


class RemoteJaxFunction(nn.Module):
    """A JAX function, or a model with parameters, that runs in a worker process, as a
    differentiable torch module.

    Call it with pytrees (dict, list, tuple, namedtuple, dataclass, None) of tensors and Python
    numbers. Strings, bools, None and the arguments in `static_argnames` are static. Outputs have
    the model's dtypes and live in the session's memory; gradients have their input's dtype.

    Args:
      target: a worker's address, a Session, or a JAX function or model, which then runs in this
        process.
      name: one of the worker's models; needed only if it hosts several.
      method: one of the model's methods; None calls the model itself. See also `method()`.
      parameters: "client" makes the model's parameters nn.Parameters of this module, named by their
        tree path (such as `params.Dense_0.kernel`) and trained by any torch optimizer; "worker"
        leaves them on the worker, frozen.
      static_argnames: arguments whose numbers are part of the program instead of its data.
      rngs: names of the model's random streams in training mode, such as "dropout". Each call then
        takes a new key from torch's default generator, so that torch.manual_seed decides all
        samples.
      mutable: whether calls in training mode change the model's buffers, such as the statistics of
        a BatchNorm. Their new values are written into this module's buffers after the call.
      timeout_s: seconds for each call; None takes the session's.
      cast_inputs: under torch.autocast, cast float arguments and parameters, but not float64, to
        this dtype, as torch.amp.custom_fwd does. None: autocast changes nothing, and the model
        computes in the dtypes it is given.
    Raises:
      WorkerUnavailable: no worker answers.
      TargetError: the target cannot be served.
      UnknownModel: the worker hosts no such model, or several and no name was given.
      CallerError: the model has no such method.
    """

    def __init__(
        self,
        target: str | Session | Any,
        *,
        name: str | None = None,
        method: str | None = None,
        parameters: str = "client",
        static_argnames: str | Sequence[str] = (),
        rngs: str | Sequence[str] = (),
        mutable: bool = False,
        timeout_s: float | None = None,
        cast_inputs: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_options(target, parameters, mutable, cast_inputs)
        self.session = session = session_for(target, "jax")
        self.timeout_s = checked_limit(timeout_s)
        self.cast_inputs = cast_inputs
        self._model = session.model(name)
        self._method = method_name(method)
        self._arguments = self._model.arguments_of(self._method)
        # Of a module without a name, torch.func takes the repr, which torch.compile cannot trace.
        self.__name__ = ".".join(filter(None, (self._model.name, self._method)))
        self._present()
        # The functions that share this one's parameters, by method; empty if there are no others.
        self._methods: dict[str, RemoteJaxFunction] = {}
        self._static_argnames = frozenset(names_of("static_argnames", static_argnames))
        self._rngs = names_of("rngs", rngs)
        self._is_mutable = mutable
        self._is_stateful = mutable or bool(self._rngs)
        self._mode = int(pb.MODE_UNSPECIFIED)
        self._calls: Recent[_Call] = Recent()
        self._number = graphs.number_of(self)
        self._owners: Owners = []
        self._buffer_positions: list[int] = []
        infos = self._model.parameters
        if parameters == "client" and infos:
            self._owners = fetch(self, session, self._model)
            self._buffer_positions = [
                i for i, info in enumerate(infos) if not info.trainable
            ]
        if mutable and all(info.trainable for info in infos):
            raise CallerError(
                f"mutable=True, but the model {self._model.name!r} has no buffers that could change"
            )

    def train(self, mode: bool = True) -> "RemoteJaxFunction":
        """Set or leave training mode, in which calls take random keys and change buffers.

        A flax.nnx or equinox model is put into that mode at each later call. Before the first
        `train` or `eval`, of this module or one that contains it, the model has the mode in which
        it was loaded. A flax.linen or haiku model gets the mode as its argument `train`,
        `training`, `is_training`, `deterministic`, `use_running_average`, `inference` or `eval`, if
        it has one and the call passes none. All methods of one model have one mode.
        """
        super().train(mode)
        for function in (self, *self._methods.values()):
            function.training = mode
            if self._model.has_modes:
                function._mode = int(pb.MODE_TRAINING if mode else pb.MODE_INFERENCE)
        return self

    def method(self, name: str) -> "RemoteJaxFunction":
        """Return the function that calls a method of the same model.

        It has the options, the mode, and the very parameters and buffers of this function.
        `session.models[...].methods` lists the methods.

        Raises:
          CallerError: the model has no public method of this name.
        """
        key = method_name(name)
        function = self if key == self._method else self._methods.get(key)
        if function is None:
            arguments = self._model.arguments_of(key)
            function = self.__new__(type(self))
            nn.Module.__init__(function)
            hooks = {
                name: each for name, each in vars(function).items() if "_hook" in name
            }
            state = RemoteJaxFunction.__getstate__(self) | hooks
            function.__setstate__(state | {"_method": key, "_arguments": arguments})
            function._present()
            self._methods |= {self._method: self, key: function}
        return function

    def _present(self) -> None:
        model = self._model
        present_as(self, model.signature_of(self._method), model.doc)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
          ArgumentError: an argument is missing or unexpected; nothing was sent.
          DTypeError, StructureError, SpecError: an argument cannot be sent; nothing was sent.
          RemoteModelError: the model raised; with the remote traceback.
          WorkerDied: the worker died during the call; the next call reconnects.
          CallTimeout: no answer within the time allowed.
        """
        own = tensors_of(self._owners, self) if self._owners else []
        if self._is_stateful and self.training:
            return self._call_stateful(own, args, kwargs)
        if modes.is_compiling():
            return self._call_compiled(own, args, kwargs)
        if own:
            keep_parameters_in_slab(self.session, own)
        return self._call(own, args, kwargs)

    def _call_stateful(self, own: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        """Call the model in training mode: with a new random key, and with buffers that change."""
        inputs = list(own)
        if self._is_mutable and torch.is_grad_enabled():
            # Autograd keeps these values: a backward pass may need them after the buffers
            # themselves have changed.
            for i in self._buffer_positions:
                inputs[i] = cloned(self.session, own[i])
        if self._rngs:
            inputs.append(self._key_for_call())
        call = self._call_compiled if modes.is_compiling() else self._call
        result, buffers = call(inputs, args, kwargs, is_stateful=True)
        if self._is_mutable:
            with torch.no_grad():
                for i, value in zip(self._buffer_positions, buffers, strict=True):
                    own[i].copy_(value)
        return result

    def _key_for_call(self) -> Tensor:
        """Return a new random key; in a submitted call the key that was made at submission."""
        if modes.is_compiling():
            return _new_key()
        function, key = _submitted.get()
        return key if function is self and key is not None else _new_key()

    def _call_compiled(
        self,
        own: Sequence[Tensor],
        args: Args,
        kwargs: Kwargs,
        *,
        is_stateful: bool = False,
    ) -> Any:
        """Call the model while torch.compile traces this code."""
        from bridge_client.torch import compiled  # imports Dynamo: 4 s (torch 2.13)

        return compiled.call(self._number, own, args, kwargs, self._mode, is_stateful)

    def call_traced(
        self,
        own: Sequence[Tensor],
        arguments: signatures.Arguments,
        mode: int,
        is_stateful: bool,
    ) -> Any:
        """Call the model on tensors without values: with symbolic sizes, or if the worker has no
        formulas for them, with the sizes at present."""
        args, kwargs = arguments
        call = partial(
            self._call, own, args, kwargs, mode=mode, is_stateful=is_stateful
        )
        if not modes.is_transforming():
            try:
                return call(shape_of=signatures.symbolic_shape_of)
            except SpecError as error:
                _log.debug("a call is compiled for its present sizes, since %s", error)
        return call(shape_of=signatures.fixed_shape_of)

    def _call(
        self,
        own: Sequence[Tensor],
        args: Args,
        kwargs: Kwargs,
        *,
        mode: int | None = None,
        is_stateful: bool = False,
        shape_of: ShapeOf | None = None,
    ) -> Any:
        """Call the model with these parameters (and random key). Return the result; of a stateful
        call also the new values of the buffers.

        `shape_of` decides which symbolic sizes stay symbolic; None: there are none.
        """
        if self.cast_inputs is not None and modes.is_autocast_on():
            own, args, kwargs = self._cast(self.cast_inputs, (own, args, kwargs))
        if shape_of is None:
            is_jit_tracing = modes.jit_trace() is not None
            shape_of = (
                signatures.fixed_shape_of
                if is_jit_tracing
                else signatures.plain_shape_of
            )
        if (
            not kwargs
            and not self._static_argnames
            and shape_of is signatures.plain_shape_of
            and TENSORS.issuperset(map(type, args))
        ):
            flat, statics = None, _NO_LEAVES
            key, inputs = signatures.of_tensors(own, args)
        else:
            flat = flatten_fully((args, kwargs))
            statics = (
                self._static_leaves(args, kwargs)
                if self._static_argnames
                else _NO_LEAVES
            )
            key, inputs = signatures.of_pytrees(
                own, (args, kwargs), flat, statics, shape_of
            )
        mode = self._mode if mode is None else mode
        signature = (*key, mode, is_stateful)
        call = self._calls[signature]
        if call is None:
            rngs = self._rngs if is_stateful else ()
            expected = self._model.signature_of(self._method)
            check_arguments(self._model.name, expected, (args, kwargs), rngs)
            flat = flat or flatten((args, kwargs))
            arguments, data = signatures.encoded(flat, statics)
            call = self._prepare(arguments, [*own, *data], mode, is_stateful, shape_of)
            self._calls.remember(signature, call)
        outputs = apply(call.program, inputs)
        if is_stateful:
            results = len(outputs) - call.program.prepared.buffer_outputs
            return call.rebuild(outputs[:results]), outputs[results:]
        return call.rebuild(outputs)

    def _cast(
        self, dtype: torch.dtype, tensors: tuple[Any, Args, Kwargs]
    ) -> tuple[Any, Args, Kwargs]:
        """Return a call's parameters, args and kwargs in this dtype."""
        own = tensors[0]
        cast, args, kwargs = cast_floats(tensors, dtype)
        # Statistics would lose the small change of each step.
        for i in self._buffer_positions:
            cast[i] = own[i]
        return cast, args, kwargs

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Begin a call, and return its future; `gather` waits for several. Submitted calls run side
        by side, at most 32 of a session, and beside this thread's own work.

        Grad mode and autocast are the caller's, and the result is part of the autograd graph. Do
        not change the arguments in place until the result is there. A future that is cancelled
        before its call has begun never calls. A call under way cannot be cancelled; its result is
        dropped if nobody waits for it. If this thread is tracing, transforming or packing saved
        tensors, which other threads cannot do for it, the call is made at once. The random key is
        made at submission.

        Raises:
          CallerError: the call would change the model's buffers, which calls side by side cannot
            do.
        """
        if modes.is_bound_to_this_thread():
            return completed(lambda: self(*args, **kwargs))
        if self._is_mutable and self.training:
            raise CallerError(
                "a call that changes buffers cannot be submitted: call it at once, or use .eval()"
            )
        key = _new_key() if self._rngs and self.training else None
        inherit = modes.thread_state()

        def call() -> Any:
            with inherit(), _submitting(self, key):
                return self(*args, **kwargs)

        return self.session.submit(call)

    def extra_repr(self) -> str:
        try:
            session = self.session
            return f"{self._name!r}, lane={session.lane!r}, memory={session.memory!r}"
        except BridgeError:
            # The session is closed, or its worker gone: printing must not raise.
            return repr(self._name)

    def _repr_html_(self) -> str:
        return as_html(repr(self), [self._model], self._method)

    @property
    def _name(self) -> str:
        return ".".join(filter(None, (self._model.name, self._method)))

    def __deepcopy__(self, memo: dict[int, Any]) -> "RemoteJaxFunction":
        # Written out, since torch.nn.utils.parametrize replaces __getstate__ by a function that
        # raises.
        function = memo[id(self)] = self.__new__(type(self))
        function.__setstate__(copy.deepcopy(RemoteJaxFunction.__getstate__(self), memo))
        return function

    def __getstate__(self) -> Kwargs:
        # Programs belong to this process: a copy makes its own.
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("_calls", "_number")
        }

    def __setstate__(self, state: Kwargs) -> None:
        super().__setstate__(state)
        self._calls = Recent()
        self._number = graphs.number_of(self)
        keep_all_in_slab(self.session, self._owners)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "RemoteJaxFunction":
        super()._apply(fn, recurse)
        keep_all_in_slab(self.session, self._owners)
        return self

    def _static_leaves(self, args: Args, kwargs: Kwargs) -> frozenset[int]:
        """Return the leaves of static arguments."""
        marks = marked_static(
            args, kwargs, self._arguments, self._static_argnames, marked
        )
        return frozenset(i for i, mark in enumerate(flatten(marks)[0]) if mark)

    def _prepare(
        self,
        arguments: pb.Tree,
        inputs: Values,
        mode: int,
        is_stateful: bool,
        shape_of: ShapeOf,
    ) -> "_Call":
        """Describe a call with a new signature, and prepare its program."""
        rngs = self._rngs if is_stateful else ()
        paths = [info.path for info in self._model.parameters] if self._owners else []
        paths += ["the key"] * bool(rngs) + trees.argument_paths(arguments)
        shapes = [
            shape_of(value) if isinstance(value, Tensor) else () for value in inputs
        ]
        x64 = self.session.x64
        described = [
            spec_of(value, path, x64, now(shape))
            for value, path, shape in zip(inputs, paths, shapes, strict=True)
        ]
        call = pb.Call(
            model=self._model.name,
            arguments=arguments,
            inputs=map(specs.encode, described),
            parameters=bool(self._owners),
            rngs=rngs,
            mutable=is_stateful and self._is_mutable,
            mode=mode,  # type: ignore[arg-type]
            recipes=recipes_for(arguments),
            method=self._method,
        )
        plain = self.session.described_call(
            call, labels=paths, timeout_s=self.timeout_s
        )
        program: AnyProgram = prepare(plain, inputs)
        if any(isinstance(size, Seen) for shape in shapes for size in shape):
            program = for_all_sizes(plain, shapes)
        return _Call(program, program.result.rebuild)


class _Call(NamedTuple):
    """A prepared signature: the program, and the function from its outputs to the result."""

    program: AnyProgram
    rebuild: Callable[[Sequence[Tensor]], Any]


# The function whose submitted call runs in this thread, and the random key of that call.
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


def _check_options(
    target: Any, parameters: str, mutable: bool, cast_inputs: torch.dtype | None
) -> None:
    if parameters not in ("client", "worker"):
        raise CallerError(f"parameters={parameters!r}; expected 'client' or 'worker'")
    if cast_inputs is not None and not (
        isinstance(cast_inputs, torch.dtype) and cast_inputs.is_floating_point
    ):
        raise CallerError(
            f"cast_inputs={cast_inputs!r}; expected a float dtype such as torch.bfloat16, or None"
        )
    if mutable and parameters == "worker":
        raise CallerError(
            "mutable=True needs parameters='client': the worker's own are the same for every client"
        )
    if isinstance(target, nn.Module):
        raise CallerError(
            f"the target is a {type(target).__qualname__}, which torch can call as it is; expected"
            " a worker's address, a Session or a JAX model"
        )


def _new_key() -> Tensor:
    """Return a key for the worker's random streams, from torch's default generator."""
    return torch.randint(0, 2**32, (2,), dtype=torch.uint32, device="cpu")
