"""What may be served, taken apart into a pure function and its state.

Randomness: a stream's key is made of the caller's by its name. It goes where the framework wants
it: into `rngs` of flax.linen, into the streams of that tag in a flax.nnx module, and to everything
else as the keyword argument of the stream's name (haiku: as its one key).
"""

import functools
import inspect
import logging
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from bridge_server.held_arrays import arrays_held
from bridge_server.jax_runtime.types import dtype_name, number_to_array, path_step
from bridge_server.runtime import Model, Parameter
from bridge_server.signatures import positional_names
from bridge_wire.dtypes import BY_NAME, NEEDS_X64, TURN_ON_X64
from bridge_wire.errors import CallerError, SpecError, TargetError
from bridge_wire.specs import Spec

_log = logging.getLogger(__name__)

Streams = Mapping[str, Any]


class Parts(NamedTuple):
    """A target taken apart: a pure function of its state, which alone holds arrays.

    `call(state, args, kwargs, streams, changes)` returns the result and the state after the call,
    which is of interest if `changes` is set. It raises CallerError for a stream or a change that
    the model does not have. For a model with modes, `call` also takes `training`: the mode for this
    call, or None for the model's own.
    """

    call: Callable[..., tuple[Any, Any]]
    state: Any
    documented: Any  # the callable whose docstring and signature describe the model
    skips_first: bool = False  # whether that signature begins with the parameters
    is_trainable: Callable[[str], bool] = lambda label: True
    has_modes: bool = False
    is_function: bool = False  # whether it is called as it is, without a state


def adapt(name: str, target: Any, *, x64: bool) -> Model:
    """Return the model that a target stands for.

    Raises:
      TargetError: it is nothing that can be served.
    """
    parts = _parts_of(target)
    if parts is None:
        raise TargetError(
            f"{name!r} is a {type(target).__module__}.{type(target).__qualname__}; expected a"
            " function, a pair (apply, params), a flax.linen module with its variables, a flax.nnx"
            " module, an equinox module or a pair (module, state), or a haiku transform with its"
            " parameters (and state)"
        )
    _warn_of_constants(name, target, parts)
    leaves, structure = jax.tree_util.tree_flatten_with_path(parts.state)
    state = [leaf if hasattr(leaf, "dtype") else number_to_array(leaf) for _, leaf in leaves]
    # What is no array of a type we know, such as a PRNG key, stays with the worker.
    sent = [i for i, leaf in enumerate(state) if dtype_name(leaf) in BY_NAME]
    labels = [_label(leaves[i][0]) for i in sent]
    if len(set(labels)) != len(labels):
        raise TargetError(f"two parameters of {name!r} have the same path among {sorted(labels)}")
    specs = [_spec(name, label, state[i], x64=x64) for label, i in zip(labels, sent, strict=True)]
    parameters = tuple(
        Parameter(label, spec, spec.dtype.is_inexact and parts.is_trainable(label))
        for label, spec in zip(labels, specs, strict=True)
    )

    def apply(
        values: Sequence[Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        streams: Streams,
        changes: bool,
        training: bool | None = None,
    ) -> tuple[Any, list[Any]]:
        full = list(state)
        for i, value in zip(sent, values, strict=True):
            full[i] = value
        before = jax.tree_util.tree_unflatten(structure, full)
        mode = {"training": training} if parts.has_modes else {}
        result, after = parts.call(before, args, kwargs, streams, changes, **mode)
        return result, _buffers(parameters, values, after) if changes else []

    return Model(
        name=name,
        doc=inspect.getdoc(parts.documented) or "",
        arguments=positional_names(parts.documented, skips_first=parts.skips_first),
        parameters=parameters,
        values=[jnp.asarray(state[i]) for i in sent],
        apply=apply,
        has_modes=parts.has_modes,
        source=(target, parts.documented),
    )


def _warn_of_constants(name: str, target: Any, parts: Parts) -> None:
    """Log which arrays cannot be trained although they look like parameters, and which are
    trained like parameters."""
    if parts.is_function and (paths := arrays_held(parts.documented, _is_array)):
        shown = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
        _log.warning(
            "model %r is served without parameters, but holds %d arrays (%s): they are constants,"
            " which no client can train; to train them serve a pair (apply, params), whose"
            " apply(params, *args) uses these arrays, or a flax or equinox module",
            name,
            len(paths),
            shown,
        )
    elif parts.skips_first and isinstance(parts.state, Mapping) and "params" in parts.state:
        others = sorted(str(key) for key in parts.state if key != "params")
        moving = [key for key in others if any(map(_is_array, jax.tree.leaves(parts.state[key])))]
        if moving:
            _log.warning(
                "model %r is a pair (apply, params), so that the collections %s are trained like"
                " parameters; serve the pair (flax.linen module, variables) to have them as"
                " buffers, or close over them in apply",
                name,
                moving,
            )


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray) and value.ndim > 0


def _buffers(parameters: Sequence[Parameter], before: Sequence[Any], state: Any) -> list[Any]:
    """Return the buffers' new values, as constants: no derivative goes through what a call
    leaves behind."""
    # By path, since a call may also create state of its own, such as what flax's modules sow.
    after = {_label(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
    made: list[Any] = []
    for parameter, old in zip(parameters, before, strict=True):
        if not parameter.trainable:
            new = jnp.asarray(after.get(parameter.path, old), old.dtype)
            if new.shape != old.shape:
                raise SpecError(
                    f"the call changes the shape of the buffer `{parameter.path}` from"
                    f" {list(old.shape)} to {list(new.shape)}; the state of a served model has"
                    " fixed shapes"
                )
            made.append(jax.lax.stop_gradient(new))
    return made


def _spec(model: str, label: str, leaf: Any, *, x64: bool) -> Spec:
    dtype = BY_NAME[dtype_name(leaf)]
    if dtype.name in NEEDS_X64 and not x64:
        raise TargetError(
            f"the parameter {label!r} of {model!r} has dtype {dtype.name}, but JAX runs without"
            f" x64; cast it, or {TURN_ON_X64}"
        )
    return Spec(dtype, tuple(leaf.shape))


def _parts_of(target: Any) -> Parts | None:
    # A framework that was not imported cannot have made the target.
    linen, nnx, equinox, haiku = (
        sys.modules.get(name) for name in ("flax.linen", "flax.nnx", "equinox", "haiku")
    )
    traced = sys.modules.get("bridge_server.torch_via_xla")
    state: Any = None
    if traced is not None and isinstance(target, traced.TracedModule):
        return _traced_module_parts(target)
    if traced is not None and isinstance(target, traced.TracedFunction):
        return _traced_function_parts(target)
    if type(target) is tuple and len(target) == 2:
        target, state = target
        if haiku is not None and isinstance(target, haiku.Transformed):
            return _haiku_parts(target, state)
        if haiku is not None and isinstance(target, haiku.TransformedWithState):
            return _stateful_haiku_parts(target, state)
        if (
            equinox is not None
            and isinstance(target, equinox.Module)
            and isinstance(state, equinox.nn.State)
        ):
            return _stateful_equinox_parts(equinox, target, state)
        if linen is None or not isinstance(target, linen.Module):
            return _pair_parts(target, state) if callable(target) else None
    if linen is not None and isinstance(target, linen.Module):
        return _linen_parts(target, state)
    if nnx is not None and isinstance(target, nnx.Module):
        return _nnx_parts(nnx, target)
    if equinox is not None and isinstance(target, equinox.Module):
        return _equinox_parts(equinox, target)
    if callable(target) and not isinstance(target, type):
        return _function_parts(target)
    return None


def _function_parts(function: Callable[..., Any]) -> Parts:
    def call(
        state: Any, args: Any, kwargs: Any, streams: Streams, changes: bool
    ) -> tuple[Any, Any]:
        return function(*args, **_with_keys(function, kwargs, streams)), state

    return Parts(call, (), function, is_function=True)


def _pair_parts(apply: Callable[..., Any], params: Any) -> Parts:
    def call(
        state: Any, args: Any, kwargs: Any, streams: Streams, changes: bool
    ) -> tuple[Any, Any]:
        if changes:
            raise CallerError(
                "mutable=True, but a pair (apply, params) does not return a new state; serve a"
                " flax.linen, flax.nnx or haiku model, or a pair of an equinox module and its"
                " eqx.nn.State"
            )
        return apply(state, *args, **_with_keys(apply, kwargs, streams)), state

    return Parts(call, params, apply, skips_first=True)


def _linen_parts(module: Any, variables: Any) -> Parts:
    if variables is None:
        if module.scope is None:
            raise TargetError(
                "a flax.linen module needs its variables: serve the pair (module, variables)"
            )
        module, variables = module.unbind()

    def call(
        state: Any, args: Any, kwargs: Any, streams: Streams, changes: bool
    ) -> tuple[Any, Any]:
        options: dict[str, Any] = {"rngs": dict(streams)} if streams else {}
        if not changes:
            return module.apply(state, *args, **kwargs, **options), state
        collections = [name for name in state if name != "params"]
        result, changed = module.apply(state, *args, **kwargs, **options, mutable=collections)
        return result, {**state, **changed}

    return Parts(
        call,
        variables,
        module.__call__,
        is_trainable=lambda label: label.partition(".")[0] == "params",
    )


def _nnx_parts(nnx: Any, module: Any) -> Parts:
    graph, state = nnx.split(module)
    flat = [(".".join(map(str, path)), variable) for path, variable in nnx.to_flat_state(state)]
    trainable = {path for path, variable in flat if isinstance(variable, nnx.Param)}
    tags = {variable.tag for _, variable in flat if isinstance(variable, nnx.RngKey)}

    def run(
        state: Any, args: Any, kwargs: Any, streams: Streams, training: bool | None
    ) -> tuple[Any, Any]:
        merged = nnx.merge(graph, state)
        if training is not None:
            (merged.train if training else merged.eval)()
        if streams:
            nnx.reseed(merged, policy="match_shape", **streams)
        result = merged(*args, **kwargs)
        return result, nnx.split(merged)[1]

    def call(
        state: Any,
        args: Any,
        kwargs: Any,
        streams: Streams,
        changes: bool,
        training: bool | None = None,
    ) -> tuple[Any, Any]:
        if missing := streams.keys() - tags:
            raise CallerError(
                f"the model has no random streams {sorted(missing)}; those of its nnx.Rngs are"
                f" {sorted(tags)}"
            )
        if (
            changes or training is False
        ):  # the counts advance with the state; inference may draw the same each time
            return run(state, args, kwargs, streams, training)
        fresh = jax.tree.map(
            lambda leaf: leaf, state
        )  # a call changes the variables of the state that it is given
        result, after = run(state, args, kwargs, streams, training)
        read = _streams_read(
            nnx, fresh, after, lambda state: run(state, args, kwargs, streams, training)[0]
        )
        if repeated := sorted(read - streams.keys()):
            raise CallerError(
                f"the model draws from its nnx.Rngs streams {repeated}, and each call would draw"
                f" the same; pass rngs={repeated}, or mutable=True so that their counts advance, or"
                " call .eval() for inference"
            )
        return result, after

    return Parts(call, state, module.__call__, is_trainable=trainable.__contains__, has_modes=True)


def _streams_read(nnx: Any, before: Any, after: Any, run: Callable[[Any], Any]) -> set[str]:
    """Return the tags of the random streams that the result of a call depends on."""
    flat, later = dict(nnx.to_flat_state(before)), dict(nnx.to_flat_state(after))
    counts = {path: count for path, count in flat.items() if isinstance(count, nnx.RngCount)}
    if all(_leaf(later[path]) is _leaf(count) for path, count in counts.items()):
        return set()
    # Transforms such as nnx.scan replace counts that nothing has advanced: see whether the result
    # depends on the keys.
    keys = {path: key for path, key in flat.items() if isinstance(key, nnx.RngKey)}

    def result_of(values: Sequence[Any]) -> list[Any]:
        changed = [
            jax.tree.unflatten(jax.tree.structure(key), [v])
            for key, v in zip(keys.values(), values, strict=True)
        ]
        full = nnx.from_flat_state({**flat, **dict(zip(keys, changed, strict=True))})
        state = jax.tree.map(lambda leaf: leaf, full)
        return [jnp.asarray(leaf) for leaf in jax.tree.leaves(run(state))]

    jaxpr = jax.make_jaxpr(result_of)(list(map(_leaf, keys.values()))).jaxpr
    _, are_read = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return {key.tag for key, is_read in zip(keys.values(), are_read, strict=True) if is_read}


def _leaf(variable: Any) -> Any:
    (leaf,) = jax.tree.leaves(variable)
    return leaf


def _equinox_parts(equinox: Any, module: Any) -> Parts:
    arrays, rest = equinox.partition(module, equinox.is_array)

    def call(
        state: Any,
        args: Any,
        kwargs: Any,
        streams: Streams,
        changes: bool,
        training: bool | None = None,
    ) -> tuple[Any, Any]:
        whole = _in_equinox_mode(equinox, equinox.combine(state, rest), training)
        return whole(*args, **_with_keys(module.__call__, kwargs, streams)), state

    return Parts(call, arrays, module.__call__, has_modes=True)


def _stateful_equinox_parts(equinox: Any, module: Any, state: Any) -> Parts:
    """Of what equinox.nn.make_with_state returns; the module takes `state=` and returns its
    result and the new one."""
    arrays, rest = equinox.partition({"model": module, "state": state}, equinox.is_array)

    def call(
        state: Any,
        args: Any,
        kwargs: Any,
        streams: Streams,
        changes: bool,
        training: bool | None = None,
    ) -> tuple[Any, Any]:
        whole = equinox.combine(state, rest)
        keyed = _with_keys(module.__call__, kwargs, streams)
        result, after = _in_equinox_mode(equinox, whole["model"], training)(
            *args, **keyed, state=whole["state"]
        )
        return result, {"state": after}

    return Parts(
        call,
        arrays,
        module.__call__,
        is_trainable=lambda label: label.startswith("model."),
        has_modes=True,
    )


def _in_equinox_mode(equinox: Any, module: Any, training: bool | None) -> Any:
    return module if training is None else equinox.nn.inference_mode(module, value=not training)


def _haiku_parts(transformed: Any, params: Any) -> Parts:
    def call(
        state: Any, args: Any, kwargs: Any, streams: Streams, changes: bool
    ) -> tuple[Any, Any]:
        return transformed.apply(state, _only_key(streams), *args, **kwargs), state

    return Parts(call, params, transformed.apply)


def _stateful_haiku_parts(transformed: Any, params_and_state: Any) -> Parts:
    def call(
        state: Any, args: Any, kwargs: Any, streams: Streams, changes: bool
    ) -> tuple[Any, Any]:
        result, after = transformed.apply(
            state["params"], state["state"], _only_key(streams), *args, **kwargs
        )
        return result, {"state": after}

    params, state = params_and_state
    both = {"params": params, "state": state}
    return Parts(
        call, both, transformed.apply, is_trainable=lambda label: label.startswith("params.")
    )


def _traced_module_parts(module: Any) -> Parts:
    """Of a torch module that runs through XLA; its parameters have torch's names."""
    names = [*module.params, *module.buffers]
    arrays = [*module.params.values(), *module.buffers.values()]

    def call(
        state: Any, args: Any, kwargs: Any, streams: Streams, changes: bool
    ) -> tuple[Any, Any]:
        named = dict(zip(names, _nested_values(state, names), strict=True))
        params, buffers = (
            {name: named[name] for name in own} for own in (module.params, module.buffers)
        )
        how = {"buffers": buffers, "mutable": True, "rng": _only_key(streams)}
        result, after = module(params, *args, **how, **kwargs)
        return result, _nested({**params, **after})

    state = _nested(dict(zip(names, arrays, strict=True)))
    return Parts(call, state, module.module.forward, is_trainable=module.params.__contains__)


def _traced_function_parts(function: Any) -> Parts:
    def call(
        state: Any, args: Any, kwargs: Any, streams: Streams, changes: bool
    ) -> tuple[Any, Any]:
        return function(*args, rng=_only_key(streams), **kwargs), state

    return Parts(call, (), function.__wrapped__)


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of dicts whose paths are the names, such as `layers.0.weight`."""
    tree: dict[str, Any] = {}
    for name, value in named.items():
        *branches, leaf = name.split(".")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[leaf] = value
    return tree


def _nested_values(tree: Any, names: Sequence[str]) -> list[Any]:
    return [functools.reduce(operator.getitem, name.split("."), tree) for name in names]


def _with_keys(
    function: Callable[..., Any], kwargs: dict[str, Any], streams: Streams
) -> dict[str, Any]:
    """Return the keyword arguments with the key of each stream as one more.

    Raises:
      CallerError: the function takes no argument of that name, or the caller passes it.
    """
    if not streams:
        return kwargs
    if both := streams.keys() & kwargs.keys():
        raise CallerError(
            f"{sorted(both)} are passed as arguments and named in rngs; leave out one of them"
        )
    accepted = _keywords_of(function)
    if accepted is not None and (missing := streams.keys() - accepted):
        raise CallerError(
            f"the model takes no arguments {sorted(missing)} for the keys of these random streams;"
            f" its arguments are {sorted(accepted)}"
        )
    return {**kwargs, **streams}


def _keywords_of(function: Callable[..., Any]) -> set[str] | None:
    """Return the names that a function takes as keywords; None if it takes any, or does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _only_key(streams: Streams) -> Any:
    if len(streams) > 1:
        raise CallerError(
            f"the model draws from one random stream, not from {sorted(streams)}; name one in rngs"
        )
    return next(iter(streams.values()), None)


def _label(path: Sequence[Any]) -> str:
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey(
        "value"
    ):  # what an nnx.Variable holds
        path = path[:-1]
    steps = [path_step(step) for step in path]
    return ".".join(step.replace(".", "_") for step in steps) or "value"
