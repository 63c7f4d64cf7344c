"""Flattens a model's results, and checks them against the prepared signature."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge_server.torch_runtime.border import described
from bridge_server.torch_runtime.nodes import Rest, expand, is_leaf, is_static, parts_of
from bridge_server.torch_runtime.types import DTYPES, spec_of
from bridge_wire import trees
from bridge_wire.classes import Classes, attributes_beyond
from bridge_wire.errors import SpecError, StructureError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec
from bridge_wire.values import decode_value

# Appends the leaves of a value to the list; raises _Different for another structure.
_Taker = Callable[[Any, list[Any]], None]


class Results:
    """Structure and types of one call's results; buffers are further outputs."""

    def __init__(self, model: str, classes: Classes, buffers: Sequence[str]) -> None:
        self.tree = trees.flat(0)
        self.specs: tuple[Spec, ...] = ()
        self._model = model
        self._classes = classes
        self._buffers = [f"the buffer {path!r}" for path in buffers]
        self._take: _Taker = _take_leaf

    def learn(self, value: Any, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Flatten the first result and buffers, and record their structure and types.

        Raises:
          StructureError, SpecError: a leaf is neither static nor a tensor that can be sent.
        """
        self.tree, leaves = trees.encode(
            value, is_leaf, self._classes, expand=expand, root="the result"
        )
        self._take = _taker_of(self.tree, value)
        outputs = [*leaves, *buffers]
        leaves.clear()  # a reference cycle of the encoder holds the list until the next collection
        if not outputs and value is None:
            raise StructureError(
                f"the result of model {self._model!r} holds no tensor; does it return one?"
            )
        for i, y in enumerate(outputs):
            self._check(i, y)
        self.specs = tuple(map(spec_of, outputs))
        return outputs

    def take(self, value: Any, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Flatten a later result and buffers.

        Raises:
          StructureError, SpecError: they have another structure or type than the first.
        """
        outputs: list[Tensor] = []
        try:
            self._take(value, outputs)
        except _Different:
            raise StructureError(
                f"the result of model {self._model!r} has another structure, or other numbers and"
                " texts in it, than when the call was prepared; return them as tensors, and expect"
                f" tensors at {', '.join(trees.leaf_paths(self.tree, 'the result'))}"
            ) from None
        outputs += buffers
        for i, (y, spec) in enumerate(zip(outputs, self.specs, strict=True)):
            has_shape = isinstance(y, Tensor) and y.shape == spec.shape
            if not has_shape or DTYPES.get(y.dtype) is not spec.dtype:
                raise SpecError(
                    f"{self._label(i)} of model {self._model!r} is now {described(y)}, and was"
                    f" {spec} when the call was prepared; return the same types for the same types"
                    " of inputs"
                )
        return outputs

    def _check(self, position: int, y: Any) -> None:
        if not isinstance(y, Tensor):
            raise StructureError(
                f"{self._label(position)} of model {self._model!r} is {described(y)}; return a"
                " tensor"
            )
        if y.layout is not torch.strided or y.dtype not in DTYPES:
            raise SpecError(
                f"{self._label(position)} of model {self._model!r} is a tensor of {y.dtype} and"
                f" {y.layout}, which has no counterpart; return a dense tensor of another type"
            )
        if y.device.type == "meta":
            raise SpecError(
                f"{self._label(position)} of model {self._model!r} is on meta, and has no values;"
                " return a tensor with values"
            )

    def _label(self, position: int) -> str:
        return [*trees.leaf_paths(self.tree, "the result"), *self._buffers][position]


class _Different(Exception):
    """A result has another structure than the first one."""


def _taker_of(tree: pb.Tree, value: Any) -> _Taker:
    """Return the function that flattens values of a tree; `value` is the first such value.

    `trees.encode` would do, but takes longer, and its reference cycles hold the leaves until the
    next collection.
    """
    kind = tree.WhichOneof("kind")
    if kind == "leaf":
        return _take_leaf
    if is_static(value):
        return lambda other, leaves: _take_static(other, value)
    node = getattr(tree, kind or "")
    if kind == "dict":
        keys = [decode_value(key) for key in node.keys]
        takers = [
            _taker_of(item, value[key])
            for key, item in zip(keys, node.items, strict=True)
        ]
        cls = type(value) if node.name else Mapping
        return lambda value, leaves: _take_items(value, cls, keys, takers, leaves)
    if kind == "dataclass" and not dataclasses.is_dataclass(value):
        children, rest = parts_of(value)
        takers = list(map(_taker_of, node.items, children))
        return lambda value, leaves: _take_parts(value, rest, takers, leaves)
    if kind == "dataclass":
        fields = list(node.fields)
        values = [getattr(value, field) for field in fields]
        takers = [
            _taker_of(item, each) for item, each in zip(node.items, values, strict=True)
        ]
        layout = _Fields(type(value), attributes_beyond(value, fields), fields)
        return lambda value, leaves: _take_fields(value, layout, takers, leaves)
    takers = [
        _taker_of(item, each) for each, item in zip(value, node.items, strict=True)
    ]
    named: type | None = type(value) if kind == "namedtuple" else None
    container: type[Sequence[Any]] = list if kind == "list" else tuple
    return lambda value, leaves: _take_sequence(value, container, named, takers, leaves)


def _take_leaf(value: Any, leaves: list[Any]) -> None:
    if not is_leaf(value):
        raise _Different
    leaves.append(value)


def _take_static(value: Any, expected: Any) -> None:
    # By repr: 0.0 == -0.0, and nan differs from itself.
    if type(value) is not type(expected) or repr(value) != repr(expected):
        raise _Different


def _take_parts(
    value: Any, rest: Rest, takers: Sequence[_Taker], leaves: list[Any]
) -> None:
    if type(value) is not rest.cls:
        raise _Different
    children, others = parts_of(value)
    if others != rest or len(children) != len(takers):
        raise _Different
    for take, child in zip(takers, children, strict=True):
        take(child, leaves)


def _take_sequence(
    value: Any,
    container: type[Sequence[Any]],
    named: type | None,
    takers: Sequence[_Taker],
    leaves: list[Any],
) -> None:
    if not isinstance(value, container) or len(value) != len(takers):
        raise _Different
    is_namedtuple = named is not None or hasattr(value, "_fields")
    if is_namedtuple and type(value) is not named:
        raise _Different
    for take, item in zip(takers, value, strict=True):
        take(item, leaves)


def _take_items(
    value: Any,
    cls: type[Mapping[Any, Any]],
    keys: Sequence[Any],
    takers: Sequence[_Taker],
    leaves: list[Any],
) -> None:
    if not isinstance(value, cls) or len(value) != len(keys):
        raise _Different
    for take, key in zip(takers, keys, strict=True):
        if key not in value:
            raise _Different
        take(value[key], leaves)


class _Fields(NamedTuple):
    """A dataclass's fields, and the attributes that its instances have beyond them."""

    cls: type
    beyond: tuple[str, ...]
    fields: Sequence[str]


def _take_fields(
    value: Any, layout: _Fields, takers: Sequence[_Taker], leaves: list[Any]
) -> None:
    cls, beyond, fields = layout
    if type(value) is not cls or attributes_beyond(value, fields) != beyond:
        raise _Different
    for take, field in zip(takers, fields, strict=True):
        if not hasattr(value, field):
            raise _Different
        take(getattr(value, field), leaves)
