"""The arguments of a call as a message: data, and static values.

Imports no framework.
"""

import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bridge_wire import trees
from bridge_wire.classes import Classes, Expand, expand_dataclass
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
    classes: Classes,
    *,
    expand: Expand = expand_dataclass,
) -> tuple[pb.Tree, list[int]]:
    """Return the tree of (args, kwargs), with slots for data, and the slots' leaves in the tree's
    order.

    Raises:
      StructureError: a value can neither be sent nor be static.
    """
    args, kwargs = arguments
    encoded_args, slots = trees.encode(
        args, _is_slot, classes, expand=expand, root="args"
    )
    encoded_kwargs, more = trees.encode(
        kwargs, _is_slot, classes, expand=expand, root="kwargs"
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


def method_name(value: str | None) -> str:
    """Return a method's name in a call: empty for the model itself.

    Raises:
      CallerError: it is something else than a name.
    """
    if value is not None and (not isinstance(value, str) or not value):
        raise CallerError(f"method={value!r}; expected the name of a method")
    return "" if value in (None, "__call__") else value


def rebuilder(tree: pb.Tree, classes: Classes) -> Callable[[Sequence[Any]], Any]:
    """Return the function from a result's leaves to the result."""
    if tree.WhichOneof("kind") == "leaf":
        return operator.itemgetter(0)
    return lambda leaves: trees.build(tree, leaves, classes)


def _is_slot(value: Any) -> bool:
    return type(value) is Slot
