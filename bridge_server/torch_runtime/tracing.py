"""Trace of a call before its first run: its outputs' types, its writes, its random draws.

The trace calls the model once with fake tensors, which have types and no data, as state and inputs.
Tensors that the model makes from other sources are real, since the model may keep them. A model
that fails on fake tensors, because it looks at values, runs on zeros. If zeros raise or do not
end, it runs on ones, then on identity matrices, then on 1, 2, 3, ... If the call has examples of
its inputs, it runs on these instead.
"""

import gc
import logging
import math
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops import utils as hops
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bridge_server.fingerprints import Fingerprint
from bridge_server.model_errors import is_models, remote, text_of
from bridge_server.torch_runtime.attention import HAVE_FAST_PATH, no_fast_path
from bridge_server.torch_runtime.border import described
from bridge_server.torch_runtime.graphs import nodes_of
from bridge_server.torch_runtime.modes import without_fake_errors_logged
from bridge_server.torch_runtime.python_state import PythonState
from bridge_server.torch_runtime.randomness import StreamAside, drawing, is_random
from bridge_server.torch_runtime.scripted import noting_runs
from bridge_server.torch_runtime.types import HOST, bytes_of, value_of, zeros
from bridge_wire.errors import BridgeError, CallerError
from bridge_wire.specs import Spec

_log = logging.getLogger(__name__)
_NOTHING: AbstractContextManager[None] = nullcontext()

# Operators that keep statistics write these arguments; their schemas do not declare the writes.
_STATISTICS = frozenset({"running_mean", "running_var"})

# Limits of operators for a run on made-up values. At the first one, after some seconds, the bridge
# tries other values. If no run ends, it tries all with the second limit, a minute or two.
# torch's words for a derivative by a tensor that is no variable.
_NO_VARIABLE = "require grad"
_MOST_OPERATORS = (100_000, 3_000_000)

Function = Callable[[Sequence[Tensor], Sequence[Any]], Sequence[Tensor]]
# Makes inputs of these types, on a device.
Filling = Callable[[Sequence[Spec], torch.device], Sequence[Any]]


class Traced(NamedTuple):
    """The findings of a trace."""

    # Positions changed in place, among the state and then the inputs.
    written: frozenset[int]
    # Positions of state whose original was used instead of the passed tensor.
    unregistered_uses: frozenset[int]
    draws: bool  # whether random numbers were drawn
    draws_by_layout: bool  # whether they were drawn for tensors that are not row-major
    reads_kept: bool  # whether a call reads tensors that an earlier one made of its state or inputs
    # Whether tensors were written that are neither state nor inputs nor made in the call.
    overwrites: bool
    has_fast_path: (
        bool  # whether it may run layers that torch computes otherwise under autograd
    )
    runs_torchscript: bool
    # Whether it works only while autograd records, as models do that differentiate inside.
    needs_grad: bool
    # Whether it differentiates by its own parameters, so that these must be variables.
    needs_variables: bool
    is_fake: bool  # whether the findings hold for all values
    # Digest of the operators that depend on state, inputs or draws, and of their other arguments.
    operators: bytes


@dataclass(frozen=True, slots=True)
class _Attempt:
    """The settings of one traced call."""

    filling: Filling
    most_operators: float
    is_fake: bool
    needs_grad: bool = False
    needs_variables: bool = False
    is_recorded: bool = False


@dataclass(frozen=True, slots=True)
class Trial:
    """A call of `f(state, inputs)`, to be traced with tensors like these, on a device.

    The state gets other dtypes. `isolated` returns `f` on a copy of the model, which nothing uses
    afterwards; `snapshot` returns the Python state that the copy shares with the model.
    """

    isolated: Callable[[], Function]
    state: Sequence[Tensor]
    dtypes: Sequence[torch.dtype]
    inputs: Sequence[Spec]
    device: torch.device
    where: str
    snapshot: Callable[[], PythonState]
    trainable: Sequence[bool]  # for each tensor of the state, whether it is a parameter
    examples: Sequence[bytes] = ()  # values of the inputs; if none, values are made up

    def trace(self) -> Traced:
        """Trace the call.

        Raises:
          RemoteModelError: the model raises, whatever the values.
          CallerError: the model does not end, whatever the values, or keeps a tensor of the trace
            for good.
        """
        try:
            return self._traced_in_either_mode(_Attempt(_zeros, math.inf, is_fake=True))
        except BaseException as error:
            if isinstance(error, _LeftBehind) or not is_models(error):
                raise
            reason = error
        return self._traced_on_values(reason)

    def has_custom_functions(self) -> bool:
        """Return whether derivatives of the call pass an autograd.Function; True if unknown."""
        before = self.snapshot()
        f = self.isolated()
        attempt = _Attempt(
            _zeros, math.inf, is_fake=True, needs_grad=True, is_recorded=True
        )
        watch = self._watch(attempt)
        try:
            outputs = self._run(f, watch, attempt)
            edges = [get_gradient_edge(y) for y in outputs if y.requires_grad]
            return any(isinstance(node, BackwardCFunction) for node in nodes_of(edges))
        except Exception as error:
            _forget_frames(error)
            return True
        finally:
            f = outputs = edges = None  # type: ignore[assignment]
            _take_back((watch,), before)

    def _traced_on_values(self, reason: BaseException) -> Traced:
        """Trace the call on the first values that work; fake tensors have failed for a reason."""
        failures: dict[str, BaseException] = {}
        for most_operators in _MOST_OPERATORS:
            for name, filling in self._fillings().items():
                if not isinstance(failures.get(name, _Endless()), _Endless):
                    continue
                attempt = _Attempt(filling, most_operators, is_fake=False)
                traced = self._attempted(attempt, name, reason, failures)
                if traced is not None:
                    return traced
        if endless := [
            name for name, error in failures.items() if isinstance(error, _Endless)
        ]:
            raise CallerError(
                f"{self.where} depends on values, so the bridge ran it to find its outputs' types,"
                f" and it did not end within {_MOST_OPERATORS[-1]} operators on"
                f" {' or on '.join(endless)}; bound its loops by a number of steps"
            )
        tried = ", ".join(failures)
        needs_example = not self.examples and _is_about_values(reason)
        remedy = _EXAMPLES.format(tried=tried) if needs_example else ""
        first = next(iter(failures.values()))
        raise remote(first, self.where, remedy) from first

    def _fillings(self) -> Mapping[str, Filling]:
        if not self.examples:
            return _FILLINGS
        return {"the example's values": self._filled_with_examples}

    def _filled_with_examples(
        self,
        specs: Sequence[Spec],
        device: torch.device,
    ) -> Sequence[Any]:
        return [
            value_of(each, spec, device)
            for each, spec in zip(self.examples, specs, strict=True)
        ]

    def _attempted(
        self,
        attempt: _Attempt,
        values: str,
        reason: BaseException,
        failures: dict[str, BaseException],
    ) -> Traced | None:
        """Trace the call on some values; note a failure that other values may avoid."""
        line = _first_line(reason)
        try:
            traced = self._traced_in_either_mode(attempt)
        except BaseException as error:
            # The BridgeError of a model that uses this package itself is an error of fake tensors.
            if isinstance(error, BridgeError) or not is_models(error):
                raise
            if _first_line(error) == line:  # then the values are not the reason
                raise remote(error, self.where) from error
            failures[values] = error
            return None
        _log.warning(
            "%s was run once on %s, since it cannot be traced: %s",
            self.where,
            values,
            line,
        )
        return traced

    def _traced_in_either_mode(self, attempt: _Attempt) -> Traced:
        """Trace the call without autograd, or with autograd recording if that fails."""
        try:
            return self._traced(attempt)
        except Exception as error:
            is_final = isinstance(error, BridgeError) and not attempt.is_fake
            if is_final or isinstance(error, _LeftBehind):
                raise
            attempt = replace(attempt, needs_grad=True)
        try:
            return self._traced(attempt)
        except RuntimeError as error:
            if _NO_VARIABLE not in str(error):
                raise
            return self._traced(replace(attempt, needs_variables=True))

    def _traced(self, attempt: _Attempt) -> Traced:
        """Trace the call, and leave none of its tensors where the next call would find it."""
        before = self.snapshot()
        f = self.isolated()
        first = self._watch(attempt)
        second = _Watch(self.state, attempt.most_operators, first.fake)
        try:
            with noting_runs() as notes:
                self._run(f, first, attempt)
            has_survivors = bool(first.survivors())
            reads_kept = has_survivors and self._reads_kept(f, first, second, attempt)
        except BaseException as error:
            del f
            _forget_frames(error)
            _take_back((first, second), before)
            raise
        del f
        if left := _take_back((first, second), before):
            raise _LeftBehind(
                f"{self.where} keeps tensors ({left}) that it made of its arguments or parameters"
                " in an object that the bridge cannot put back, so a later call would return"
                " another call's values; keep them in an attribute of the module, or do not keep"
                " them"
            )
        return Traced(
            written=frozenset(first.written),
            unregistered_uses=frozenset(first.unregistered_uses),
            draws=first.draws,
            draws_by_layout=first.draws_by_layout,
            reads_kept=reads_kept,
            overwrites=bool(first.overwritten),
            has_fast_path=before.may_reach(HAVE_FAST_PATH),
            runs_torchscript=notes.has_run,
            needs_grad=attempt.needs_grad,
            needs_variables=attempt.needs_variables,
            is_fake=attempt.is_fake,
            operators=first.operators.digest(),
        )

    def _watch(self, attempt: _Attempt) -> "_Watch":
        fake = FakeTensorMode(allow_non_fake_inputs=True) if attempt.is_fake else None
        return _Watch(self.state, attempt.most_operators, fake)

    def _reads_kept(
        self, f: Function, first: "_Watch", second: "_Watch", attempt: _Attempt
    ) -> bool:
        """Call again, and return whether this call reads tensors that the first call has kept.

        A second call that keeps no more tensors shows a cache, even if the call has not read it;
        one that does keep more shows a log.
        """
        second.kept = first.survivors()
        try:
            self._run(f, second, attempt)
        except Exception as error:
            # The call works once only, so it depends on kept tensors.
            _forget_frames(error)
            return True
        return second.reads_kept or not second.survivors()

    def _run(self, f: Function, watch: "_Watch", attempt: _Attempt) -> Sequence[Tensor]:
        state, inputs = self._arguments(watch.fake, attempt.filling)
        watch.follow([*state, *inputs])
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(attempt.needs_grad))
            stack.enter_context(no_fast_path)
            stack.enter_context(without_fake_errors_logged())
            # Fake tensors draw nothing; real draws must not affect others.
            if watch.fake is None:
                stack.enter_context(drawing(is_seeded=True))
            stack.enter_context(watch)
            if attempt.is_recorded:
                state, inputs = (
                    list(map(_as_variable, state)),
                    list(map(_as_variable, inputs)),
                )
            if attempt.needs_variables:
                state = variables_among(state, self.trainable)
            return f(state, inputs)

    def _arguments(
        self, fake: FakeTensorMode | None, filling: Filling
    ) -> tuple[list[Tensor], list[Any]]:
        """Return new tensors like the state, and inputs."""
        pairs = zip(self.state, self.dtypes, strict=True)
        if fake is None:
            state = [each.detach().to(dtype, copy=True) for each, dtype in pairs]
            return state, list(filling(self.inputs, self.device))
        with fake:
            state = [
                torch.empty(x.shape, dtype=dtype, device=x.device) for x, dtype in pairs
            ]
            return state, list(filling(self.inputs, self.device))


def variables_among(
    state: Sequence[Any],
    trainable: Sequence[bool],
) -> list[Any]:
    """Return the state with variables in place of the parameters that are none."""
    return [
        x.detach().requires_grad_() if each and not x.requires_grad else x
        for x, each in zip(state, trainable, strict=True)
    ]


def _as_variable(x: Any) -> Any:
    """Return a tensor as one that autograd records, and that may be written in place."""
    is_inexact = isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
    return x.requires_grad_().clone() if is_inexact else x


def _take_back(watches: Sequence["_Watch"], before: PythonState) -> str:
    """Remove the tensors that have outlived their calls; return a description of the others.

    The others raise from now on if they are fake.
    """
    if not any(watch.survivors() for watch in watches):
        return ""
    before.restore_tensors()
    left = set().union(*(watch.survivors() for watch in watches))
    if not left:
        return ""
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    kept = [each for each in tensors if _storage(each) in left]
    del tensors
    for each in kept:
        if isinstance(each, FakeTensor):
            each.__class__ = _Left
    return ", ".join(map(described, kept[:3])) or "in a graph"


def _forget_frames(error: BaseException | None) -> None:
    """Drop the variables of the frames that an error and its causes have passed."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class _LeftBehind(CallerError):
    """A model keeps tensors of a trace where the bridge cannot remove them."""


class _Left(FakeTensor):
    """A fake tensor that a model has kept where the bridge cannot remove it: every use raises."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(
            f"{operator} got a tensor without values, which a model kept when the bridge prepared a"
            " call of it; clear the cache that holds it"
        )


def _ones(spec: Spec, device: torch.device) -> Any:
    """Return ones, or zeros where the type is no float: the values may be indices."""
    tensor = zeros(spec, device)
    return tensor if spec.weak or not spec.dtype.is_inexact else tensor.fill_(1)


def _identities(spec: Spec, device: torch.device) -> Any:
    """Return identity matrices where shape and type allow, else ones."""
    tensor = zeros(spec, device)
    if spec.weak:
        return tensor
    is_matrix = (
        spec.dtype.is_inexact
        and len(spec.shape) > 1
        and spec.shape[-1] == spec.shape[-2]
    )
    (tensor.diagonal(dim1=-2, dim2=-1) if is_matrix else tensor).fill_(1)
    return tensor


def _counted(spec: Spec, device: torch.device) -> Any:
    """Return 1, 2, 3, ..., as far as the type goes.

    On a GPU, integers are zeros: an index that is too large would end the process's use of the GPU.
    """
    tensor = zeros(spec, device)
    is_index = not spec.dtype.is_inexact
    if spec.weak or (is_index and device != HOST):
        return tensor
    most = (
        torch.iinfo(tensor.dtype).max if is_index and spec.dtype.name != "bool" else 0
    )
    numbers = torch.arange(1, 1 + tensor.numel(), device=device)
    numbers = numbers.clamp(max=most) if most else numbers
    return numbers.to(tensor.dtype).reshape(tensor.shape)


def _of_each(fill: Callable[[Spec, torch.device], Any]) -> Filling:
    return lambda specs, device: [fill(spec, device) for spec in specs]


_zeros = _of_each(zeros)
_FILLINGS: Mapping[str, Filling] = {
    "zeros": _zeros,
    "ones": _of_each(_ones),
    "identity matrices": _of_each(_identities),
    "the numbers 1, 2, 3, ...": _of_each(_counted),
}
# Modules of the errors of fake tensors about values that they do not have.
_WITHOUT_VALUES = {
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
}
_EXAMPLES = (
    "the model cannot be traced without values, and it raises on the made-up ones that the bridge"
    " ran it on ({tried}): pass an example of its arguments to RemoteTorchFunction, by"
    " example_args=(...) or trace_on(...), or call it outside of jit first"
)


def _is_about_values(error: BaseException) -> bool:
    """Whether fake tensors failed since they have no values, not since the call is wrong."""
    kinds = {kind.__module__ for kind in type(error).__mro__}
    return bool(kinds & _WITHOUT_VALUES) or ".numpy() is not supported" in str(error)


class _Endless(BaseException):
    """A run has taken more operators than allowed. A model must not catch it."""


class _Access(NamedTuple):
    """The arguments of one operator, by name, and the tensors that it reads and writes."""

    arguments: Mapping[str, Any]
    read: Sequence[Tensor]
    written: Sequence[Tensor]

    @classmethod
    def of(
        cls, operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> "_Access":
        schema = operator._schema.arguments
        arguments = {each.name: each.default_value for each in schema}
        arguments.update(kwargs)
        arguments.update(zip(arguments, args, strict=False))
        read: list[Tensor] = []
        written: list[Tensor] = []
        for each in schema:
            tensors = _tensors_in(arguments[each.name])
            read += tensors
            is_written = each.alias_info is not None and each.alias_info.is_write
            if is_written or each.name in _STATISTICS:
                written += tensors
        return cls(arguments, read, written)


class _Watch(TorchDispatchMode):
    """Sees every operator that runs, and notes its effects besides returning tensors.

    It follows the state and inputs of the call, and all tensors computed from them, by their
    storages. `fake` is the mode of the followed tensors; None where they are real.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let operators such as torch.cond compile their functions, to graphs of operators.

        Dynamo would skip the functions' code for good. Other compiled code is skipped: it may read
        the memory of fake tensors.
        """
        return _compiles_functions()

    def __init__(
        self,
        originals: Sequence[Tensor],
        most_operators: float,
        fake: FakeTensorMode | None,
    ) -> None:
        super().__init__()
        self.fake = fake
        self.draws = False
        self.draws_by_layout = False
        self.reads_kept = False
        self.kept: Set[int] = frozenset()  # storages that an earlier call has kept
        self.written: set[int] = set()
        self.unregistered_uses: set[int] = set()
        self.operators = Fingerprint()
        # Storages that existed before the call, and are neither state nor input.
        self.overwritten: dict[int, StorageWeakRef] = {}
        self._operators_left = most_operators
        self._depth = 0  # of the functions that operators call
        self._rng_stream = StreamAside()
        self._positions: dict[int | None, int] = {}
        self._originals = {_storage(x): i for i, x in enumerate(originals)}
        self._followed: dict[int, StorageWeakRef] = {}
        self._unfollowed: dict[int, StorageWeakRef] = {}  # made in this call
        # Numbers of the storages that operators in the fingerprint have made.
        self._numbers: dict[int | None, int] = {}

    def follow(self, tensors: Sequence[Any]) -> None:
        """Follow the state and the inputs; writes to them are noted by position."""
        self._positions = {
            _storage(x): i for i, x in enumerate(tensors) if isinstance(x, Tensor)
        }
        self._numbers = dict(self._positions)
        _note([x for x in tensors if isinstance(x, Tensor)], self._followed)

    def survivors(self) -> set[int]:
        """Return the followed storages that still exist after a collection of cycles."""
        if any(not weak.expired() for weak in self._followed.values()):
            gc.collect()
        return {
            storage for storage, weak in self._followed.items() if not weak.expired()
        }

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._operators_left -= 1
        if self._operators_left < 0:
            raise _Endless
        kwargs = kwargs or {}
        if isinstance(operator, HigherOrderOperator):
            return self._run_with_functions(operator, args, kwargs)
        access = _Access.of(operator, args, kwargs)
        self._note_access(access)
        self._note_draw(operator, access)
        # A compilation of functions runs operators of its own, once for several calls.
        is_internal = not self._depth and _compiles_functions()
        is_recorded = not is_internal and self._record(operator, access)
        is_followed = any(map(self._is_followed, access.read))
        with self._context(operator, access.read, is_followed):
            outputs = operator(*args, **kwargs)
        tensors = _tensors_in(outputs)
        if is_recorded:
            for x in (*access.written, *tensors):
                self._numbers.setdefault(_storage(x), len(self._numbers))
        if is_followed or any(isinstance(x, FakeTensor) for x in tensors):
            _note([*access.written, *tensors], self._followed)
        else:
            _note(tensors, self._unfollowed)
        return outputs

    def _run_with_functions(
        self,
        operator: HigherOrderOperator,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run an operator such as torch.cond, and see the operators of its functions too."""
        self.operators.add(operator)
        args, kwargs = pytree.tree_map(self._watched, (args, kwargs))
        leaves = pytree.tree_leaves((args, kwargs))
        read = _tensors_in(leaves)
        is_followed = any(map(self._is_followed, read))
        with self._context(operator, read, is_followed):
            outputs = operator(*args, **kwargs)
        made = _tensors_in(pytree.tree_leaves(outputs))
        _note(made, self._followed if is_followed else self._unfollowed)
        return outputs

    def _watched(self, function: Any) -> Any:
        """Return a function whose operators this mode sees, or another argument as it is."""
        if isinstance(function, Tensor) or not callable(function):
            return function

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                with self:
                    return function(*args, **kwargs)
            finally:
                self._depth -= 1

        return watched

    def _note_access(self, access: _Access) -> None:
        self.written |= _positions_of(access.written, self._positions)
        self.unregistered_uses |= _positions_of(access.read, self._originals)
        self.reads_kept |= any(_storage(x) in self.kept for x in access.read)
        unknown = [x for x in access.written if _storage(x) not in self._unfollowed]
        _note([x for x in unknown if not self._is_followed(x)], self.overwritten)

    def _note_draw(self, operator: Any, access: _Access) -> None:
        # Attention has the tag with and without dropout.
        if is_random(operator) and access.arguments.get("dropout_p") != 0:
            self.draws = True
            self.draws_by_layout |= not all(map(_is_row_major, access.read))

    def _record(self, operator: Any, access: _Access) -> bool:
        """Add an operator to the fingerprint, and return whether it belongs there.

        Constants are added by value, whether this call or an earlier one has made them.
        """
        is_recorded = is_random(operator) or any(
            _storage(x) in self._numbers for x in access.read
        )
        if is_recorded:
            arguments = access.arguments.items()
            self.operators.add(
                operator, *(f"{name}={self._named(x)}" for name, x in arguments)
            )
        return is_recorded

    def _context(
        self, operator: Any, read: Sequence[Tensor], is_followed: bool
    ) -> AbstractContextManager[object]:
        """Return the context to run an operator in."""
        if self.fake is None or any(isinstance(x, FakeTensor) for x in read):
            return _NOTHING
        # Real tensors into which fake ones were written have wrong values, and the call must not
        # change tensors that it has not made.
        if is_followed or any(_storage(x) in self.overwritten for x in read):
            return self.fake
        return self._rng_stream.drawing() if is_random(operator) else _NOTHING

    def _named(self, value: Any) -> str:
        return str(pytree.tree_map_only(Tensor, self._name, value))

    def _name(self, x: Tensor) -> str:
        """Identify a tensor: the call's by the number of its storage, the model's by its values."""
        storage = _storage(x)
        number = self._numbers.get(storage)
        where = f"{x.dtype}{list(x.shape)}"
        if number is None and (number := self._originals.get(storage)) is None:
            values = Fingerprint()
            values.add("" if isinstance(x, FakeTensor) else bytes_of(x))
            return f"{where} {values.digest().hex()}"
        return f"{number} {where} {(x.stride(), x.storage_offset()) if storage is not None else ''}"

    def _is_followed(self, tensor: Tensor) -> bool:
        return isinstance(tensor, FakeTensor) or _storage(tensor) in self._followed


def _compiles_functions() -> bool:
    """Return whether an operator such as torch.cond compiles its functions in this thread."""
    compiling = getattr(hops, "_hop_compile_tls", None)
    return getattr(compiling, "in_hop_compile", False)


def _tensors_in(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, Tensor)]


def _is_row_major(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.is_contiguous()


def _note(tensors: Sequence[Tensor], storages: dict[int, StorageWeakRef]) -> None:
    for each in tensors:
        storage = _storage(each)
        if storage is not None and storage not in storages:
            storages[storage] = StorageWeakRef(each.untyped_storage())


def _positions_of(
    tensors: Sequence[Tensor], positions: Mapping[int | None, int]
) -> set[int]:
    return {
        positions[storage] for storage in map(_storage, tensors) if storage in positions
    }


def _storage(tensor: Tensor) -> int | None:
    """Return a key that tensors have in common if they share memory."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {text_of(error)}".partition("\n")[0]
