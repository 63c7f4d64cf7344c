"""Calls on arrays that are sharded over the devices of a mesh.

XLA does not look into a callback and would gather its inputs. Within a shard_map each shard makes a
call of its own; if the specs of arguments and results are declared, a call makes that shard_map
itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from bridge_client.arguments import Values
from bridge_client.jax.primitives import varying_axes
from bridge_wire.errors import StructureError


def mesh_of(values: Values) -> Any:
    """Return the mesh that the arrays are sharded over, or that the caller has set; None for a
    single device."""
    for value in values:
        is_traced = isinstance(value, jax.core.Tracer)
        sharding = jax.typeof(value).sharding if is_traced else value.sharding
        mesh = getattr(sharding, "mesh", None)
        if mesh is not None and not mesh.empty:
            return mesh
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def is_manual(mesh: Any) -> bool:
    """Whether this code already runs once per shard, within a shard_map over the mesh."""
    return bool(getattr(mesh, "manual_axes", ()))


def specs_of(declared: Any, tree: Any, option: str) -> list[PartitionSpec]:
    """Return the spec of each leaf: the declared ones are a prefix of the tree.

    Raises:
      StructureError: they are not.
    """

    def for_leaves(spec: PartitionSpec, part: Any) -> Any:
        return jax.tree.map(lambda _: spec, part)

    try:
        broadcast = jax.tree.map(for_leaves, declared, tree, is_leaf=_is_spec)
    except (TypeError, ValueError) as error:
        raise StructureError(
            f"{option}={declared} is no prefix of the structure that it describes: {error}"
        ) from error
    return jax.tree.leaves(broadcast, is_leaf=_is_spec)


def check_declared(in_specs: Any, out_specs: Any) -> None:
    """Raise StructureError if a result would be the same on shards whose calls have different
    arguments."""
    axes = axes_of(jax.tree.leaves(in_specs, is_leaf=_is_spec))
    for spec in jax.tree.leaves(out_specs, is_leaf=_is_spec):
        if missing := sorted(set(axes) - set(axes_of([spec]))):
            raise StructureError(
                f"a result has the spec {spec}, equal along {missing}; arguments are sharded along"
                " these axes, so the shards' results differ: name the axes in out_specs, and"
                " reduce the result afterwards"
            )


def varying_alike(values: Values) -> list[Any]:
    """Return the arrays as varying over all manual axes that any of them varies over.

    The gradient of a value that all shards share is then the sum of their gradients.
    """
    axes: frozenset[str] = frozenset()
    for value in values:
        if isinstance(value, jax.core.Tracer):
            axes |= varying_axes(jax.typeof(value))
    if not axes:
        return list(values)
    return [_cast(value, axes) for value in values]


def _cast(value: Any, axes: frozenset[str]) -> Any:
    if not isinstance(value, jax.Array):
        return value
    missing = tuple(sorted(axes - varying_axes(jax.typeof(value))))
    if not missing:
        return value
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(value, missing, to="varying")
    return jax.lax.pvary(value, missing)  # type: ignore[attr-defined]


def mean_over(axes: Sequence[str], value: Any) -> Any:
    """Return the mean over shards of a value that each has changed; of integers, which are
    counters, the largest."""
    if jnp.issubdtype(value.dtype, jnp.inexact):
        return jax.lax.pmean(value, tuple(axes))
    return jax.lax.pmax(value, tuple(axes))


def axes_of(specs: Sequence[PartitionSpec]) -> tuple[str, ...]:
    """Return the names of the mesh axes in the specs."""
    names: list[str] = []
    for spec in specs:
        for entry in spec:
            if entry is not None:
                names += _names(entry)
    return tuple(dict.fromkeys(names))


def spread(values: Values, mesh: Any, specs: Sequence[PartitionSpec]) -> list[Any]:
    """Return the arrays sharded by the specs, where a shard_map would not do so itself: on explicit
    axes."""
    if not getattr(mesh, "explicit_axes", ()):
        return list(values)
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    return list(map(jax.sharding.reshard, values, shardings))


def per_shard(
    call: Callable[..., Any], mesh: Any, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Return the function that makes the call once per shard."""
    return jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def _names(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)
