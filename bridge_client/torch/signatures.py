"""Signatures of calls: from arguments to a hashable key and the inputs of a program.

A signature is everything that a program is compiled for: structure, dtypes, shapes, static values.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from bridge_client.arguments import NUMBERS, Args, Kwargs, Slot, encode
from bridge_client.torch import modes
from bridge_client.torch.families import Seen, seen
from bridge_client.torch.memory import TORCH_DTYPES, as_tensor
from bridge_client.torch.pytrees import path_of
from bridge_wire.errors import StructureError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.values import plain

ShapeOf = Callable[[Tensor], tuple[Any, ...]]
Arguments = tuple[Args, Kwargs]
Flat = tuple[list[Any], Any]  # leaves and structure
# A key, and the inputs: parameters, a random key, data.
Signature = tuple[list[Any], list[Any]]

TENSORS = {Tensor}  # types of the arguments of the usual call
_STATIC = {bool, str, *NUMBERS}
_USUAL = {Tensor, torch.nn.Parameter, *_STATIC}
# Numbers that torch.compile found to change between calls: inputs of the graph, as of a call.
_SYMBOLIC: Mapping[type, type] = {
    torch.SymInt: int,
    torch.SymFloat: float,
    torch.SymBool: bool,
}


def of_tensors(own: Sequence[Tensor], args: tuple[Tensor, ...]) -> Signature:
    """Return the signature of a call with positional tensors only, outside of traces: the usual
    call."""
    key: list[Any] = []
    for tensor in own:
        key.append(tensor.dtype)
        key.append(plain_shape_of(tensor))
    for tensor in args:
        key.append(tensor.dtype)
        key.append(tensor.shape)
    key.append(len(args))
    return key, [*own, *args]


def of_pytrees(
    own: Sequence[Tensor],
    arguments: Arguments,
    flat: Flat,
    statics: frozenset[int],
    shape_of: ShapeOf,
) -> Signature:
    """Return the signature of any call. Leaves that are no tensors yet are replaced by tensors.

    Raises:
      StructureError: a leaf is neither data nor static.
    """
    leaves, structure = flat
    key: list[Any] = []
    for tensor in own:
        key.append(tensor.dtype)
        key.append(shape_of(tensor))
    key.append(structure)
    inputs = list(own)
    for i, leaf in enumerate(leaves):
        kind = type(leaf)
        if kind not in _USUAL:
            leaf = leaves[i] = plain(leaf)
            kind = type(leaf)
        is_static = i in statics
        if kind in _SYMBOLIC:
            kind = _SYMBOLIC[kind]
            if not is_static and kind is not bool:
                leaves[i] = kind()
                key.append(kind)
                inputs.append(_symbolic_as_tensor(leaf, kind))
                continue
            leaf = leaves[i] = kind(leaf)  # has torch compile anew for another value
        if is_static or kind is bool or kind is str:
            key.append(_static_key(leaf, arguments, i))
            continue
        if kind in NUMBERS:
            key.append(kind)
        else:
            if not isinstance(leaf, Tensor):
                path = functools.partial(path_of, arguments, i)
                leaf = leaves[i] = as_tensor(leaf, path)
            key.append(leaf.dtype)
            key.append(shape_of(leaf))
        inputs.append(leaf)
    return key, inputs


def encoded(flat: Flat, statics: frozenset[int]) -> tuple[pb.Tree, list[Any]]:
    """Return a call's arguments as a message, and the leaves that are data, in the same order."""
    leaves, structure = flat
    slots = [
        leaf if i in statics or isinstance(leaf, bool | str) else Slot(i)
        for i, leaf in enumerate(leaves)
    ]
    slotted: Any = optree.tree_unflatten(structure, slots)
    arguments, order = encode(slotted)
    if order != sorted(order):
        raise StructureError(
            "a dict of the arguments has keys that cannot be sorted; use strings only"
        )
    return arguments, [leaves[i] for i in order]


def plain_shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return a tensor's shape outside of torch.jit.trace, whose sizes are tensors."""
    return tensor.shape if type(tensor) in modes.PLAIN else fixed_shape_of(tensor)


def symbolic_shape_of(tensor: Tensor) -> tuple[int | Seen, ...]:
    """Return a tensor's shape, with symbolic sizes as such."""
    return tuple(map(seen, tensor.shape))


def fixed_shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return a tensor's shape as of now: torch.compile then guards the symbolic sizes.

    Raises:
      StructureError: the tensor is a nested one.
    """
    if tensor.is_nested:
        raise StructureError(
            "an argument is a nested tensor; pad it with .to_padded_tensor(...), or call for each"
            " of its parts"
        )
    return tuple(map(int, tensor.shape))


def _static_key(leaf: Any, arguments: Arguments, position: int) -> tuple[type, str]:
    kind = type(leaf)
    if kind not in _STATIC:
        raise StructureError(
            f"`{path_of(arguments, position)}` is a {kind.__module__}.{kind.__qualname__}, and"
            " static; expected a number, bool, str or None, or a dict, list, tuple, namedtuple or"
            " dataclass of these"
        )
    # By repr: 0.0 == -0.0, but they are different static values.
    return (kind, leaf if kind is str else repr(leaf))


def _symbolic_as_tensor(number: Any, kind: type) -> Tensor:
    # By arithmetic, which torch.compile can follow with a float that stays symbolic.
    dtype = TORCH_DTYPES[NUMBERS[kind].dtype.name]
    tensor: Tensor = torch.ones((), dtype=dtype, device="cpu") * number
    return tensor
