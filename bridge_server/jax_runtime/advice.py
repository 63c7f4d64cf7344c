"""Advice for calls that JAX cannot trace or differentiate, found by tracing variants of them.

JAX and its libraries report a number that must be static, or a missing derivative, in dozens of
wordings. So the advice does not depend on error texts: it names the arguments whose numbers, once
static, change the outcome, and the modes of differentiation that work.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from bridge_server.jax_runtime.transforms import Flat, compose
from bridge_server.jax_runtime.types import avals_of, is_inexact
from bridge_server.model_errors import is_models, places_of, text_of
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

_VALUE_ONLY = (
    "the model itself can be called: for its value alone, call it under torch.no_grad(), or with"
    " inputs that require no gradient (x.detach())"
)
_FORWARD_WORKS = (
    "forward mode works: use torch.func.jvp or jacfwd(f), or give the function a reverse rule with"
    " jax.custom_vjp"
)
_REVERSE_WORKS = (
    "reverse mode works: use jacrev(f), or jacrev(jacrev(f)) instead of hessian(f), or define the"
    " function with jax.custom_jvp"
)
_NEITHER_WORKS = (
    "neither reverse nor forward mode works: define the function with jax.custom_jvp or"
    " jax.custom_vjp"
)

_VALUES_OF_DATA = (
    "the model's Python code (if, while, range, int() or NumPy) reads the values of arrays, which"
    " they do not have while JAX traces the model: use jax.numpy, jnp.where, jax.lax.cond,"
    " jax.lax.while_loop or jax.lax.fori_loop"
)
_NEEDS_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
_OWN_FUNCTION = re.compile(r"the function \w+ at \S*bridge_server\S*:\d+ for \w+")
_OWN_INPUT = re.compile(r"\barrays\[(\d+)\]")
_MOST_TRIED = 16
# A value of each type of Python numbers, for a trial trace.
_NUMBERS: Mapping[str, complex] = {"int64": 1, "float64": 1.0, "complex128": 1 + 0j}


def for_values(
    f: Flat,
    bound: Sequence[Any],
    inputs: tuple[Spec, ...],
    arguments: Mapping[str, Sequence[int]],
    error: BaseException | None,
) -> str:
    """Return advice for a call whose Python code needs values that traced inputs lack, else "".

    `f` is the call without its transforms, `arguments` the inputs of each argument, and `error` the
    exception of the model.
    """
    try:
        return _for_values(f, bound, inputs, arguments, error)
    except Exception:  # must not replace the model's own error
        return ""


def _for_values(
    f: Flat,
    bound: Sequence[Any],
    inputs: tuple[Spec, ...],
    arguments: Mapping[str, Sequence[int]],
    error: BaseException | None,
) -> str:
    numbers = {
        name: weak
        for name, positions in arguments.items()
        if (weak := [i for i in positions if inputs[i].weak])
    }
    everything = {i for positions in numbers.values() for i in positions}
    at_best = _failure(f, bound, inputs, everything) if everything else error
    needed = []
    for name, positions in list(numbers.items())[:_MOST_TRIED]:
        failure = _failure(f, bound, inputs, everything.difference(positions))
        if _is_due_to_number(failure, at_best):
            needed.append(name)
    if needed:
        return _to_be_static(needed, arguments, inputs)
    return _VALUES_OF_DATA if isinstance(at_best, _NEEDS_VALUE) else ""


def _failure(
    f: Flat, bound: Sequence[Any], inputs: Sequence[Spec], static: Collection[int]
) -> BaseException | None:
    """Return the error of a trace where the Python numbers at these inputs have a value."""
    avals = dict(enumerate(avals_of(inputs)))
    fixed = {i: _NUMBERS[inputs[i].dtype.name] for i in static}
    traced = [i for i in avals if i not in fixed]

    def with_numbers(bound: Sequence[Any], *arrays: Any) -> list[Any]:
        values = {**fixed, **dict(zip(traced, arrays, strict=True))}
        return f(bound, *(values[i] for i in avals))

    try:
        jax.eval_shape(with_numbers, bound, *(avals[i] for i in traced))
    except BaseException as error:
        if not is_models(error):
            raise
        return error
    return None


def _is_due_to_number(
    error: BaseException | None, at_best: BaseException | None
) -> bool:
    """Return whether a number's lack of a value causes an error; `at_best` is that with values."""
    if error is None or at_best is None:
        return error is not None
    if not _lacks_value(error) or not _lacks_value(at_best):
        return _lacks_value(error)  # if not, a value of the trial may be the reason
    return type(error) is not type(at_best) or places_of(error) != places_of(at_best)


def _lacks_value(error: BaseException) -> bool:
    """Return whether an error seems to come from a traced value; only other traces confirm it."""
    return isinstance(error, _NEEDS_VALUE) or "tracer" in text_of(error).lower()


def _to_be_static(
    names: Sequence[str], arguments: Mapping[str, Sequence[int]], inputs: Sequence[Spec]
) -> str:
    text = (
        f"the model needs the value of {' and '.join(map('`{}`'.format, names))} while JAX traces"
        " it, but a Python number is traced like an array, without its value: "
    )
    if not all(name.isidentifier() for name in names):
        return (
            f"{text}name it in the model's signature, and that name in static_argnames="
        )
    if not all(inputs[i].weak for name in names for i in arguments[name]):
        return f"{text}pass it as an argument without arrays, and name that in static_argnames="
    option = repr(names[0] if len(names) == 1 else tuple(names))
    return f"{text}pass static_argnames={option}"


def in_callers_words(text: str, names: Sequence[str]) -> str:
    """Return JAX's text with the caller's names of the inputs, and without the bridge's code."""
    if not _OWN_FUNCTION.search(text):
        return text
    text = _OWN_FUNCTION.sub("the model", text)
    return _OWN_INPUT.sub(lambda match: names[int(match[1])], text)


def for_call(
    f: Flat,
    bound: Sequence[Any],
    inputs: tuple[Spec, ...],
    transforms: Sequence[pb.Transform],
    keep: pb.Wrt | None,
) -> str:
    """Return advice for a call that cannot be lowered; `f` is the call without its transforms.

    Empty if derivatives are not at fault: the model itself raises, or everything can be lowered.
    """
    try:
        return _advice(f, bound, inputs, transforms, keep)
    except Exception:  # must not replace the model's own error
        return ""


def _advice(
    f: Flat,
    bound: Sequence[Any],
    inputs: tuple[Spec, ...],
    transforms: Sequence[pb.Transform],
    keep: pb.Wrt | None,
) -> str:
    if not _can_be_lowered(f, bound, inputs):
        return ""
    for transform in transforms:
        transformed, extended = compose(f, bound, inputs, transform, "")
        if not _can_be_lowered(transformed, bound, extended):
            return "\n".join(_other_mode(f, bound, inputs, transform))
        f, inputs = transformed, extended
    if keep is None:
        return ""
    avals = jax.eval_shape(f, bound, *avals_of(inputs))
    outputs = [i for i, y in enumerate(avals) if is_inexact(y)]
    kept = pb.Transform(vjp=pb.Transform.Vjp(wrt=keep.inputs, outputs=outputs))
    if _works(f, bound, inputs, kept):
        return ""
    return "\n".join([_VALUE_ONLY, *_other_mode(f, bound, inputs, kept)])


def _other_mode(
    f: Flat, bound: Sequence[Any], inputs: tuple[Spec, ...], transform: pb.Transform
) -> list[str]:
    """Return the advice about the other mode, if this transform is a derivative."""
    kind = transform.WhichOneof("kind")
    if kind == "vjp":
        jvp = pb.Transform.Jvp(wrt=transform.vjp.wrt, outputs=transform.vjp.outputs)
        works = _works(f, bound, inputs, pb.Transform(jvp=jvp))
        return [_FORWARD_WORKS if works else _NEITHER_WORKS]
    if kind == "jvp":
        vjp = pb.Transform.Vjp(wrt=transform.jvp.wrt, outputs=transform.jvp.outputs)
        works = _works(f, bound, inputs, pb.Transform(vjp=vjp))
        return [_REVERSE_WORKS if works else _NEITHER_WORKS]
    return []


def _works(
    f: Flat, bound: Sequence[Any], inputs: tuple[Spec, ...], transform: pb.Transform
) -> bool:
    transformed, extended = compose(f, bound, inputs, transform, "")
    return _can_be_lowered(transformed, bound, extended)


def _can_be_lowered(f: Flat, bound: Sequence[Any], inputs: Sequence[Spec]) -> bool:
    avals = avals_of(inputs)
    try:
        # A trace alone does not refuse forward mode of custom_vjps.
        jax.jit(f).lower(bound, *avals)
    except BaseException as error:
        if not is_models(error):
            raise
        return False
    return True
