"""Torchax environment of the bridge: runs each operator of traced torch code in JAX.

Imports torchax, hence only `environment.py` imports this module, after preparing torch for it.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn import functional
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree
from torchax.ops.ops_registry import Operator
from torchax.tensor import Environment, OperatorNotFound, XLADispatchMode
from torchax.tensor import Tensor as TracedTensor

from bridge_server.jax_runtime.types import has_x64
from bridge_server.process_settings import Switch
from bridge_server.torch_via_xla import (
    derivatives,
    indexing,
    lowerings,
    mutations,
    norms,
)
from bridge_server.torch_via_xla.aliases import (
    Place,
    follow_writes,
    indexed,
    makes_views,
    strided,
    views,
)
from bridge_server.torch_via_xla.arrays import to_jax
from bridge_server.torch_via_xla.functions import applied, apply_plainly, take_over
from bridge_server.torch_via_xla.plain_torch import (
    is_traced,
    plain_torch,
    storage_of,
    tensors_in,
)
from bridge_server.torch_via_xla.trace_state import Trace, ending
from bridge_wire.dtypes import TURN_ON_X64
from bridge_wire.errors import BridgeError, CallerError, DTypeError, StructureError

_META = torch.device("meta")
# Functions that make tensors of Python values; torch checks the values' range.
_FROM_VALUES = {torch.tensor, torch.as_tensor}
# Methods of torchax's tensors that return no views where torch's do, or change the tensor itself.
_UNLIKE_TORCH = ("__setitem__", "detach", "flatten", "type_as")
# Functions that torchax defines itself. torch's compositions of ATen's operators are more exact.
_COMPOSED_BY_TORCH = (
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
_NEEDS_X64 = {torch.float64, torch.complex128}
_NOT_IN_JAX = {torch.complex32}
# Functions that torchax takes for factories of a device's tensors, though their ends are tensors.
_SPACED = {torch.linspace: lowerings.linspace, torch.logspace: lowerings.logspace}
# Operators whose further results are statistics, without a derivative in torch.
_WITH_STATISTICS = {
    torch.ops.aten._batch_norm_no_update,
    torch.ops.aten._batch_norm_with_update,
    torch.ops.aten._batch_norm_with_update_functional,
    torch.ops.aten._native_batch_norm_legit,
    torch.ops.aten._native_batch_norm_legit_functional,
    torch.ops.aten._native_batch_norm_legit_no_training,
    torch.ops.aten.native_batch_norm,
    torch.ops.aten.native_layer_norm,
}


def make() -> "BridgeEnvironment":
    """Return a new environment with the operators of this package."""
    env = BridgeEnvironment()
    _adapt_tensors(env)
    _detect_no_traced_masks()
    _register_return_types()
    _override_operators(env)
    return env


class BridgeEnvironment(Environment):
    """An environment that takes torch's own tensors as constants and refuses silent losses."""

    def __init__(self) -> None:
        super().__init__()
        self._dispatch_mode = _Dispatch(self)
        self._functions_traced = Switch(functools.partial(take_over, self._apply))

    # Traces ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def drawing_from(self, rng: jax.Array | None) -> Iterator[None]:
        """Trace with random numbers from this key, and raise a refusal that Python has hidden."""
        outer = self._property.content
        trace = Trace(None, rng, None)
        if isinstance(outer, Trace):
            trace.share(outer)
        self._property.content = trace
        try:
            yield
        except TypeError:
            # For a DTypeError within `x * y`, Python raises a TypeError without the reason.
            if trace.refusal is not None:
                raise trace.refusal from None
            raise
        finally:
            self._property.content = outer
            trace.restore()

    @contextlib.contextmanager
    def within(self, rng: jax.Array | None) -> Iterator[None]:
        """Trace code with random numbers from this key, as a part of the trace under way if any."""
        is_part = self._is_tracing()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.drawing_from(rng))
            if not is_part:
                stack.enter_context(ending(self.param))
                stack.enter_context(torch.enable_grad())
                stack.enter_context(self._functions_traced)
                stack.enter_context(self)
            yield

    def key_for_a_part(self) -> jax.Array | None:
        """Return a random key for a part of the code, or None if the code has no key."""
        return None if self.param.prng is None else self.param.get_and_rotate_prng_key()

    def note_made(self, traced: Any) -> None:
        """Remember a tensor until its trace ends."""
        if self._is_tracing():
            self.param.tensors.append(weakref.ref(traced))

    def _is_tracing(self) -> bool:
        return isinstance(self.param, Trace)

    def _apply(
        self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        if self._is_tracing() and any(hasattr(x, "jax") for x in args):
            return applied(self, function, args, kwargs)
        return apply_plainly(function, args, kwargs)

    # Arrays and tensors ---------------------------------------------------------------------------

    def wrapped(self, tree: Any) -> Any:
        """Return a pytree with each of its arrays as a tensor of this environment."""
        return jax.tree.map(self._wrapped, tree)

    def unwrapped(self, tree: Any) -> Any:
        """Return a pytree with each of its tensors as an array."""
        return pytree.tree_map_only(Tensor, self.t2j_iso, tree)

    def t2j_iso(self, tree: Any) -> Any:
        return super().t2j_iso(pytree.tree_map_only(Tensor, self._constant, tree))

    def _wrapped(self, leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | np.generic):
            with plain_torch():
                leaf = torch.as_tensor(np.asarray(leaf))
        return self._constant(leaf) if isinstance(leaf, Tensor) else self.j2t_iso(leaf)

    def _constant(self, tensor: Tensor) -> Any:
        """Return a traced tensor for any tensor: a parameter's stand-in, or a constant."""
        tensor = self._current(tensor)
        if is_traced(tensor):
            return tensor
        try:
            with plain_torch():
                return self.j2t_iso(to_jax(tensor.detach()))
        except DTypeError as error:
            self._refuse(error)

    def _current(self, tensor: Tensor) -> Any:
        """Return the traced stand-in of a parameter or of a parameter's view, else the tensor."""
        if is_traced(tensor):
            return tensor
        original, traced = self.param.stand_ins.get(storage_of(tensor), (None, None))
        if original is None or traced is None:
            return tensor
        return (
            traced
            if tensor is original
            else self._view_of_parameter(tensor, original, traced)
        )

    def _view_of_parameter(self, tensor: Tensor, original: Tensor, traced: Any) -> Any:
        with plain_torch():
            has_same_type = tensor.dtype == original.dtype and not tensor.is_conj()
            if not has_same_type or not original.is_contiguous():
                raise CallerError(
                    f"the torch code reads a parameter of shape {list(original.shape)} through"
                    " another tensor that shares its memory, and tracing cannot compute that"
                    " tensor from the parameter's value: make the view in forward, or run the code"
                    " by RemoteTorchFunction"
                )
            offset = int(tensor.storage_offset() - original.storage_offset())
            view = strided(original, tensor.shape, tensor.stride(), offset)
            layout = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META
            )
        is_detached = original.requires_grad and not tensor.requires_grad
        return self._tensor_at(
            Place.of_view(traced.place, view, is_detached=is_detached), layout
        )

    def _tensor_at(self, place: Place, layout: Tensor) -> Any:
        traced = torch.Tensor._make_wrapper_subclass(
            TracedTensor,
            layout.shape,
            strides=layout.stride(),
            storage_offset=layout.storage_offset(),
            dtype=layout.dtype,
            device=_META,
        )
        traced._env = self
        traced.place = place
        self.note_made(traced)
        return traced

    # Operators ------------------------------------------------------------------------------------

    def dispatch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        kwargs = kwargs or {}
        self._refuse_types(func, args, kwargs)
        if func in _FROM_VALUES and not tensors_in((args, kwargs)):
            return self._from_values(func, args, kwargs)
        if func is torch.tensor:
            kwargs = _with_dtype(args, kwargs)
        if isinstance(func, OpOverloadPacket):
            raise OperatorNotFound(str(func))  # torch chooses the overload
        if self.param.stand_ins:
            args, kwargs = pytree.tree_map_only(Tensor, self._current, (args, kwargs))
        if func in _SPACED and "out" not in kwargs and _holds_traced((args, kwargs)):
            return _of_tensors(self, _SPACED[func])(*args, **kwargs)
        if func in _INDEXING:
            return self._index(func, *args)
        if mutations.written(func):
            return self._write(func, types, args, kwargs)
        if makes_views(func) and args and is_traced(args[0]):
            return self._view(func, args, kwargs)
        return self._new(func, types, args, kwargs)

    def _from_values(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        on_host = {name: value for name, value in kwargs.items() if name != "device"}
        with plain_torch():
            constant = func(*args, **on_host)
        return self._constant(constant)

    def _new(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator that returns new tensors, or its arguments as they are."""
        try:
            outputs = super().dispatch(func, types, args, kwargs)
        except OperatorNotFound as error:
            if not isinstance(func, OpOverload):
                raise  # torch composes it of operators
            if not tensors_in((args, kwargs)):
                return func(*args, **kwargs)
            raise _without_lowering(func) from error
        except StructureError as error:
            if not _holds_traced((args, kwargs)):
                raise  # the error of a constant
            raise StructureError(str(_without_lowering(func, error))) from error
        except RecursionError as error:  # torch composes the operator of itself
            raise _without_lowering(func) from error
        except (BridgeError, RuntimeError):
            raise  # torch's RuntimeError names the operator
        except Exception as error:
            # The caller of a Python function of torch may expect its ValueError.
            if isinstance(error, ValueError) and not isinstance(func, OpOverload):
                raise
            raise _without_lowering(func, error) from error
        # A composition may return NotImplemented for a case, and C++ would read missing results.
        if outputs is NotImplemented or not _has_all_results(func, outputs):
            raise _without_lowering(func)
        if getattr(func, "overloadpacket", None) in _WITH_STATISTICS:
            first, *statistics = outputs
            without = pytree.tree_map_only(
                TracedTensor, self._without_derivative, statistics
            )
            outputs = (first, *without)
        inputs = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
        fresh = functools.partial(self._fresh, func, inputs)
        return pytree.tree_map_only(TracedTensor, fresh, outputs)

    def _fresh(self, func: Any, inputs: set[int], traced: Any) -> Any:
        """Return a tensor with a place of its own, unless it is a view or an input."""
        is_input = id(traced) in inputs
        if traced.place.parent is not None or (is_input and func not in _COPIES):
            return traced
        array = traced._elem
        if not torch.is_grad_enabled():
            array = jax.lax.stop_gradient(array)
        return self.j2t_iso(array)

    def _without_derivative(self, traced: Any) -> Any:
        """Return a tensor's value without its derivative."""
        return self.j2t_iso(jax.lax.stop_gradient(traced._elem))

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator that returns views of its first argument."""
        base = args[0].place
        parts = views(func, args, kwargs)
        if parts is None:
            return self._new(func, (), args, kwargs)
        with plain_torch():
            # A traced tensor has sizes and strides and no elements, so this computes layouts only.
            layouts = func(*args, **kwargs)
        is_detached = (
            func is torch.ops.aten.detach.default or not torch.is_grad_enabled()
        )
        outputs = [
            self._tensor_at(Place.of_view(base, part, is_detached=is_detached), layout)
            for part, layout in zip(parts, pytree.tree_leaves(layouts), strict=True)
        ]
        return outputs if isinstance(layouts, list | tuple) else outputs[0]

    def _get_op_or_decomp(self, func: Any) -> Any:
        """Return torchax's definition of an operator, or torch's composition of simpler ones."""
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
        # JAX places a traced tensor, so the code's devices have no effect on it.
        return isinstance(moved, TracedTensor) or super()._is_same_device(moved, device)

    # Writes ---------------------------------------------------------------------------------------

    def _write(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator that writes into its arguments: compute the values, then write them."""
        arguments = mutations.arguments(func, args, kwargs)
        targets = {each.alias: arguments[each.name] for each in mutations.written(func)}
        leaves = tensors_in(targets)
        if not all(map(is_traced, leaves)):
            self._write_constants(func, arguments, leaves)
            return func(*args, **kwargs)
        if view := mutations.becomes(func):
            return self._become(func, view, args, kwargs)
        new_args, new_kwargs = mutations.call_of(mutations.functional(func), arguments)
        outputs = self.dispatch(mutations.functional(func), types, new_args, new_kwargs)
        values = tensors_in(outputs)
        first_written = len(values) - len(leaves)  # the written values come last
        is_out = "out" in func._overloadname
        for leaf, value in zip(leaves, values[first_written:], strict=True):
            self._assign(leaf, value, func, is_out=is_out)
        return mutations.returned(func, targets, values[:first_written])

    def _assign(self, target: Any, value: Any, func: Any, *, is_out: bool) -> None:
        with plain_torch():
            can_cast = torch.can_cast(value.dtype, target.dtype)
        if not can_cast:
            raise RuntimeError(
                f"result type {value.dtype} can't be cast to the desired output type {target.dtype}"
            )
        array = self.t2j_iso(value).astype(target._elem.dtype)
        if array.shape != target._elem.shape:
            if not is_out or target.place.parent is not None:
                raise RuntimeError(
                    f"output with shape {list(target.shape)} doesn't match the shape"
                    f" {list(value.shape)} of the result of {func}"
                )
            target.place = Place(target._elem)
            with plain_torch():
                torch.ops.aten.resize_.default(target, list(value.shape))
        target._elem = array

    def _become(self, func: Any, view: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator that changes a tensor's sizes: it becomes a view of its old self."""
        parts = views(view, args, kwargs)
        if parts is None:
            raise _without_lowering(func)
        target = args[0]
        is_detached = func is torch.ops.aten.detach_.default
        target.place = Place.of_view(target.place, parts[0], is_detached=is_detached)
        with plain_torch():
            func(*args, **kwargs)
        return target

    def _write_constants(
        self, func: Any, arguments: Mapping[str, Any], leaves: Sequence[Tensor]
    ) -> None:
        """Refuse a write of traced values into untraced tensors; note other writes to undo them."""
        if any(map(is_traced, tensors_in(arguments))):
            raise CallerError(
                "the torch code writes a traced value into a tensor of shape"
                f" {list(leaves[0].shape)} that it holds as a constant (by {func}): register the"
                " tensor as a buffer, make it within the traced code, or run the code by"
                " RemoteTorchFunction"
            )
        for leaf in leaves:
            self.param.note_write(leaf)

    # Indexing -------------------------------------------------------------------------------------

    def _index(self, func: Any, target: Any, index: Any, *value: Any) -> Any:
        """Read or write the elements at an index."""
        if indexing.has_traced_position(index):
            return self._at_positions(func, target, index, *value)
        with plain_torch():
            index = indexing.with_tensors_for_lists(index)
        return func(target, index, *value)

    def _at_positions(
        self, func: Any, target: Any, index: Any, value: Any = None
    ) -> Any:
        """Index by traced positions. torch would look at their values, to make a view."""
        indexing.refuse_traced_slices(index)
        target = self._constant(target)
        view = indexed(self.t2j_iso(index))
        place = Place.of_view(
            target.place, view, is_detached=not torch.is_grad_enabled()
        )
        with plain_torch():
            layout = torch.empty(place.read().shape, dtype=target.dtype, device=_META)
            elements = self._tensor_at(place, layout)
        if func is torch.Tensor.__getitem__:
            return elements
        with self._dispatch_mode:
            source = value if isinstance(value, Tensor) else torch.tensor(value)
            torch.ops.aten.copy_.default(elements, source)
        return None

    # Refusals -------------------------------------------------------------------------------------

    def _refuse_types(self, func: Any, args: Any, kwargs: Any) -> None:
        for value in pytree.tree_leaves((args, kwargs)):
            if not isinstance(value, torch.dtype):
                continue
            name = getattr(func, "__name__", func)
            seen = f"the torch code computes in {value} (in {name})"
            if value in _NOT_IN_JAX:
                self._refuse(
                    DTypeError(
                        f"{seen}, which has no counterpart in JAX; cast to another type"
                    )
                )
            if value in _NEEDS_X64 and not has_x64():
                self._refuse(
                    DTypeError(f"{seen}, but JAX runs without x64: {TURN_ON_X64}")
                )

    def _refuse(self, error: DTypeError) -> NoReturn:
        self.param.refusal = error
        raise error


class _Dispatch(XLADispatchMode):
    """Passes each operator that torch calls to the environment."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "prims":  # some of torch's compositions consist of these
            with self:
                return func.impl_aten(*args, **(kwargs or {}))
        return self.env.dispatch(func, types, args, kwargs)


def _without_lowering(func: Any, error: Exception | None = None) -> CallerError:
    reason = f" ({error})" if error is not None else ""
    if func is torch.ops.aten._is_all_true.default:
        reason = (
            "; torch.distributions call it for their checks: pass validate_args=False"
        )
    return CallerError(
        f"the torch code calls {func}, which tracing cannot turn into JAX; write the code without"
        f" it, or run it by RemoteTorchFunction, in a worker or in this process{reason}"
    )


def _holds_traced(tree: Any) -> bool:
    return any(map(is_traced, pytree.tree_leaves(tree)))


def _composition(operator: Any) -> Callable[..., Any] | None:
    """Return torch's definition of an ATen operator by simpler ones, or None if it has none."""
    if not isinstance(operator, OpOverload):
        return None
    if operator in decomposition_table:
        return decomposition_table[operator]
    return operator.decompose if operator._can_decompose() else None


def _has_all_results(operator: Any, outputs: Any) -> bool:
    """Return whether outputs have as many parts as the operator's schema."""
    returns = len(operator._schema.returns) if isinstance(operator, OpOverload) else 1
    return returns < 2 or (
        isinstance(outputs, list | tuple) and len(outputs) == returns
    )


def _with_dtype(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add to the keywords of `torch.tensor` the dtype that torch infers from partly traced data."""
    if kwargs.get("dtype") is not None:
        return kwargs
    data = args[:1] or kwargs.get("data")
    with plain_torch():
        dtypes = map(_dtype_of, pytree.tree_leaves(data))
        return {**kwargs, "dtype": functools.reduce(torch.promote_types, dtypes)}


def _dtype_of(value: Any) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor) else torch.tensor(value).dtype


# Preparation --------------------------------------------------------------------------------------


def _adapt_tensors(env: BridgeEnvironment) -> None:
    for name in _UNLIKE_TORCH:
        delattr(TracedTensor, name)
    # Each build of torch knows "meta", unlike torchax's "jax": a traced tensor has no memory here.
    TracedTensor.device = property(lambda _: _META)
    TracedTensor.data = property(lambda x: x.detach(), _set_data)
    follow_writes(TracedTensor, env.note_made)


def _set_data(x: Any, other: Any) -> None:
    x.place.write(other._elem, has_derivative=False)


def _detect_no_traced_masks() -> None:
    """Keep nn.TransformerEncoder from reading a traced mask's values for its causality hint."""
    original = transformer._detect_is_causal_mask

    def detect(mask: Any, is_causal: Any = None, size: Any = None) -> bool:
        if isinstance(mask, TracedTensor):
            return is_causal is True
        return original(mask, is_causal, size)

    transformer._detect_is_causal_mask = detect


def _register_return_types() -> None:
    for kind in torch.return_types.all_return_types:
        rebuild = functools.partial(_rebuilt, kind)
        with contextlib.suppress(ValueError):  # registered already
            jax.tree_util.register_pytree_node(
                kind, lambda x: (tuple(x), None), rebuild
            )


def _rebuilt(kind: Any, _: None, children: Sequence[Any]) -> Any:
    return kind(children)


def _override_operators(env: BridgeEnvironment) -> None:
    for operator, f in {**derivatives.OPERATORS, **lowerings.OPERATORS}.items():
        env.override_op_definition(operator, _of_tensors(env, f))
    for operator, f in lowerings.RANDOM.items():
        env.override_op_definition(operator, _of_tensors(env, _drawing(env, f)))
    for function in _COMPOSED_BY_TORCH:
        env._ops.pop(function, None)
    env.override_op_definition(functional.batch_norm, norms.batch_norm)
    env.override_op_definition(functional.instance_norm, norms.instance_norm)


def _drawing(env: Any, f: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a key and arrays with the trace's key, and without a derivative."""

    def drawn(*args: Any, generator: Any = None, **kwargs: Any) -> Any:
        key = env.get_and_rotate_prng_key(generator)
        return jax.lax.stop_gradient(f(key, *args, **kwargs))

    return drawn


def _of_tensors(env: Any, f: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arrays as a function of tensors."""

    def called(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = env.t2j_iso((args, kwargs))
        return env.j2t_iso(f(*args, **kwargs))

    return called
