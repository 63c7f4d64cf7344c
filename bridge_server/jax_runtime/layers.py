"""keras models and penzai layers, each split into a pure function and its state.

Their packages are imported by the user, and never here.
"""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from bridge_server.jax_runtime.parts import (
    Invocation,
    Outcome,
    Parts,
    nested,
    unnested,
    with_keys,
    with_mode,
)
from bridge_server.runtime import CALL
from bridge_server.signatures import methods_of, only_method
from bridge_wire.errors import CallerError, TargetError

_SEED = "seed_generator_state"  # of a keras.random.SeedGenerator


def keras_parts(keras: Any, model: Any) -> Parts:
    """Split a keras model: trainable variables are parameters, and the others buffers."""
    if keras.backend.backend() != "jax":
        raise TargetError(
            f"the keras model has the backend {keras.backend.backend()!r}; set KERAS_BACKEND=jax"
        )
    if not model.built:
        raise TargetError("the keras model has no weights yet; call it once")
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    names = [_keras_name(model, variable) for variable in variables]
    trainable = set(names[: len(model.trainable_variables)])

    def call(state: Any, invocation: Invocation) -> Outcome:
        values = unnested(state, names)
        mapping = list(zip(variables, values.values(), strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            result = _called(model, invocation)
            after = list(map(scope.get_current_value, variables))
        new = dict(zip(names, after, strict=True))
        seeds = [name for name in names if name.endswith(_SEED)]
        draws = any(new[name] is not values[name] for name in seeds)
        if draws and not invocation.mutable and invocation.training is not False:
            raise CallerError(
                "the keras model draws random numbers, and each call would draw the same; pass"
                " mutable=True so that its seeds advance, or call .eval() for inference"
            )
        return result, nested(new.items())

    return Parts(
        call,
        _all_nested(names, [variable.value for variable in variables]),
        model.call,
        methods_of(model, keras.Model) | only_method(model.call),
        is_trainable=trainable.__contains__,
        has_modes=True,
    )


def _called(model: Any, invocation: Invocation) -> Any:
    if invocation.method:
        function = getattr(model, invocation.method)
        invocation = with_mode(function, invocation)
        return function(*invocation.args, **with_keys(function, invocation))
    kwargs = with_keys(model.call, invocation)
    names = list(inspect.signature(model.call).parameters)
    is_passed = "training" in (*names[: len(invocation.args)], *kwargs)
    # Layers inside the model get the mode from the context of this call.
    if invocation.training is not None and not is_passed:
        kwargs = {**kwargs, "training": invocation.training}
    return model(*invocation.args, **kwargs)


def _keras_name(model: Any, variable: Any) -> str:
    path: str = variable.path
    return path.removeprefix(f"{model.name}/").replace("/", ".")


def penzai_parts(pz: Any, layer: Any) -> Parts:
    """Split a penzai layer: Parameters are parameters, and StateVariables buffers."""
    unbound, variables = pz.unbind_variables(layer, freeze=True)
    leaves, structure = jax.tree.flatten([each.value for each in variables])
    names: list[str] = []
    trainable: set[str] = set()
    for number, variable in enumerate(variables):
        own = _penzai_names(number, variable)
        names += own
        if isinstance(variable, pz.ParameterValue):
            trainable.update(own)

    def call(state: Any, invocation: Invocation) -> Outcome:
        flat = unnested(state, names)
        values = jax.tree.unflatten(structure, flat.values())
        copies = [variable.unfreeze_as_copy() for variable in variables]
        for variable, value in zip(copies, values, strict=True):
            variable.value = value
        bound = pz.bind_variables(unbound, copies)
        function = invocation.function_of(bound)
        own = getattr(layer, invocation.method or CALL)
        keywords = with_keys(own, invocation)
        result = function(*invocation.args, **keywords)
        after = jax.tree.leaves([variable.value for variable in copies])
        return result, nested(zip(names, after, strict=True))

    return Parts(
        call,
        _all_nested(names, leaves),
        getattr(layer, CALL, layer),
        methods_of(layer, pz.nn.Layer),
        is_trainable=trainable.__contains__,
    )


def _penzai_names(number: int, variable: Any) -> list[str]:
    """Return the names of a variable's leaves; a variable may have no text as its label."""
    label = variable.label
    name = label.replace("/", ".") if isinstance(label, str) else f"state_{number}"
    count = len(jax.tree.leaves(variable.value))
    return [name] if count == 1 else [f"{name}.{i}" for i in range(count)]


def _all_nested(names: Sequence[str], values: Iterable[Any]) -> dict[str, Any]:
    """Return the tree of dicts whose paths are the names.

    Raises:
      TargetError: two names are the same, or one begins with the other.
    """
    branches: set[str] = set()
    for name in names:
        steps = name.split(".")
        branches.update(".".join(steps[:i]) for i in range(len(steps)))
    if len(set(names)) != len(names) or not branches.isdisjoint(names):
        raise TargetError(f"two parameters have the same path among {sorted(names)}")
    return nested(zip(names, values, strict=True))
