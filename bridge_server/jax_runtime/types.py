"""Conversions between specs and JAX's types; JAX's notion of arrays, pytree nodes and paths."""

import collections
import ctypes
import enum
import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from bridge_server.signatures import MOST_ELEMENTS
from bridge_wire.classes import Node, constant, is_plain_name, structured
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import ProtocolError, SpecError
from bridge_wire.keys import Key
from bridge_wire.memory.dlpack import DeviceExporter, Exporter, keep_owners_by
from bridge_wire.specs import Spec

keep_owners_by(lambda buffer: np.frombuffer(buffer, np.uint8).__dlpack__())


@functools.cache
def importer() -> Callable[[Exporter], jax.Array]:
    """Return this jax's fastest import of host memory: the public one takes 30 µs, XLA's own 4."""
    try:
        from jaxlib._jax import dlpack_managed_tensor_to_buffer as imported

        device = jax.local_devices(backend="cpu")[0]

        def quick(exporter: Exporter) -> jax.Array:
            array: jax.Array = imported(exporter.__dlpack__(), device, None)
            return array

        probe = np.ones(16, np.float32)
        spec = Spec(BY_NAME["float32"], probe.shape)
        if quick(Exporter(probe.ctypes.data, spec)).tolist() == probe.tolist():
            return quick
    except Exception:  # private: any release may lack it, or change its arguments
        pass
    return jax.dlpack.from_dlpack


@functools.cache
def importer_on(device: jax.Device) -> Callable[[DeviceExporter], jax.Array]:
    """Return this jax's fastest import of GPU memory, for which a stream of XLA's waits."""
    try:
        from jaxlib._jax import dlpack_managed_tensor_to_buffer as imported

        def quick(exporter: Any) -> jax.Array:
            stream = device.get_stream_for_external_ready_events()
            array: jax.Array = imported(
                exporter.__dlpack__(stream=stream), device, stream
            )
            return array

        probe = jax.device_put(np.ones(16, np.float32), device)
        if np.asarray(quick(probe)).tolist() == [1] * 16:
            return quick
    except Exception:  # private, and the CPU has no streams
        pass
    return jax.dlpack.from_dlpack


def host_array(pointer: int, spec: Spec, owner: Any) -> np.ndarray:
    """Return a NumPy array over host memory, which `owner` keeps alive."""
    memory = (ctypes.c_char * spec.nbytes).from_address(pointer)
    memory.owner = owner  # type: ignore[attr-defined]
    return np.ndarray(spec.shape, jnp.dtype(spec.dtype.name), memory)  # type: ignore[arg-type]


def has_x64() -> bool:
    """Return whether 64-bit types exist at this moment, in this thread."""
    return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]


def aval_of(spec: Spec) -> jax.ShapeDtypeStruct:
    # A Python number arrives in the widest type of its kind and gets the worker's default type.
    to_dtype = jax.dtypes.canonicalize_dtype if spec.weak else jnp.dtype
    dtype = to_dtype(spec.dtype.name)
    return jax.ShapeDtypeStruct(spec.shape, dtype, weak_type=spec.weak)


def avals_of(specs: Sequence[Spec]) -> list[jax.ShapeDtypeStruct]:
    return [aval_of(spec) for spec in specs]


def specs_of(avals: Sequence[Any]) -> tuple[Spec, ...]:
    return tuple(Spec(BY_NAME[dtype_name(aval)], tuple(aval.shape)) for aval in avals)


def dtype_name(value: Any) -> str:
    return str(getattr(value, "dtype", None))


def is_inexact(value: Any) -> bool:
    return BY_NAME[dtype_name(value)].is_inexact


_ARRAYS = jax.Array | np.ndarray | np.generic | bool | int | float | complex


def is_array_like(value: Any) -> bool:
    return isinstance(value, _ARRAYS) and not is_key(value)


def is_key(value: Any) -> bool:
    """Return whether a value is an array of typed random keys."""
    return isinstance(value, jax.Array) and jnp.issubdtype(
        value.dtype, jax.dtypes.prng_key
    )


def key_of(data: Any, implementation: str) -> jax.Array:
    """Return the random keys of these data.

    Raises:
      SpecError: they are no keys of that implementation.
    """
    try:
        keys: jax.Array = jax.random.wrap_key_data(data, impl=implementation)
    except (TypeError, ValueError, AttributeError) as error:
        given = f"{dtype_name(data)}{list(np.shape(data))}"
        raise SpecError(
            f"a random key of implementation {implementation[:80]!r} came as {given}; expected the"
            " uint32 words of jax.random.key_data, and an implementation of this JAX, such as"
            f" 'threefry2x32' with two words: {error}"
        ) from error
    return keys


def as_output(leaf: Any, position: int) -> Any:
    array = jnp.asarray(leaf)
    if dtype_name(array) not in BY_NAME:
        raise SpecError(
            f"the model returned an array of dtype {array.dtype} as its leaf {position}, which"
            " torch lacks; cast it in the model"
        )
    return array


def number_to_array(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, bool | int | float | complex) else leaf


def expand(value: Any) -> Node | Key | None:
    """Split any pytree node that is registered with jax, and random keys; None for a leaf."""
    if is_key(value):
        return Key(jax.random.key_data(value), str(jax.random.key_impl(value)))
    if type(value) in _PLAIN_MAPPINGS:
        return None
    structure: Any
    flat, structure = jax.tree_util.tree_flatten_with_path(
        value, is_leaf=lambda x: x is not value
    )
    if len(flat) == 1 and flat[0][1] is value:
        return constant(value) if _is_constant(value) else None
    steps = [path[0] for path, _ in flat]
    children = [child for _, child in flat]
    fields: Sequence[Any] = list(map(path_step, steps))
    if isinstance(value, Mapping):
        fields = [getattr(step, "key", getattr(step, "name", None)) for step in steps]
        if set(fields) != set(value):
            return None
    elif not all(map(is_plain_name, fields)):
        fields = [f"item{i}" for i in range(len(children))]
    return structured(
        type(value),
        tuple(fields),
        children,
        structure=structure,
        static=structure.node_data()[1],
        unflatten=jax.tree_util.tree_unflatten,
    )


# Parts of modules that jax takes for leaves: functions, as activations, dtypes and enumerations.
# They are defined by the model's code, and hold no arrays of a call.
_CONSTANTS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    type,
    np.dtype,
    np.ufunc,
    enum.Enum,
    jax.custom_jvp,
    jax.custom_vjp,
    type(jax.jit(lambda: None)),
    bytes,
)


_PLAIN_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict)


def _is_constant(value: Any) -> bool:
    return isinstance(value, _CONSTANTS)


def path_step(step: Any) -> str:
    # DictKey and FlattenedIndexKey, GetAttrKey, SequenceKey.
    for attribute in ("key", "name", "idx"):
        if hasattr(step, attribute):
            return str(getattr(step, attribute))
    return str(step)


def register_dataclass(cls: type, fields: tuple[str, ...]) -> None:
    if issubclass(cls, Mapping):
        raise ProtocolError(
            f"a tree has a mapping of the class {cls.__name__!r}; expected a dict"
        )
    jax.tree_util.register_dataclass(cls, data_fields=list(fields), meta_fields=[])


def check_sizes(jaxpr: Any) -> None:
    """Refuse a program with an array too large for any machine: XLA would abort the process."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            if (
                all(isinstance(size, int) for size in shape)
                and math.prod(shape) > MOST_ELEMENTS
            ):
                raise SpecError(
                    f"the model makes an array of shape {list(shape)}, which no memory can hold"
                )
        for inner in jax.tree_util.tree_leaves(list(equation.params.values())):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                check_sizes(getattr(inner, "jaxpr", inner))
