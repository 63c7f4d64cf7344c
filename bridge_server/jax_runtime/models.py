"""Targets of JAX frameworks, each split into a pure function and its state.

Randomness: each random stream has a key, derived from the caller's key and the stream's name. The
keys go to `rngs` of flax.linen, to the streams with that tag of a flax.nnx module, and to other
targets as keyword arguments of the streams' names (haiku: as its one key).
"""

import copy
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from bridge_server.held_arrays import warn_of_held_arrays
from bridge_server.jax_runtime.layers import keras_parts, penzai_parts
from bridge_server.jax_runtime.parts import (
    Invocation,
    Outcome,
    Parts,
    keywords_of,
    mode_arguments,
    nested,
    only_key,
    unnested,
    with_keys,
    with_mode,
)
from bridge_server.jax_runtime.types import dtype_name, number_to_array, path_step
from bridge_server.runtime import CALL, Model, Parameter
from bridge_server.signatures import Methods, bound_method, methods_of, only_method
from bridge_wire.dtypes import BY_NAME, NEEDS_X64, TURN_ON_X64
from bridge_wire.errors import CallerError, SpecError, TargetError
from bridge_wire.specs import Spec

_log = logging.getLogger(__name__)


def adapt(name: str, target: Any, *, x64: bool) -> Model:
    """Return the model of a target.

    Raises:
      TargetError: the target cannot be served.
    """
    parts = _parts_of(target)
    if parts is None:
        raise TargetError(
            f"{name!r} is a {type(target).__module__}.{type(target).__qualname__}; expected a"
            " function, an object with public methods, a pair (apply, params), a triple (apply,"
            " params, state), a flax.linen module with its variables, a flax.nnx module, an equinox"
            " module or a pair (module, state), a haiku transform with its parameters (and state),"
            " a keras model, or a penzai layer"
        )
    _warn_of_constants(name, target, parts)
    leaves, structure = jax.tree_util.tree_flatten_with_path(parts.state)
    state = [
        leaf if hasattr(leaf, "dtype") else number_to_array(leaf) for _, leaf in leaves
    ]
    # Leaves of other types, such as PRNG keys, stay with the worker.
    sent = [i for i, leaf in enumerate(state) if dtype_name(leaf) in BY_NAME]
    labels = [_label(leaves[i][0]) for i in sent]
    if len(set(labels)) != len(labels):
        raise TargetError(
            f"two parameters of {name!r} have the same path among {sorted(labels)}"
        )
    parameters = []
    for label, i in zip(labels, sent, strict=True):
        spec = _spec(name, label, state[i], x64=x64)
        is_trainable = spec.dtype.is_inexact and parts.is_trainable(label)
        parameters.append(Parameter(label, spec, is_trainable))

    def apply(values: Sequence[Any], invocation: Invocation) -> tuple[Any, list[Any]]:
        full = list(state)
        for i, value in zip(sent, values, strict=True):
            full[i] = value
        before = jax.tree_util.tree_unflatten(structure, full)
        result, after = parts.call(before, invocation)
        return result, _buffers(parameters, values, after) if invocation.mutable else []

    return Model(
        name=name,
        doc=inspect.getdoc(parts.documented) or "",
        methods=parts.methods,
        parameters=tuple(parameters),
        values=[jnp.asarray(state[i]) for i in sent],
        apply=apply,
        has_modes=parts.has_modes,
        source=(target, parts.documented),
    )


def _warn_of_constants(name: str, target: Any, parts: Parts) -> None:
    """Warn of arrays that look like parameters but are constants, and of the opposite."""
    if parts.is_function:
        remedy = (
            "serve a pair (apply, params) whose apply(params, *args) uses these arrays, or a flax"
            " or equinox module"
        )
        warn_of_held_arrays(
            _log, name, parts.documented, _is_array, noun="arrays", remedy=remedy
        )
    elif parts.is_pair and isinstance(parts.state, Mapping) and "params" in parts.state:
        others = sorted(str(key) for key in parts.state if key != "params")
        moving = [
            key
            for key in others
            if any(map(_is_array, jax.tree.leaves(parts.state[key])))
        ]
        if moving:
            _log.warning(
                "model %r is a pair (apply, params), so training changes its collections %s like"
                " parameters; serve the pair (flax.linen module, variables) to have them as"
                " buffers, or close over them in apply",
                name,
                moving,
            )


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray) and value.ndim > 0


def _buffers(
    parameters: Sequence[Parameter], before: Sequence[Any], state: Any
) -> list[Any]:
    """Return the buffers' new values, as constants: no derivative passes through state."""
    # By path, since a call may add state of its own, such as values that flax's modules sow.
    after = {
        _label(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    buffers: list[Any] = []
    for parameter, old in zip(parameters, before, strict=True):
        if parameter.trainable:
            continue
        new = jnp.asarray(after.get(parameter.path, old), old.dtype)
        if new.shape != old.shape:
            raise SpecError(
                f"the call changes the shape of the buffer `{parameter.path}` from"
                f" {list(old.shape)} to {list(new.shape)}; keep the shapes of a served model's"
                " state fixed"
            )
        buffers.append(jax.lax.stop_gradient(new))
    return buffers


def _spec(model: str, label: str, leaf: Any, *, x64: bool) -> Spec:
    dtype = BY_NAME[dtype_name(leaf)]
    if dtype.name in NEEDS_X64 and not x64:
        raise TargetError(
            f"the parameter {label!r} of {model!r} has dtype {dtype.name}, but JAX runs without"
            f" x64; cast it, or {TURN_ON_X64}"
        )
    return Spec(dtype, tuple(leaf.shape))


def _parts_of(target: Any) -> Parts | None:
    parts = _method_parts_of(target)
    if parts is not None:
        return parts
    traced = _imported("bridge_server.torch_via_xla")
    if isinstance(target, traced.TracedModule):
        return _traced_module_parts(target)
    if isinstance(target, traced.TracedFunction):
        return _traced_function_parts(target)
    nnx = _imported("flax.nnx")
    equinox = _imported("equinox")
    if type(target) is tuple:
        return _tuple_parts_of(target)
    if isinstance(target, _imported("flax.linen").Module):
        return _linen_parts(target, None)
    if isinstance(target, nnx.Module):
        return _nnx_parts(nnx, target)
    if isinstance(target, equinox.Module):
        return _equinox_parts(equinox, target)
    if isinstance(target, (keras := _imported("keras")).Model):
        return keras_parts(keras, target)
    if isinstance(target, _imported("penzai.nn.layer").Layer):
        return penzai_parts(_imported("penzai.pz"), target)
    if not isinstance(target, type) and (methods := methods_of(target)):
        return _object_parts(target, methods)
    return None


def _method_parts_of(target: Any) -> Parts | None:
    """Return the parts of a bound method of a module, or of a pair of one and the module's state.

    The module's state belongs to them. Other methods are plain functions.
    """
    is_pair = type(target) is tuple and len(target) == 2
    linen, equinox = _imported("flax.linen"), _imported("equinox")
    bases = linen.Module, equinox.Module, _imported("flax.nnx").Module
    binding = bound_method(target[0] if is_pair else target, bases)
    if binding is None:
        return None
    owner, name = binding
    if not is_pair:
        parts = _parts_of(owner)
    elif isinstance(owner, linen.Module) or _is_stateful(equinox, owner, target[1]):
        parts = _pair_parts_of(owner, target[1])
    else:
        return None
    return parts and parts.only(owner, name)


def _tuple_parts_of(target: tuple[Any, ...]) -> Parts | None:
    if len(target) == 2:
        return _pair_parts_of(*target)
    if len(target) == 3 and callable(target[0]):
        return _triple_parts(*target)
    return None


def _pair_parts_of(target: Any, state: Any) -> Parts | None:
    haiku = _imported("haiku")
    equinox = _imported("equinox")
    if isinstance(target, haiku.Transformed):
        return _haiku_parts(target, state)
    if isinstance(target, haiku.TransformedWithState):
        return _stateful_haiku_parts(target, state)
    if _is_stateful(equinox, target, state):
        return _stateful_equinox_parts(equinox, target, state)
    if isinstance(target, _imported("flax.linen").Module):
        return _linen_parts(target, state)
    return _pair_parts(target, state) if callable(target) else None


def _is_stateful(equinox: Any, module: Any, state: Any) -> bool:
    """Whether a pair is an equinox module and its state."""
    is_module = isinstance(module, equinox.Module)
    return is_module and isinstance(state, equinox.nn.State)


class _NotImported:
    """Stands in for a module that is not imported, and so cannot have made a target."""

    def __getattr__(self, name: str) -> tuple[type, ...]:
        return ()  # no object is an instance of ()


def _imported(name: str) -> Any:
    return sys.modules.get(name, _NotImported())


def _object_parts(target: Any, methods: Methods) -> Parts:
    """Split a function, or an object with methods; its arrays are constants."""

    def call(state: Any, invocation: Invocation) -> Outcome:
        owner = _copied_object(target) if invocation.method else target
        function = invocation.function_of(owner)
        return function(*invocation.args, **with_keys(function, invocation)), state

    return Parts(call, (), target, methods, is_function=True)


def _copied_object(target: Any) -> Any:
    """Return a copy, so that no later call finds the traced arrays that a method has stored."""
    try:
        return copy.copy(target)
    except Exception:
        return target


def _pair_parts(apply: Callable[..., Any], params: Any) -> Parts:
    def call(state: Any, invocation: Invocation) -> Outcome:
        if invocation.mutable:
            raise CallerError(
                "mutable=True, but a pair (apply, params) does not return a new state; serve a"
                " triple (apply, params, state), a flax.linen, flax.nnx or haiku model, or a pair"
                " of an equinox module and its eqx.nn.State"
            )
        return apply(state, *invocation.args, **with_keys(apply, invocation)), state

    methods = only_method(apply, skipped=1)
    return Parts(call, params, apply, methods, is_pair=True)


def _triple_parts(apply: Callable[..., Any], params: Any, state: Any) -> Parts:
    """Split `apply(params, state, *args) -> (result, new state)`; the state is the buffers."""

    def call(both: Any, invocation: Invocation) -> Outcome:
        invocation = with_mode(apply, invocation, skipped=2)
        keywords = with_keys(apply, invocation)
        outcome = apply(both["params"], both["state"], *invocation.args, **keywords)
        if not isinstance(outcome, tuple) or len(outcome) != 2:
            raise SpecError(
                f"apply of a triple (apply, params, state) returned a {type(outcome).__qualname__};"
                " expected a pair (result, new state)"
            )
        result, after = outcome
        return result, {"state": after}

    return Parts(
        call,
        {"params": params, "state": state},
        apply,
        only_method(apply, skipped=2),
        is_trainable=_is_under_params,
        has_modes=bool(mode_arguments(apply)),
    )


def _is_under_params(label: str) -> bool:
    return label.partition(".")[0] == "params"


def _linen_parts(module: Any, variables: Any) -> Parts:
    if variables is None:
        if module.scope is None:
            raise TargetError(
                "a flax.linen module needs its variables: serve the pair (module, variables)"
            )
        module, variables = module.unbind()

    def call(state: Any, invocation: Invocation) -> Outcome:
        invocation = with_mode(_bound_function(module, invocation), invocation)
        options: dict[str, Any] = {}
        if invocation.rng_streams:
            options["rngs"] = dict(invocation.rng_streams)
        if invocation.mutable:
            options["mutable"] = [name for name in state if name != "params"]

        # Not module.apply(state, *args, **kwargs): a caller's `method` would reach any attribute.
        def run(bound: Any) -> Any:
            function = invocation.function_of(bound)
            return function(*invocation.args, **invocation.kwargs)

        result = module.apply(state, method=run, **options)
        if not invocation.mutable:
            return result, state
        result, changed = result
        return result, {**state, **changed}

    methods = methods_of(module, _imported("flax.linen").Module)
    functions = [getattr(module, name) for name in methods]
    return Parts(
        call,
        variables,
        getattr(module, CALL, module),
        methods,
        is_trainable=_is_under_params,
        has_modes=any(map(mode_arguments, functions)),
    )


def _nnx_parts(nnx: Any, module: Any) -> Parts:
    graph, state = nnx.split(module)
    flat = [
        (".".join(map(str, path)), variable)
        for path, variable in nnx.to_flat_state(state)
    ]
    trainable = {path for path, variable in flat if isinstance(variable, nnx.Param)}
    tags = {variable.tag for _, variable in flat if isinstance(variable, nnx.RngKey)}

    def run(state: Any, invocation: Invocation) -> Outcome:
        merged = nnx.merge(graph, state)
        if invocation.training is not None:
            (merged.train if invocation.training else merged.eval)()
        if invocation.rng_streams:
            nnx.reseed(merged, policy="match_shape", **invocation.rng_streams)
        function = invocation.function_of(merged)
        result = function(*invocation.args, **invocation.kwargs)
        return result, nnx.split(merged)[1]

    def call(state: Any, invocation: Invocation) -> Outcome:
        passed = invocation.rng_streams.keys()
        if missing := passed - tags:
            raise CallerError(
                f"the model has no random streams {sorted(missing)}; those of its nnx.Rngs are"
                f" {sorted(tags)}"
            )
        # The counts advance with a mutable state; inference may draw the same numbers each time.
        if invocation.mutable or invocation.training is False:
            return run(state, invocation)
        fresh = _copied(state)  # a call changes the variables of the state that it gets
        result, after = run(state, invocation)
        read = _rng_streams_read(
            nnx, fresh, after, lambda state: run(state, invocation)[0]
        )
        if repeated := sorted(read - passed):
            raise CallerError(
                f"the model draws from its nnx.Rngs streams {repeated}, and each call would draw"
                f" the same; pass rngs={repeated}, or mutable=True so that their counts advance, or"
                " call .eval() for inference"
            )
        return result, after

    return Parts(
        call,
        state,
        getattr(module, CALL, module),
        methods_of(module, nnx.Module),
        is_trainable=trainable.__contains__,
        has_modes=True,
    )


def _rng_streams_read(
    nnx: Any, before: Any, after: Any, run: Callable[[Any], Any]
) -> set[str]:
    """Return the tags of the random streams that the result of a call depends on."""
    flat = dict(nnx.to_flat_state(before))
    later = dict(nnx.to_flat_state(after))
    counts = {
        path: count for path, count in flat.items() if isinstance(count, nnx.RngCount)
    }
    if all(_leaf(later[path]) is _leaf(count) for path, count in counts.items()):
        return set()
    # Transforms such as nnx.scan replace counts that no draw has advanced, so trace whether the
    # result depends on the keys.
    keys = {path: key for path, key in flat.items() if isinstance(key, nnx.RngKey)}

    def result_of(values: Sequence[Any]) -> list[Any]:
        full = dict(flat)
        for (path, key), value in zip(keys.items(), values, strict=True):
            full[path] = jax.tree.unflatten(jax.tree.structure(key), [value])
        state = _copied(nnx.from_flat_state(full))
        return [jnp.asarray(leaf) for leaf in jax.tree.leaves(run(state))]

    jaxpr = jax.make_jaxpr(result_of)(list(map(_leaf, keys.values()))).jaxpr
    _, are_read = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return {
        key.tag for key, is_read in zip(keys.values(), are_read, strict=True) if is_read
    }


def _copied(state: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf, state)


def _leaf(variable: Any) -> Any:
    (leaf,) = jax.tree.leaves(variable)
    return leaf


def _equinox_parts(equinox: Any, module: Any) -> Parts:
    arrays, rest = equinox.partition(module, equinox.is_array)

    def call(state: Any, invocation: Invocation) -> Outcome:
        whole = _in_equinox_mode(equinox, equinox.combine(state, rest), invocation)
        function = invocation.function_of(whole)
        keywords = with_keys(_bound_function(module, invocation), invocation)
        return function(*invocation.args, **keywords), state

    methods = methods_of(module, equinox.Module)
    # A function under a decorator such as eqx.filter_jit is a module too.
    is_function = hasattr(module, "__wrapped__")
    documented = module if is_function else getattr(module, CALL, module)
    return Parts(call, arrays, documented, methods, has_modes=True)


def _stateful_equinox_parts(equinox: Any, module: Any, state: Any) -> Parts:
    """Split a module of equinox.nn.make_with_state, which takes `state=` and returns a new one."""
    arrays, rest = equinox.partition(
        {"model": module, "state": state}, equinox.is_array
    )

    def call(state: Any, invocation: Invocation) -> Outcome:
        whole = equinox.combine(state, rest)
        model = _in_equinox_mode(equinox, whole["model"], invocation)
        function = invocation.function_of(model)
        bound = _bound_function(module, invocation)
        keywords = with_keys(bound, invocation)
        accepted = keywords_of(bound)
        if accepted is not None and "state" not in accepted:
            return function(*invocation.args, **keywords), {}
        result, after = function(*invocation.args, **keywords, state=whole["state"])
        return result, {"state": after}

    def is_trainable(label: str) -> bool:
        return label.startswith("model.")

    return Parts(
        call,
        arrays,
        getattr(module, CALL, module),
        methods_of(module, equinox.Module, supplied=("state",)),
        is_trainable=is_trainable,
        has_modes=True,
    )


def _bound_function(module: Any, invocation: Invocation) -> Any:
    return getattr(module, invocation.method or CALL)


def _in_equinox_mode(equinox: Any, module: Any, invocation: Invocation) -> Any:
    if invocation.training is None:
        return module
    return equinox.nn.inference_mode(module, value=not invocation.training)


def _haiku_parts(transformed: Any, params: Any) -> Parts:
    apply = transformed.apply

    def call(state: Any, invocation: Invocation) -> Outcome:
        key = only_key(invocation)
        invocation = with_mode(apply, invocation, skipped=2)
        return apply(state, key, *invocation.args, **invocation.kwargs), state

    methods = only_method(apply, skipped=2)
    has_modes = bool(mode_arguments(apply))
    return Parts(call, params, apply, methods, has_modes=has_modes)


def _stateful_haiku_parts(transformed: Any, params_and_state: Any) -> Parts:
    apply = transformed.apply

    def call(state: Any, invocation: Invocation) -> Outcome:
        both = state["params"], state["state"]
        key = only_key(invocation)
        invocation = with_mode(apply, invocation, skipped=3)
        result, after = apply(*both, key, *invocation.args, **invocation.kwargs)
        return result, {"state": after}

    params, state = params_and_state
    return Parts(
        call,
        {"params": params, "state": state},
        apply,
        only_method(apply, skipped=3),
        is_trainable=_is_under_params,
        has_modes=bool(mode_arguments(apply)),
    )


def _traced_module_parts(module: Any) -> Parts:
    """Split a torch module that runs through XLA; its parameters have torch's names."""
    arrays = {**module.params, **module.buffers}

    def call(state: Any, invocation: Invocation) -> Outcome:
        params = unnested(state, module.params)
        buffers = unnested(state, module.buffers)
        key = only_key(invocation)
        traced = module.method(invocation.method) if invocation.method else module
        options = {"buffers": buffers, "mutable": True, "rng": key}
        result, after = traced(params, *invocation.args, **options, **invocation.kwargs)
        return result, nested({**params, **after}.items())

    function = module.function
    is_whole = function == module.module.forward
    base = _imported("torch.nn").Module
    own = methods_of(module.module, base) if is_whole else {}
    return Parts(
        call,
        nested(arrays.items()),
        function,
        own | only_method(function),
        is_trainable=module.params.__contains__,
    )


def _traced_function_parts(function: Any) -> Parts:
    def call(state: Any, invocation: Invocation) -> Outcome:
        key = only_key(invocation)
        return function(*invocation.args, rng=key, **invocation.kwargs), state

    documented = function.__wrapped__
    return Parts(call, (), documented, only_method(documented))


def _label(path: Sequence[Any]) -> str:
    # An nnx.Variable holds its array as `value`.
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    steps = [path_step(step) for step in path]
    return ".".join(step.replace(".", "_") for step in steps) or "value"
