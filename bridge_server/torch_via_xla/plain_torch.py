"""Operations on tensors that the torchax environment must not see. Imports torch only."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Run torch's own operators: neither modes nor subclasses of tensors intercept them."""
    with no_dispatch(), torch._C.DisableTorchFunction():
        yield


def is_traced(x: Any) -> bool:
    """Return whether an object is a tensor of a trace."""
    return hasattr(x, "place")


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors of a pytree."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    """Return a key that tensors have in common if they share memory."""
    with plain_torch():
        is_strided = tensor.layout is torch.strided
        return tensor.untyped_storage()._cdata if is_strided else id(tensor)
