"""The arguments of a call: checked by the model's signature, and as a message.

Imports no framework.
"""

import ast
import functools
import inspect
import itertools
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bridge_wire import trees
from bridge_wire.classes import Expand, expand_dataclass, peers, recipes
from bridge_wire.commands import did_you_mean, near_matches
from bridge_wire.dtypes import BY_NAME, TURN_ON_X64
from bridge_wire.errors import ArgumentError, CallerError, DTypeError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.recipes import returned_in
from bridge_wire.specs import Spec

_MOST_SOURCE = 1 << 14  # characters of a signature that are parsed
_KEYS = ("key", "keys", "rng", "rngs", "prng_key", "rng_key")

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Values = Sequence[Any]  # inputs of a run: tensors or arrays, and Python numbers

# The types of Python numbers in messages. In the model they are numbers again, whose type follows
# the other operands.
NUMBERS: Mapping[type, Spec] = {
    int: Spec(BY_NAME["int64"], (), weak=True),
    float: Spec(BY_NAME["float64"], (), weak=True),
    complex: Spec(BY_NAME["complex128"], (), weak=True),
}

# A Python number as bytes, in its spec's type.
_PACK: Mapping[type, Callable[[Any], bytes]] = {
    int: struct.Struct("<q").pack,
    float: struct.Struct("<d").pack,
    complex: lambda z: struct.pack("<dd", z.real, z.imag),
}


class Slot(NamedTuple):
    """Stands for the array leaf of this index."""

    leaf: int


def encode(
    arguments: tuple[Any, Any], *, expand: Expand = expand_dataclass
) -> tuple[pb.Tree, list[int]]:
    """Return the tree of (args, kwargs), with slots for data, and the slots' leaves in the tree's
    order.

    Raises:
      StructureError: a value can neither be sent nor be static.
    """
    args, kwargs = arguments
    encoded_args, slots = trees.encode(
        args, _is_slot, peers, expand=expand, root="args"
    )
    encoded_kwargs, more = trees.encode(
        kwargs, _is_slot, peers, expand=expand, root="kwargs"
    )
    tree = trees.arguments(encoded_args, encoded_kwargs)
    return tree, [slot.leaf for slot in (*slots, *more)]


def marked_static(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Sequence[str],
    static: Collection[str],
    marked: Callable[[Any, bool], Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with each leaf replaced by whether its argument is named as static.

    `names` are those of the positional arguments; `marked(tree, mark)` replaces each leaf of a
    pytree.
    """
    # More arguments than names: *args, which are never static.
    padded = itertools.chain(names, itertools.repeat(""))
    is_static = (name in static for name in padded)
    marked_args = tuple(map(marked, args, is_static))
    return marked_args, {
        key: marked(value, key in static) for key, value in kwargs.items()
    }


def check_arguments(
    model: str, signature: str, arguments: tuple[Args, Kwargs], rngs: Collection[str]
) -> None:
    """Check a call against the model's signature, if that is known.

    The worker may pass the arguments named in `rngs`.

    Raises:
      ArgumentError: an argument is missing, unexpected or passed twice.
    """
    known = signature_from(signature)
    if known is None:
        return
    args, kwargs = arguments
    try:
        bound = known.bind_partial(*args, **kwargs).arguments
        passed = {*bound, *rngs}
        missing = []
        for each in known.parameters.values():
            is_optional = each.default is not each.empty
            is_open = each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
            if not (is_optional or is_open or each.name in passed):
                missing.append(each.name)
        if not missing:
            return
        first = missing[0]
        problem = f"missing a required argument: {first!r}"
        if first in _KEYS or rngs:
            problem += f" (a random key is named in rngs=, as in rngs={first!r})"
    except TypeError as error:
        problem = str(error)
        unknown = [name for name in kwargs if name not in known.parameters]
        near = near_matches(unknown[0], known.parameters)[:1] if unknown else []
        problem += did_you_mean(near)
    raise ArgumentError(f"model {model!r}: {problem}; its arguments are {signature}")


@functools.lru_cache(maxsize=256)
def signature_from(source: str) -> inspect.Signature | None:
    """Return a signature from its source, which is not run; None if it is no such.

    Defaults that are no literals are `...`.
    """
    if not source or len(source) > _MOST_SOURCE:
        return None
    try:
        (function,) = ast.parse(f"def f{source}: ...").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(function, ast.FunctionDef):
        return None
    names = function.args
    kind = inspect.Parameter
    positional = [*names.posonlyargs, *names.args]
    first_default = len(positional) - len(names.defaults)
    defaults = [*[None] * first_default, *names.defaults]
    parameters = []
    for i, (each, value) in enumerate(zip(positional, defaults, strict=True)):
        is_named = i >= len(names.posonlyargs)
        how = kind.POSITIONAL_OR_KEYWORD if is_named else kind.POSITIONAL_ONLY
        parameters.append(kind(each.arg, how, default=_default(value)))
    if names.vararg:
        parameters.append(kind(names.vararg.arg, kind.VAR_POSITIONAL))
    for each, value in zip(names.kwonlyargs, names.kw_defaults, strict=True):
        parameters.append(kind(each.arg, kind.KEYWORD_ONLY, default=_default(value)))
    if names.kwarg:
        parameters.append(kind(names.kwarg.arg, kind.VAR_KEYWORD))
    return inspect.Signature(parameters)


def _default(node: ast.expr | None) -> Any:
    if node is None:
        return inspect.Parameter.empty
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        return ...


def present_as(function: Any, signature: str, doc: str) -> None:
    """Let `inspect.signature`, `help` and editors show a model's signature and docstring.

    Both are set on the function's object: its class keeps its own.
    """
    function.__signature__ = signature_from(signature)  # inspect passes over None
    function.__doc__ = doc or type(function).__doc__


def names_of(option: str, value: str | Sequence[str]) -> tuple[str, ...]:
    """Return an option's names: one, or several different ones.

    Raises:
      CallerError: it is something else.
    """
    is_single = isinstance(value, str) or not isinstance(value, Iterable)
    names: tuple[Any, ...] = (value,) if is_single else tuple(value)
    are_names = all(isinstance(name, str) and name for name in names)
    if not are_names or len(set(names)) != len(names):
        raise CallerError(
            f"{option}={value!r}; expected a name or several different ones"
        )
    return names


def pack_number(value: Any, path: str, x64: bool) -> bytes:
    """Return a Python number as bytes; `x64` tells whether the worker has 64-bit types.

    Raises:
      DTypeError: the worker's widest type cannot hold the integer.
    """
    if type(value) is int and not -(2**31) <= value < 2**31:
        if not -(2**63) <= value < 2**63:
            raise DTypeError(
                f"input `{path}` is the integer {value}, which does not fit in 64 bits; pass a"
                " float"
            )
        if not x64:
            raise DTypeError(
                f"input `{path}` is the integer {value}; JAX runs without x64 there and holds int32"
                f" only: pass a float, or {TURN_ON_X64}"
            )
    return _PACK[type(value)](value)


def recipes_for(arguments: pb.Tree) -> list[pb.Recipe]:
    """Return the recipes that another worker needs to make the instances in a call's arguments."""
    return recipes.of(returned_in(arguments))


def method_name(value: str | None) -> str:
    """Return a method's name in a call: empty for the model itself.

    Raises:
      CallerError: it is something else than a name.
    """
    if value is not None and (not isinstance(value, str) or not value):
        raise CallerError(f"method={value!r}; expected the name of a method")
    return "" if value in (None, "__call__") else value


def _is_slot(value: Any) -> bool:
    return type(value) is Slot
