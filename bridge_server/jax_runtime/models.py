"""What may be served, taken apart into a function and its state."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from bridge_server.jax_runtime.types import path_step
from bridge_wire.errors import TargetError


class Parts(NamedTuple):
    """A target taken apart: `apply(state, *args, **kwargs)`, where only `state` holds arrays."""

    apply: Callable[..., Any]
    state: Any
    documented: Any  # the callable whose docstring and signature describe the model
    skips_first: bool = False  # whether that signature begins with the parameters
    is_trainable: Callable[[str], bool] = lambda label: True


def parts_of(target: Any) -> Parts | None:
    # A framework that was not imported cannot have made the target.
    linen, nnx, equinox = (sys.modules.get(name) for name in ("flax.linen", "flax.nnx", "equinox"))
    state: Any = None
    if isinstance(target, tuple) and len(target) == 2:
        target, state = target
        if linen is None or not isinstance(target, linen.Module):
            return Parts(target, state, target, skips_first=True) if callable(target) else None
    if linen is not None and isinstance(target, linen.Module):
        if state is None and target.scope is None:
            raise TargetError("a flax.linen module needs its variables: serve the pair (module, variables)")
        module, variables = target.unbind() if state is None else (target, state)
        is_trainable = lambda label: label.partition(".")[0] == "params"  # noqa: E731
        return Parts(module.apply, variables, module.__call__, is_trainable=is_trainable)
    if nnx is not None and isinstance(target, nnx.Module):
        graph, state = nnx.split(target)
        trainable = {
            ".".join(map(str, path)) for path, variable in nnx.to_flat_state(state) if isinstance(variable, nnx.Param)
        }

        def apply_nnx(state: Any, *args: Any, **kwargs: Any) -> Any:
            return nnx.merge(graph, state)(*args, **kwargs)

        return Parts(apply_nnx, state, target.__call__, is_trainable=trainable.__contains__)
    if equinox is not None and isinstance(target, equinox.Module):
        arrays, rest = equinox.partition(target, equinox.is_array)

        def apply_equinox(state: Any, *args: Any, **kwargs: Any) -> Any:
            return equinox.combine(state, rest)(*args, **kwargs)

        return Parts(apply_equinox, arrays, target.__call__)
    if callable(target) and not isinstance(target, type):
        return Parts(lambda _, *args, **kwargs: target(*args, **kwargs), (), target)
    return None


def positional_names(parts: Parts) -> tuple[str, ...]:
    try:
        signature = inspect.signature(parts.documented)
    except (TypeError, ValueError):
        return ()
    names = tuple(
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    )
    return names[1:] if parts.skips_first else names


def label(path: Sequence[Any]) -> str:
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):  # what an nnx.Variable holds
        path = path[:-1]
    steps = [path_step(step) for step in path]
    return ".".join(step.replace(".", "_") for step in steps) or "value"
