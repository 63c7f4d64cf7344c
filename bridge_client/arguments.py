"""The arguments of a call as a message: data, and static values.

Imports no framework.
"""

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bridge_wire import trees
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import CallerError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

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


class Slot(NamedTuple):
    """Stands for the array leaf of this index."""

    leaf: int


def encode(
    arguments: tuple[Any, Any],
    classes: trees.Classes,
    *,
    expand: trees.Expand = trees.expand_dataclass,
) -> tuple[pb.Tree, list[int]]:
    """Return the tree of (args, kwargs), with slots for data, and the slots' leaves in the tree's
    order.

    Raises:
      StructureError: a value can neither be sent nor be static.
    """
    encoded_args, first = trees.encode(arguments[0], _is_slot, classes, expand=expand, root="args")
    encoded_kwargs, second = trees.encode(
        arguments[1], _is_slot, classes, expand=expand, root="kwargs"
    )
    return trees.arguments(encoded_args, encoded_kwargs), [slot.leaf for slot in (*first, *second)]


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
    is_static = [i < len(names) and names[i] in static for i in range(len(args))]
    return (
        tuple(marked(arg, mark) for arg, mark in zip(args, is_static, strict=True)),
        {key: marked(value, key in static) for key, value in kwargs.items()},
    )


def names_of(option: str, value: str | Sequence[str]) -> tuple[str, ...]:
    """Return an option's names: one, or several different ones.

    Raises:
      CallerError: it is something else.
    """
    names = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
        raise CallerError(f"{option}={value!r}; expected a name or several different ones")
    return names


def rebuilder(tree: pb.Tree, classes: trees.Classes) -> Callable[[Sequence[Any]], Any]:
    """Return the function from a result's leaves to the result."""
    if tree.WhichOneof("kind") == "leaf":
        return operator.itemgetter(0)
    return lambda leaves: trees.build(tree, leaves, classes)


def _is_slot(value: Any) -> bool:
    return type(value) is Slot
