"""What a call returns and touches, found out before its first run.

The call is made once with fake tensors, which have types and no data, as its state and its inputs.
Tensors that it makes of nothing else are real: a model may keep those. A model that cannot be
called so, because it looks at values, is run on zeros; if it refuses these or does not end on them,
on ones, or on identity matrices.
"""

import gc
import logging
import math
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
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
from bridge_server.torch_runtime.python_state import PythonState
from bridge_server.torch_runtime.randomness import StreamAside, drawing, is_random
from bridge_server.torch_runtime.types import bytes_of, zeros
from bridge_wire.errors import BridgeError, CallerError
from bridge_wire.specs import Spec

_log = logging.getLogger(__name__)
_NOTHING: AbstractContextManager[None] = nullcontext()

# Operators that keep statistics write these arguments, and their schemas do not say so.
_STATISTICS = frozenset({"running_mean", "running_var"})

# A run on made-up values that takes so many operators, some seconds, seems to have no end: others
# are tried. If it has none on any of them, each gets more, a minute or two.
_MOST_OPERATORS = (100_000, 3_000_000)

Function = Callable[[Sequence[Tensor], Sequence[Any]], Sequence[Tensor]]
# Makes an input of a type on a device.
Filling = Callable[[Spec, torch.device], Any]


class Traced(NamedTuple):
    """What a trace has found out."""

    written: frozenset[
        int
    ]  # positions of what was changed in place, among the state and then the inputs
    strays: frozenset[
        int
    ]  # positions of state of which the original was used instead of what was passed
    draws: bool  # whether random numbers were drawn
    draws_by_layout: bool  # whether they were drawn for tensors that are not row-major
    reads_kept: bool  # whether a call reads tensors that an earlier one made of its state or inputs
    overwrites: (
        bool  # whether tensors were written that are neither state nor inputs nor made in the call
    )
    has_fast_path: bool  # whether it may run layers that torch computes otherwise under autograd
    # whether it works only while autograd records, as a model does that differentiates inside
    needs_grad: bool
    is_fake: bool  # whether it holds whatever the values are
    # a digest of the operators that depend on state, inputs or draws, and of their other arguments
    operators: bytes


@dataclass(frozen=True, slots=True)
class Trial:
    """A call of `f(state, inputs)`, to be made with tensors like these and inputs of these types on
    a device.

    The state gets other dtypes. `isolated` returns `f` on a copy of the model that is used no more
    afterwards, and `snapshot` the Python state that the copy shares with the model.
    """

    isolated: Callable[[], Function]
    state: Sequence[Tensor]
    dtypes: Sequence[torch.dtype]
    inputs: Sequence[Spec]
    device: torch.device
    where: str
    snapshot: Callable[[], PythonState]

    def trace(self) -> Traced:
        """Return what the call does.

        Raises:
          RemoteModelError: the model raises, whatever the values.
          CallerError: it does not end, whatever the values, or keeps a tensor of the trace for
            good.
        """
        try:
            return self._made_either_way(zeros, math.inf, is_fake=True)
        except BaseException as error:
            if isinstance(error, _LeftBehind) or not is_models(error):
                raise
            why = error
        return self._traced_on_values(why)

    def has_custom_functions(self) -> bool:
        """Whether derivatives of the call pass an autograd.Function; also if that cannot be
        told."""
        before, f = self.snapshot(), self.isolated()
        watch = _Watch(self.state, math.inf, FakeTensorMode(allow_non_fake_inputs=True))
        try:
            outputs = self._run(f, watch, zeros, needs_grad=True, is_recorded=True)
            edges = [get_gradient_edge(y) for y in outputs if y.requires_grad]
            return any(isinstance(node, BackwardCFunction) for node in nodes_of(edges))
        except Exception as error:
            _forget_frames(error)
            return True
        finally:
            f = outputs = edges = None  # type: ignore[assignment]
            _take_back((watch,), before)

    def _traced_on_values(self, why: BaseException) -> Traced:
        """Make the call on whichever values it takes; on fake tensors it has failed with `why`."""
        refused: dict[str, BaseException] = {}
        for most_operators in _MOST_OPERATORS:
            for name, filling in _FILLINGS.items():
                if not isinstance(refused.get(name, _Endless()), _Endless):
                    continue
                try:
                    traced = self._made_either_way(filling, most_operators, is_fake=False)
                except BaseException as error:
                    # A model may use this very package: on fake tensors, that is an error of ours,
                    # too.
                    if isinstance(error, BridgeError) or not is_models(error):
                        raise
                    if _first_line(error) == _first_line(why):  # then it is not for the values
                        raise remote(error, self.where) from error
                    refused[name] = error
                    continue
                reason = _first_line(why)
                _log.warning(
                    "%s was run once on %s, since it cannot be traced: %s", self.where, name, reason
                )
                return traced
        if endless := [name for name, error in refused.items() if isinstance(error, _Endless)]:
            raise CallerError(
                f"{self.where} looks at values, so it was run to find out what it returns, and did"
                f" not end within {_MOST_OPERATORS[-1]} operators on {' or on '.join(endless)};"
                " bound its loops by a number of steps"
            )
        raise remote(refused["zeros"], self.where) from refused["zeros"]

    def _made_either_way(self, filling: Filling, most_operators: float, *, is_fake: bool) -> Traced:
        """Make the call; once more with autograd recording, if it fails without."""
        try:
            return self._made(filling, most_operators, is_fake=is_fake, needs_grad=False)
        except Exception as error:
            if isinstance(error, _LeftBehind) or (isinstance(error, BridgeError) and not is_fake):
                raise
            return self._made(filling, most_operators, is_fake=is_fake, needs_grad=True)

    def _made(
        self, filling: Filling, most_operators: float, *, is_fake: bool, needs_grad: bool
    ) -> Traced:
        """Make the call, and see to it that none of its tensors is left where the next one would
        find it."""
        before, f = self.snapshot(), self.isolated()
        fake = FakeTensorMode(allow_non_fake_inputs=True) if is_fake else None
        watch = _Watch(self.state, most_operators, fake)
        again = _Watch(self.state, most_operators, fake)
        try:
            self._run(f, watch, filling, needs_grad)
            reads_kept = bool(watch.survivors()) and self._reads_kept(
                f, watch, again, filling, needs_grad
            )
        except BaseException as error:
            del f
            _forget_frames(error)
            _take_back((watch, again), before)
            raise
        del f
        if left := _take_back((watch, again), before):
            raise _LeftBehind(
                f"{self.where} keeps tensors ({left}) that it made of its arguments or parameters"
                " in an object that the bridge cannot put back, so a later call would return"
                " another call's values; keep them in an attribute of the module, or do not keep"
                " them"
            )
        return Traced(
            frozenset(watch.written),
            frozenset(watch.strays),
            watch.draws,
            watch.draws_by_layout,
            reads_kept,
            bool(watch.overwritten),
            before.may_reach(HAVE_FAST_PATH),
            needs_grad,
            is_fake,
            watch.ran.digest(),
        )

    def _reads_kept(
        self, f: Function, watch: "_Watch", again: "_Watch", filling: Filling, needs_grad: bool
    ) -> bool:
        """Call again, and return whether this reads what the first call has kept.

        A call that keeps nothing more has a cache, though it may not have read it; one that does
        has a log.
        """
        again.kept = watch.survivors()
        try:
            self._run(f, again, filling, needs_grad)
        except Exception as error:  # it works once only, so it depends on what was kept
            _forget_frames(error)
            return True
        return again.reads_kept or not again.survivors()

    def _run(
        self,
        f: Function,
        watch: "_Watch",
        filling: Filling,
        needs_grad: bool,
        *,
        is_recorded: bool = False,
    ) -> Sequence[Tensor]:
        state = list(zip(self.state, self.dtypes, strict=True))
        if watch.fake is not None:
            with watch.fake:
                copies = [
                    torch.empty(each.shape, dtype=dtype, device=each.device)
                    for each, dtype in state
                ]
                arrays = [filling(spec, self.device) for spec in self.inputs]
        else:
            copies = [each.detach().to(dtype, copy=True) for each, dtype in state]
            arrays = [filling(spec, self.device) for spec in self.inputs]
        watch.follow([*copies, *arrays])
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(needs_grad))
            stack.enter_context(no_fast_path)
            if (
                watch.fake is None
            ):  # what is drawn here is missed nowhere; fake tensors draw nothing
                stack.enter_context(drawing(is_seeded=True))
            stack.enter_context(watch)
            if is_recorded:
                copies, arrays = ([_as_variable(x) for x in each] for each in (copies, arrays))
            return f(copies, arrays)


def _as_variable(x: Any) -> Any:
    """Return a tensor as one that autograd records, and that may be written in place."""
    is_inexact = isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
    return x.requires_grad_().clone() if is_inexact else x


def _take_back(watches: Sequence["_Watch"], before: PythonState) -> str:
    """Take away the tensors made of the state or the inputs that have outlived their calls; return
    which cannot be.

    Those raise from now on where they are fake.
    """
    if not any(watch.survivors() for watch in watches):
        return ""
    before.restore_tensors()
    left = set().union(*(watch.survivors() for watch in watches))
    if not left:
        return ""
    kept = [
        each
        for each in gc.get_objects()
        if issubclass(type(each), Tensor) and _storage(each) in left
    ]
    for each in kept:
        if isinstance(each, FakeTensor):
            each.__class__ = _Left
    return ", ".join(map(described, kept[:3])) or "in a graph"


def _forget_frames(error: BaseException | None) -> None:
    """Drop the variables of the frames that an error, and those that led to it, have passed."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class _LeftBehind(CallerError):
    """A model keeps tensors of a trace where they cannot be taken away."""


class _Left(FakeTensor):
    """A fake tensor that a model has kept where it cannot be taken away: every use raises."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(
            f"{operator} got a tensor without values, which a model kept when the bridge prepared a"
            " call of it; clear the cache that holds it"
        )


def _ones(spec: Spec, device: torch.device) -> Any:
    """Return ones; but zeros where there are no floats: they may be indices."""
    made = zeros(spec, device)
    return made if spec.weak or not spec.dtype.is_inexact else made.fill_(1)


def _identities(spec: Spec, device: torch.device) -> Any:
    """Return identity matrices where the shape and type are of such, else ones."""
    made = zeros(spec, device)
    if spec.weak:
        return made
    is_matrix = spec.dtype.is_inexact and len(spec.shape) > 1 and spec.shape[-1] == spec.shape[-2]
    (made.diagonal(dim1=-2, dim2=-1) if is_matrix else made).fill_(1)
    return made


_FILLINGS: Mapping[str, Filling] = {"zeros": zeros, "ones": _ones, "identity matrices": _identities}


class _Endless(BaseException):
    """A run has taken more operators than it may. Not for a model to catch."""


class _Watch(TorchDispatchMode):
    """Sees every operator that runs, and notes what it does besides returning tensors.

    `fake` is the mode of the tensors that are followed; None where they are real. Followed are the
    state and inputs of the call, and all that is made of them, by their storages.
    """

    def __init__(
        self,
        originals: Sequence[Tensor],
        most_operators: float,
        fake: FakeTensorMode | None,
    ) -> None:
        super().__init__()
        self.fake = fake
        self._left = most_operators
        self.draws = False
        self.draws_by_layout = False
        self._stream = StreamAside()
        self.reads_kept = False
        self.kept: Set[int] = frozenset()  # storages that an earlier call has kept
        self.written: set[int] = set()
        self.strays: set[int] = set()
        self._positions: dict[int | None, int] = {}
        self._originals = {_storage(x): i for i, x in enumerate(originals)}
        self._followed: dict[int, StorageWeakRef] = {}
        self._made: dict[int, StorageWeakRef] = {}  # in this call, of nothing that is followed
        self.overwritten: dict[
            int, StorageWeakRef
        ] = {}  # was there before, and is neither state nor input
        self.ran = Fingerprint()
        self._numbers: dict[
            int | None, int
        ] = {}  # of the storages that operators in the fingerprint have made

    def follow(self, tensors: Sequence[Any]) -> None:
        """Follow these, the state and the inputs, which are written by position."""
        self._positions = {_storage(x): i for i, x in enumerate(tensors) if isinstance(x, Tensor)}
        _note([x for x in tensors if isinstance(x, Tensor)], self._followed)
        self._numbers = dict(self._positions)

    def survivors(self) -> set[int]:
        """Return the storages that are followed and still there, once what only cycles hold is
        gone."""
        if any(not weak.expired() for weak in self._followed.values()):
            gc.collect()
        return {storage for storage, weak in self._followed.items() if not weak.expired()}

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _Endless
        kwargs = kwargs or {}
        given = {each.name: each.default_value for each in operator._schema.arguments} | dict(
            kwargs
        )
        for argument, value in zip(operator._schema.arguments, args, strict=False):
            given[argument.name] = value
        written: list[Tensor] = []
        read: list[Tensor] = []
        for argument in operator._schema.arguments:
            tensors = _tensors_in(given.get(argument.name))
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written or argument.name in _STATISTICS:
                written += tensors
            read += tensors
        self.written |= _positions_of(written, self._positions)
        self.strays |= _positions_of(read, self._originals)
        self.reads_kept |= any(_storage(x) in self.kept for x in read)
        # Attention bears the tag with and without dropout.
        if is_random(operator) and given.get("dropout_p") != 0:
            self.draws = True
            self.draws_by_layout |= not all(
                each.layout is torch.strided and each.is_contiguous() for each in read
            )
        # Constants count by their values: whether they are made in this call or were kept by an
        # earlier one.
        is_recorded = is_random(operator) or any(_storage(x) in self._numbers for x in read)
        if is_recorded:
            self.ran.add(
                operator, *(f"{name}={self._named(value)}" for name, value in given.items())
            )
        is_followed = any(map(self._is_followed, read))
        foreign = [x for x in written if not self._is_followed(x) and _storage(x) not in self._made]
        _note(foreign, self.overwritten)
        # Real tensors into which fake ones were written have other values than they should; and
        # what the call has not made, it must not change.
        is_unreal = is_followed or any(_storage(x) in self.overwritten for x in read)
        if self.fake is None or any(isinstance(x, FakeTensor) for x in read):
            context: AbstractContextManager[object] = _NOTHING
        elif is_unreal:
            context = self.fake
        else:
            context = self._stream.drawing() if is_random(operator) else _NOTHING
        with context:
            outputs = operator(*args, **kwargs)
        made = _tensors_in(outputs)
        if is_recorded:
            for x in (*written, *made):
                self._numbers.setdefault(_storage(x), len(self._numbers))
        is_followed |= any(isinstance(x, FakeTensor) for x in made)
        _note(
            [*written, *made] if is_followed else made,
            self._followed if is_followed else self._made,
        )
        return outputs

    def _named(self, value: Any) -> str:
        return str(pytree.tree_map_only(Tensor, self._name, value))

    def _name(self, x: Tensor) -> str:
        """Return which tensor this is: of the call, by the number of its storage; of the model,
        by its values."""
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


def _tensors_in(value: Any) -> list[Tensor]:
    return [
        each
        for each in (value if isinstance(value, list | tuple) else [value])
        if isinstance(each, Tensor)
    ]


def _note(tensors: Sequence[Tensor], storages: dict[int, StorageWeakRef]) -> None:
    for each in tensors:
        storage = _storage(each)
        if storage is not None and storage not in storages:
            storages[storage] = StorageWeakRef(each.untyped_storage())


def _positions_of(tensors: Sequence[Tensor], positions: Mapping[int | None, int]) -> set[int]:
    return {positions[storage] for storage in map(_storage, tensors) if storage in positions}


def _storage(tensor: Tensor) -> int | None:
    """Return what tensors that share memory have in common."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {text_of(error)}".partition("\n")[0]
