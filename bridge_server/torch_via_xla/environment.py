"""torchax's operators, made to work with the torch that is here.

Imports both frameworks, and torchax when needed.
"""

import contextlib
import functools
import gc
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn
from unittest.mock import patch

import jax
import numpy as np
import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.nn import functional
from torch.nn.modules import transformer
from torch.utils import _pytree as torch_pytree
from torch.utils._mode_utils import no_dispatch

from bridge_server.jax_runtime.types import has_x64
from bridge_server.switches import Switch
from bridge_server.torch_runtime.attention import simple_attention
from bridge_server.torch_via_xla import mutations
from bridge_server.torch_via_xla.aliases import (
    Place,
    follow_writes,
    indexed,
    makes_views,
    strided,
    views,
)
from bridge_server.torch_via_xla.arrays import to_jax
from bridge_server.torch_via_xla.derivatives import OPERATORS
from bridge_server.torch_via_xla.functions import applied, apply_plainly, take_over
from bridge_server.torch_via_xla.holders import holder_of
from bridge_server.torch_via_xla.lowerings import OPERATORS as LOWERINGS
from bridge_server.torch_via_xla.lowerings import RANDOM
from bridge_wire.dtypes import TURN_ON_X64
from bridge_wire.errors import BridgeError, CallerError, DTypeError

_OF_VALUES = {
    torch.tensor,
    torch.as_tensor,
}  # what makes tensors of Python's values, whose range is checked
# Methods of torchax's tensors that are no views, as torch's own are, or change the tensor itself.
_NOT_TORCHS = ("__setitem__", "detach", "flatten", "type_as")
# Functions of which torchax has its own version. ATen's operators, of which torch composes them,
# are more exact.
_COMPOSED = (
    torch.Tensor.__getitem__,
    torch.Tensor.resize_,
    torch.linalg.det,
    torch.linalg.matrix_power,
    torch.linalg.solve,
    torch.linalg.solve_ex,
    torch.linalg.slogdet,
    torch.tensor_split,
)
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
_COPIES = (torch.ops.aten._to_copy, torch.ops.aten._to_copy.default)
_WITHOUT_LOWERING = (
    "the torch code calls {}, which tracing cannot turn into JAX; write the code without it, or run"
    " it by RemoteTorchFunction, in a worker or in this process"
)
_LOSSY = {torch.float64, torch.complex128}

_loading = threading.Lock()


def environment() -> Any:
    """Return the environment in which torch code is traced.

    Raises:
      CallerError: torchax is not installed.
    """
    with _loading:
        return _made_environment()


@functools.cache
def _made_environment() -> Any:
    """Return the torchax environment of this module: its tables of operators, with what they
    lack."""
    with _as_torchax_expects():
        try:
            from torchax import tensor
            from torchax.ops.ops_registry import Operator
            from torchax.tensor import (
                Environment,
                OperatorNotFound,
                RuntimeProperty,
                XLADispatchMode,
            )
        except ImportError as error:
            raise CallerError(
                f"tracing torch code needs torchax: pip install torchax ({error})"
            ) from error
        # A device that any torch has, unlike torchax's "jax": a traced tensor has no memory here.
        for name in _NOT_TORCHS:
            delattr(tensor.Tensor, name)
        tensor.Tensor.device = property(lambda _: torch.device("meta"))
        tensor.Tensor.data = property(lambda x: x.detach(), _set_data)
        follow_writes(tensor.Tensor, lambda made: env.note_made(made))

        class Bridge(Environment):
            """An environment that takes tensors of torch's own for constants, and loses nothing
            in silence."""

            def dispatch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
                if not has_x64():
                    self._refuse_lossy(func, args, kwargs)
                if func in _OF_VALUES and not _holds_tensors((args, kwargs)):
                    with no_dispatch(), torch._C.DisableTorchFunction():
                        made = func(
                            *args,
                            **{
                                name: value
                                for name, value in (kwargs or {}).items()
                                if name != "device"
                            },
                        )
                    return self._constant(made)
                if func is torch.tensor:
                    kwargs = _with_dtype(args, kwargs or {})
                kwargs = kwargs or {}
                if isinstance(func, torch._ops.OpOverloadPacket):
                    raise OperatorNotFound(str(func))  # torch chooses the overload
                if self.param.stand_ins:
                    args, kwargs = torch_pytree.tree_map_only(Tensor, self._current, (args, kwargs))
                if func in _INDEXING:
                    return self._index(func, *args)
                if mutations.written(func):
                    return self._write(func, types, args, kwargs)
                if makes_views(func) and args and hasattr(args[0], "place"):
                    return self._view(func, args, kwargs)
                return self._new(func, types, args, kwargs)

            def _new(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
                """Call what returns new tensors, or its arguments as they are."""
                try:
                    made = super().dispatch(func, types, args, kwargs)
                except OperatorNotFound as error:
                    if not isinstance(func, torch._ops.OpOverload):
                        raise  # torch composes it of operators
                    if not _holds_tensors((args, kwargs)):
                        return func(*args, **kwargs)
                    raise CallerError(_WITHOUT_LOWERING.format(func)) from error
                except (BridgeError, RuntimeError):
                    raise  # of the bridge, or of torch, which names the operator
                except ValueError as error:
                    if not isinstance(func, torch._ops.OpOverload):
                        raise  # of a function that torch has in Python, for its caller
                    raise CallerError(f"{_WITHOUT_LOWERING.format(func)} ({error})") from error
                except Exception as error:
                    raise CallerError(f"{_WITHOUT_LOWERING.format(func)} ({error})") from error
                # A composition may say that it does not know a case, and C++ would read results
                # that are not there.
                if made is NotImplemented or not _is_result_of(func, made):
                    raise CallerError(_WITHOUT_LOWERING.format(func))
                given = {id(each) for each in torch_pytree.tree_leaves((args, kwargs))}
                return torch_pytree.tree_map_only(
                    tensor.Tensor, lambda leaf: self._fresh(leaf, func, id(leaf) in given), made
                )

            def _fresh(self, leaf: Any, func: Any, is_given: bool) -> Any:
                if leaf.place.parent is not None or (is_given and func not in _COPIES):
                    return leaf
                array = leaf._elem
                return self.j2t_iso(
                    array if torch.is_grad_enabled() else jax.lax.stop_gradient(array)
                )

            def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
                """Call what makes views of its first argument."""
                base = args[0].place
                of = views(func, args, kwargs)
                if of is None:
                    return self._new(func, (), args, kwargs)
                with no_dispatch(), torch._C.DisableTorchFunction():
                    laid_out = func(
                        *args, **kwargs
                    )  # it looks at sizes and strides only, for there are no elements
                is_detached = func is torch.ops.aten.detach.default or not torch.is_grad_enabled()
                made = [
                    self._tensor_at(Place.of_view(base, view, is_detached=is_detached), layout)
                    for view, layout in zip(of, torch_pytree.tree_leaves(laid_out), strict=True)
                ]
                return made if isinstance(laid_out, list | tuple) else made[0]

            def _tensor_at(self, place: Place, layout: Tensor) -> Any:
                made = torch.Tensor._make_wrapper_subclass(
                    tensor.Tensor,
                    layout.shape,
                    strides=layout.stride(),
                    storage_offset=layout.storage_offset(),
                    dtype=layout.dtype,
                    device=torch.device("meta"),
                )
                made._env, made.place = self, place
                self.note_made(made)
                return made

            def note_made(self, made: Any) -> None:
                """Remember a tensor until its trace ends."""
                if self._is_tracing():
                    self.param.made.append(weakref.ref(made))

            def _write(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
                """Call what writes into its arguments: compute the new values, and write them."""
                given = mutations.arguments(func, args, kwargs)
                targets = {each.alias: given[each.name] for each in mutations.written(func)}
                leaves = [
                    leaf for leaf in torch_pytree.tree_leaves(targets) if isinstance(leaf, Tensor)
                ]
                if not all(hasattr(leaf, "place") for leaf in leaves):
                    self._refuse_to_write(func, given, leaves)
                    return func(*args, **kwargs)
                if view := mutations.becomes(func):
                    return self._become(func, view, args, kwargs)
                operator = mutations.functional(func)
                made = self.dispatch(operator, types, *mutations.call_of(operator, given))
                values = [
                    leaf for leaf in torch_pytree.tree_leaves(made) if isinstance(leaf, Tensor)
                ]
                new = len(values) - len(leaves)  # what is written comes last
                for leaf, value in zip(leaves, values[new:], strict=True):
                    self._assign(leaf, value, func, is_out="out" in func._overloadname)
                return mutations.returned(func, targets, values[:new])

            def _assign(self, target: Any, value: Any, func: Any, *, is_out: bool) -> None:
                with no_dispatch(), torch._C.DisableTorchFunction():
                    can_cast = torch.can_cast(value.dtype, target.dtype)
                if not can_cast:
                    raise RuntimeError(
                        f"result type {value.dtype} can't be cast to the desired output type"
                        f" {target.dtype}"
                    )
                array = self.t2j_iso(value).astype(target._elem.dtype)
                if array.shape != target._elem.shape:
                    if not is_out or target.place.parent is not None:
                        raise RuntimeError(
                            f"output with shape {list(target.shape)} doesn't match the shape"
                            f" {list(value.shape)} of what {func} writes into it"
                        )
                    target.place = Place(target._elem)
                    with no_dispatch(), torch._C.DisableTorchFunction():
                        torch.ops.aten.resize_.default(target, list(value.shape))
                target._elem = array

            def _become(self, func: Any, view: Any, args: Any, kwargs: Any) -> Any:
                """Call what changes a tensor's sizes: it becomes a view of its old self."""
                of = views(view, args, kwargs)
                if of is None:
                    raise CallerError(_WITHOUT_LOWERING.format(func))
                is_detached = func is torch.ops.aten.detach_.default
                args[0].place = Place.of_view(args[0].place, of[0], is_detached=is_detached)
                with no_dispatch(), torch._C.DisableTorchFunction():
                    func(*args, **kwargs)
                return args[0]

            def _refuse_to_write(
                self, func: Any, given: Mapping[str, Any], leaves: Sequence[Tensor]
            ) -> None:
                """Refuse traced values in a tensor that is not traced.

                Note other writes, to undo them.
                """
                if any(hasattr(leaf, "place") for leaf in torch_pytree.tree_leaves(given)):
                    raise CallerError(
                        "the torch code writes a traced value into a tensor of shape"
                        f" {list(leaves[0].shape)} that it holds as a constant (by {func}):"
                        " register the tensor as a buffer, make it within the traced code, or run"
                        " the code by RemoteTorchFunction"
                    )
                for leaf in leaves:
                    self.param.note_write(leaf)

            def _index(self, func: Any, target: Any, index: Any, *value: Any) -> Any:
                """Read or write the elements at an index."""
                if _has_traced_position(index):
                    return self._at_positions(func, target, index, *value)
                with no_dispatch(), torch._C.DisableTorchFunction():
                    index = _with_tensors_for_lists(index)
                return func(target, index, *value)

            def _at_positions(self, func: Any, target: Any, index: Any, value: Any = None) -> Any:
                """Index by traced positions. torch would look at their values, to make a view."""
                target = self._constant(target)
                items = index if isinstance(index, tuple) else (index,)
                if any(
                    isinstance(item, slice) and _has_traced_position((item.start, item.stop))
                    for item in items
                ):
                    raise CallerError(
                        "the torch code takes a slice whose bounds are traced, so that its size"
                        " depends on values; index with torch.arange and a mask, or run the code by"
                        " RemoteTorchFunction"
                    )
                at = self.t2j_iso(index)
                place = Place.of_view(
                    target.place, indexed(at), is_detached=not torch.is_grad_enabled()
                )
                with no_dispatch(), torch._C.DisableTorchFunction():
                    made = self._tensor_at(
                        place, torch.empty(place.read().shape, dtype=target.dtype, device="meta")
                    )
                if func is torch.Tensor.__getitem__:
                    return made
                with self._dispatch_mode:
                    torch.ops.aten.copy_.default(
                        made, value if isinstance(value, Tensor) else torch.tensor(value)
                    )
                return None

            def _get_op_or_decomp(self, func: Any) -> Any:
                """Return torchax's version of an operator, or torch's own composition of simpler
                ones."""
                try:
                    return super()._get_op_or_decomp(func)
                except OperatorNotFound:
                    composed = _composition(func)
                    if composed is None:
                        raise
                return Operator(func, composed, False, False, False, False)

            def _should_use_torchax_tensor(self, device: Any) -> bool:
                return device is None or torch.device(device).type != "cpu"

            def _is_same_device(self, moved: Any, device: Any) -> bool:
                # A traced tensor is wherever JAX has it, whatever the code says.
                return isinstance(moved, tensor.Tensor) or super()._is_same_device(moved, device)

            def t2j_iso(self, tree: Any) -> Any:
                return super().t2j_iso(torch_pytree.tree_map_only(Tensor, self._constant, tree))

            def wrapped(self, tree: Any) -> Any:
                """Return a pytree with each of its arrays as a tensor of this environment."""
                return jax.tree.map(self._wrapped, tree)

            def unwrapped(self, tree: Any) -> Any:
                """Return a pytree with each of its tensors as an array."""
                return torch_pytree.tree_map_only(Tensor, self.t2j_iso, tree)

            @contextlib.contextmanager
            def drawing_from(self, rng: jax.Array | None) -> Iterator[None]:
                """Trace with random numbers from this key, and raise what was refused."""
                before = self._property.content
                self._property.content = mine = _Trace(None, rng, None)
                if isinstance(before, _Trace):  # this is a part of it
                    mine.made, mine.stand_ins = before.made, before.stand_ins
                try:
                    yield
                except TypeError:
                    # Of a DTypeError within `x * y`, Python makes a TypeError that tells nobody
                    # anything.
                    if mine.refusal is not None:
                        raise mine.refusal from None
                    raise
                finally:
                    self._property.content = before
                    mine.restore()

            @contextlib.contextmanager
            def within(self, rng: jax.Array | None) -> Iterator[None]:
                """Trace code with random numbers from this key: a part of what is traced
                already, or by itself."""
                with contextlib.ExitStack() as stack:
                    is_part = self._is_tracing()
                    stack.enter_context(self.drawing_from(rng))
                    if not is_part:
                        stack.enter_context(_ending(self.param))
                        stack.enter_context(torch.enable_grad())
                        stack.enter_context(taken_over)
                        stack.enter_context(self)
                    yield

            def key_for_a_part(self) -> jax.Array | None:
                """Return a key for what a part of the code draws, if there is one for the code."""
                return None if self.param.prng is None else self.param.get_and_rotate_prng_key()

            def _is_tracing(self) -> bool:
                return isinstance(self.param, _Trace)

            def _apply(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
                if self._is_tracing() and any(hasattr(x, "jax") for x in args):
                    return applied(self, function, args, kwargs)
                return apply_plainly(function, args, kwargs)

            def _refuse_lossy(self, func: Any, args: Any, kwargs: Any) -> None:
                for value in torch_pytree.tree_leaves((args, kwargs)):
                    if isinstance(value, torch.dtype) and value in _LOSSY:
                        what = (
                            f"the torch code computes in {value} (in"
                            f" {getattr(func, '__name__', func)})"
                        )
                        self._refuse(DTypeError(f"{what}, but JAX runs without x64: {TURN_ON_X64}"))

            def _refuse(self, error: DTypeError) -> NoReturn:
                self.param.refusal = error
                raise error

            def _wrapped(self, leaf: Any) -> Any:
                if isinstance(leaf, np.ndarray | np.generic):
                    with no_dispatch(), torch._C.DisableTorchFunction():
                        leaf = torch.as_tensor(np.asarray(leaf))
                return self._constant(leaf) if isinstance(leaf, Tensor) else self.j2t_iso(leaf)

            def _current(self, leaf: Tensor) -> Tensor:
                """Return what stands for a tensor in this trace, if it is a parameter or a view
                of one."""
                if hasattr(leaf, "place"):
                    return leaf
                original, traced = self.param.stand_ins.get(_storage(leaf), (None, None))
                if original is None or traced is None:
                    return leaf
                if leaf is original:
                    return traced
                with no_dispatch(), torch._C.DisableTorchFunction():
                    is_view = (
                        original.is_contiguous()
                        and leaf.dtype == original.dtype
                        and not leaf.is_conj()
                    )
                    if not is_view:
                        raise CallerError(
                            f"the torch code reads a parameter of shape {list(original.shape)}"
                            " through another tensor that shares its memory, and that tracing"
                            " cannot make of the parameter's value: make the view in forward, or"
                            " run the code by RemoteTorchFunction"
                        )
                    offset = leaf.storage_offset() - original.storage_offset()
                    view = strided(original, leaf.shape, leaf.stride(), offset)
                    layout = torch.empty_strided(
                        leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta"
                    )
                is_detached = original.requires_grad and not leaf.requires_grad
                return self._tensor_at(
                    Place.of_view(traced.place, view, is_detached=is_detached), layout
                )

            def _constant(self, tensor: Tensor) -> Tensor:
                tensor = self._current(tensor)
                if hasattr(tensor, "place"):  # it is traced
                    return tensor
                try:
                    with no_dispatch(), torch._C.DisableTorchFunction():
                        made: Tensor = self.j2t_iso(to_jax(tensor.detach()))
                except DTypeError as error:
                    self._refuse(error)
                return made

        class _Trace(RuntimeProperty):
            """What belongs to one trace, in one thread."""

            refusal: DTypeError | None = None

            def __init__(self, *how: Any) -> None:
                super().__init__(*how)
                self.made: list[weakref.ref[Tensor]] = []
                self.stand_ins: dict[int, tuple[Tensor, Tensor]] = {}
                self._written: dict[int, tuple[Tensor, Tensor]] = {}

            def stand_in(self, original: Tensor, traced: Tensor) -> None:
                """Have a traced tensor stand for a parameter or buffer, by whichever reference
                the code reads it."""
                self.stand_ins[_storage(original)] = original, traced

            def note_write(self, constant: Tensor) -> None:
                """Keep the value of a tensor that is not traced, before the code writes into it."""
                if id(constant) not in self._written:
                    self._written[id(constant)] = constant, constant.detach().clone()

            def restore(self) -> None:
                """Put back what the code has written into tensors that are not traced."""
                with no_dispatch(), torch._C.DisableTorchFunction(), torch.no_grad():
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

        class Dispatch(XLADispatchMode):
            """What sees each operator that torch calls."""

            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                if func.namespace == "prims":  # of which some of torch's compositions consist
                    with self:
                        return func.impl_aten(*args, **(kwargs or {}))
                return self.env.dispatch(func, types, args, kwargs)

        env = Bridge()
        env._dispatch_mode = Dispatch(env)
        taken_over = Switch(functools.partial(take_over, env._apply))
    _let_masks_be_traced(tensor.Tensor)
    for kind in torch.return_types.all_return_types:
        with contextlib.suppress(ValueError):  # it is known already
            jax.tree_util.register_pytree_node(
                kind, lambda x: (tuple(x), None), functools.partial(_rebuilt, kind)
            )
    for operator, f in {**OPERATORS, **LOWERINGS}.items():
        env.override_op_definition(operator, _of_tensors(env, f))
    for operator, f in RANDOM.items():
        env.override_op_definition(operator, _of_tensors(env, _drawing(env, f)))
    for function in _COMPOSED:
        env._ops.pop(function, None)
    env.override_op_definition(functional.batch_norm, _batch_norm)
    env.override_op_definition(functional.instance_norm, _instance_norm)
    return env


def _rebuilt(kind: Any, _: None, children: Sequence[Any]) -> Any:
    return kind(children)


def _holds_tensors(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in torch_pytree.tree_leaves(tree))


def _composition(operator: Any) -> Callable[..., Any] | None:
    """Return torch's own definition of an ATen operator by simpler ones, if there is one."""
    if not isinstance(operator, torch._ops.OpOverload):
        return None
    if operator in decomposition_table:
        return decomposition_table[operator]
    return operator.decompose if operator._can_decompose() else None


def _is_result_of(operator: Any, made: Any) -> bool:
    """Whether a result has as many parts as an operator returns."""
    returns = len(operator._schema.returns) if isinstance(operator, torch._ops.OpOverload) else 1
    return returns < 2 or (isinstance(made, list | tuple) and len(made) == returns)


def _with_tensors_for_lists(index: Any) -> Any:
    """Return an index with a tensor in the place of each list: on a traced tensor's device its
    values would be lost."""
    if isinstance(index, tuple):
        return tuple(_with_tensors_for_lists(item) for item in index)
    is_plain = isinstance(index, list | range | np.ndarray) and not _holds_tensors(index)
    return torch.as_tensor(np.asarray(index)) if is_plain and len(index) else index


def _has_traced_position(index: Any) -> bool:
    """Whether an index has a traced number in it."""
    return any(
        hasattr(leaf, "place")
        and not leaf.ndim
        and not leaf.is_floating_point()
        and leaf.dtype is not torch.bool
        for item in (index if isinstance(index, tuple | list) else [index])
        for leaf in ([item.start, item.stop, item.step] if isinstance(item, slice) else [item])
    )


@contextlib.contextmanager
def _ending(trace: Any) -> Iterator[None]:
    """End the tensors of a trace with it.

    Raises:
      CallerError: the code has kept one of them.
    """
    try:
        yield
        trace.stand_ins.clear()
        if any(each() is not None for each in trace.made):
            gc.collect()  # some may be in cycles
        for kept in (each() for each in trace.made):
            if kept is not None:
                raise CallerError(
                    f"the torch code has kept a traced tensor of shape {list(kept.shape)} in"
                    f" {holder_of(kept)}, where it would outlive the call: return it, make it again"
                    " in each call, or keep it in an attribute of the traced module, which is put"
                    " back after each call"
                )
    finally:
        for kept in (each() for each in trace.made):
            if kept is not None:
                kept.place.end()
        trace.made.clear()
        trace.stand_ins.clear()


def _storage(tensor: Tensor) -> int:
    """Return what tensors that share memory have in common."""
    with no_dispatch(), torch._C.DisableTorchFunction():
        return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _set_data(x: Any, other: Any) -> None:
    x.place.write(other._elem, has_derivative=False)


def _with_dtype(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of `torch.tensor` with the dtype that torch would find in its data,
    partly traced."""
    if kwargs.get("dtype") is not None:
        return dict(kwargs)
    leaves = torch_pytree.tree_leaves(args[:1] or kwargs.get("data"))
    with no_dispatch(), torch._C.DisableTorchFunction():
        dtypes = [
            leaf.dtype if isinstance(leaf, Tensor) else torch.tensor(leaf).dtype for leaf in leaves
        ]
        return {**kwargs, "dtype": functools.reduce(torch.promote_types, dtypes)}


def _let_masks_be_traced(kind: type[Tensor]) -> None:
    """Keep nn.TransformerEncoder from looking at a traced mask's values: whether it is causal is
    but a hint."""
    original = transformer._detect_is_causal_mask

    def detect(mask: Any, is_causal: Any = None, size: Any = None) -> bool:
        return is_causal is True if isinstance(mask, kind) else original(mask, is_causal, size)

    transformer._detect_is_causal_mask = detect


@contextlib.contextmanager
def _as_torchax_expects() -> Iterator[None]:
    """Import torchax as if all the operators were there that its tables name, and undo what it does
    besides.

    torchax 0.0.13 names overloads of ATen with Dimname, which torch 2.13 has no more: they cannot
    be called, so it does not matter what stands for them.
    """
    packet = torch._ops.OpOverloadPacket
    original = packet.__getattr__

    def with_stand_ins(self: Any, key: str) -> Any:
        try:
            return original(self, key)
        except AttributeError:
            if key.startswith("_") or not str(self).startswith("aten."):
                raise
            return f"{self}.{key}, which this torch lacks"

    with (
        simple_attention,  # torchax turns fused attention off for good
        patch.object(packet, "__getattr__", with_stand_ins),
        # With a device named "jax", for which torch has no code, torch.compile fails, whatever it
        # compiles.
        patch.object(torch.utils, "rename_privateuse1_backend"),
        patch.object(torch, "_register_device_module"),
        patch.dict(os.environ),
    ):
        yield


def _drawing(env: Any, f: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a key and arrays as one that takes its key from the trace, and has no
    derivative."""

    def drawn(*args: Any, generator: Any = None, **kwargs: Any) -> Any:
        return jax.lax.stop_gradient(f(env.get_and_rotate_prng_key(generator), *args, **kwargs))

    return drawn


def _of_tensors(env: Any, f: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arrays as one of tensors."""

    def called(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = env.t2j_iso((args, kwargs))
        return env.j2t_iso(f(*args, **kwargs))

    return called


# What torchax computes without writing the statistics back ----------------------------------------


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training and running_mean is not None and running_var is not None:
        return _normalized(x, [1, -1], running_mean, running_var, weight, bias, eps)
    count = math.prod(x.shape) // x.shape[1]
    if training and count == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {list(x.shape)}"
        )
    axes = [0, *range(2, x.ndim)]
    mean, var = x.mean(axes), x.var(axes, correction=0)
    _update(running_mean, mean, momentum)
    _update(running_var, _unbiased(var, count), momentum)
    return _normalized(x, [1, -1], mean, var, weight, bias, eps)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats and running_mean is not None and running_var is not None:
        return _normalized(x, [1, -1], running_mean, running_var, weight, bias, eps)
    axes = list(range(2, x.ndim))
    mean, var = x.mean(axes), x.var(axes, correction=0)
    _update(running_mean, mean.mean(0), momentum)
    _update(running_var, _unbiased(var, math.prod(x.shape[2:])).mean(0), momentum)
    return _normalized(x, list(x.shape[:2]), mean, var, weight, bias, eps)


def _unbiased(var: Tensor, count: int) -> Tensor:
    return var * (count / max(count - 1, 1))


def _update(running: Tensor | None, new: Tensor, momentum: float) -> None:
    if running is not None:
        running.copy_((1 - momentum) * running + momentum * new)


def _normalized(
    x: Tensor,
    lead: list[int],
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    ones = [1] * (x.ndim - 2)
    y = (x - mean.reshape(lead + ones)) * torch.rsqrt(var.reshape(lead + ones) + eps)
    if weight is not None:
        y = y * weight.reshape([1, -1, *ones])
    if bias is not None:
        y = y + bias.reshape([1, -1, *ones])
    return y.to(x.dtype)
