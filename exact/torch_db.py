"""torch's OpInfo and ModuleInfo databases as functions of flat tensors.

Imports torch, never jax.
"""

import copy
import functools
import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from exact.cases import MODULE_KINDS, OPERATOR_KINDS, Entry

# The database seeds random operators within the call; here the caller's key seeds instead.
_seeding: Any = common_methods_invocations
_seeding.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
_OPERATORS = {op.full_name: op for op in op_db}
assert len(_OPERATORS) == len(op_db)
_MODULES = {info.name.removeprefix("nn."): info for info in module_db}
# Operators with uninitialised results: only the type can be compared.
UNDEFINED = {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}


@dataclass(frozen=True)
class Subject:
    """A callable and its input tensors.

    target: a function or an nn.Module of the positional inputs; the result is any pytree.
    wrt: positions of the differentiated inputs.
    draws: whether the target samples random numbers; None if unknown.
    """

    target: Callable[..., Any]
    inputs: Sequence[Tensor]
    wrt: Sequence[int]
    draws: bool | None = None

    @property
    def is_module(self) -> bool:
        return isinstance(self.target, nn.Module)


class Unusable(Exception):
    """A sample that no JAX program can pass; the message has the reason."""


def entries(database: str, dtypes: Sequence[str]) -> Iterator[Entry]:
    """Yield torch's entries in these dtypes."""
    if database == "op":
        for name, op in _OPERATORS.items():
            for dtype in dtypes:
                if getattr(torch, dtype) in op.supported_dtypes("cpu"):
                    for kind in OPERATOR_KINDS:
                        if kind != "inplace" or op.inplace_variant is not None:
                            yield Entry("op", name, dtype, kind)
    else:
        for name, info in _MODULES.items():
            for dtype in dtypes:
                if getattr(torch, dtype) in info.supported_dtypes("cpu"):
                    for kind in MODULE_KINDS:
                        if kind == "eval" or info.train_and_eval_differ:
                            yield Entry("module", name, dtype, kind)


def samples(entry: Entry, seed: int | None = None) -> list[Any]:
    """Return an entry's samples, equal in every process.

    seed: for other values in the same shapes, for batches.
    """
    return _samples(
        entry.database,
        entry.name,
        entry.dtype,
        entry.kind == "train",
        entry.seed if seed is None else seed,
    )


def subject_of_sample(entry: Entry, index: int) -> Subject:
    """Return a sample as a function and its inputs.

    Raises:
      Unusable: an input is not a strided tensor.
    """
    sample = samples(entry)[index]
    return (
        _module_subject(sample, entry)
        if entry.database == "module"
        else _operator_subject(sample, entry)
    )


def batch_of_sample(entry: Entry, index: int) -> list[Tensor]:
    """Return the sample's inputs, each stacked with another value of its type or with itself."""
    one = subject_of_sample(entry, index).inputs
    try:
        two = subject_inputs(samples(entry, entry.seed + 1)[index], entry)
    except Exception:
        two = list(one)
    alike = len(one) == len(two) and all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(one, two, strict=True)
    )
    return [
        torch.stack([a, b if alike else a])
        for a, b in zip(one, two if alike else one, strict=True)
    ]


def subject_inputs(sample: Any, entry: Entry) -> list[Tensor]:
    made = (
        _module_subject(sample, entry)
        if entry.database == "module"
        else _operator_subject(sample, entry)
    )
    return list(made.inputs)


@functools.lru_cache(maxsize=2)
def _samples(
    database: str, name: str, dtype: str, is_training: bool, seed: int
) -> list[Any]:
    kind = getattr(torch, dtype)
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        if database == "op":
            op = _OPERATORS[name]
            return list(
                op.sample_inputs(
                    "cpu",
                    kind,
                    requires_grad=kind in op.supported_backward_dtypes("cpu"),
                )
            )
        info = _MODULES[name]
        made = info.module_inputs_func(info, "cpu", kind, True, is_training)
        return [(seed, each) for each in made if each.forward_input is not None]


# Operators ----------------------------------------------------------------------------------------


def _operator_subject(sample: Any, entry: Entry) -> Subject:
    op = _OPERATORS[entry.name]
    function = op.inplace_variant if entry.kind == "inplace" else op.op
    leaves, structure = pytree.tree_flatten(
        (sample.input, tuple(sample.args), dict(sample.kwargs))
    )
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    inputs = [_plain(leaves[i]) for i in slots]
    wrt = [n for n, i in enumerate(slots) if leaves[i].requires_grad]
    # As in torch's gradcheck: symmetric matrices, and only results without an arbitrary sign.
    process = sample.output_process_fn_grad

    def target(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for i, tensor in zip(slots, tensors, strict=True):
            cast = _as_declared(tensor, leaves[i].dtype)
            filled[i] = _strided(cast) if entry.kind == "strided" else cast
        first, args, kwargs = pytree.tree_unflatten(filled, structure)
        if entry.kind == "inplace":
            first = pytree.tree_map_only(Tensor, torch.clone, first)
        return process(op.gradcheck_wrapper(function, first, *args, **kwargs))

    return Subject(target, inputs, wrt)


def _plain(tensor: Tensor) -> Tensor:
    """Return a contiguous copy of a tensor without autograd history."""
    if (
        tensor.layout is not torch.strided
        or tensor.is_quantized
        or type(tensor) not in (Tensor, nn.Parameter)
    ):
        raise Unusable(
            f"an input is a {type(tensor).__name__} of layout {tensor.layout}"
        )
    if not hasattr(
        np, str(tensor.dtype).removeprefix("torch.")
    ) and tensor.dtype not in (
        torch.bfloat16,
        torch.bool,
    ):
        raise Unusable(f"an input has {tensor.dtype}")
    return (
        tensor.detach()
        .resolve_conj()
        .resolve_neg()
        .clone(memory_format=torch.contiguous_format)
    )


def _as_declared(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return integers in the sample's type, since without x64 JAX passes them in another width."""
    return (
        tensor
        if tensor.is_floating_point() or tensor.is_complex()
        else tensor.to(dtype)
    )


def _strided(tensor: Tensor) -> Tensor:
    """Return equal values, differentiable, as every second element of twice the memory."""
    return (
        torch.stack((tensor, torch.zeros_like(tensor)), -1)[..., 0]
        if tensor.ndim
        else tensor
    )


# Modules ------------------------------------------------------------------------------------------


class _Applied(nn.Module):
    """A module as a function of its tensor arguments; the other arguments are constants."""

    def __init__(
        self,
        module: nn.Module,
        leaves: Sequence[Any],
        slots: Sequence[int],
        structure: Any,
    ) -> None:
        super().__init__()
        self.module = module
        self.leaves = [None if i in slots else leaf for i, leaf in enumerate(leaves)]
        self.slots, self.structure = slots, structure

    def forward(self, *tensors: Tensor) -> Any:
        filled = list(self.leaves)
        for i, tensor in zip(self.slots, tensors, strict=True):
            filled[i] = tensor
        args, kwargs = pytree.tree_unflatten(filled, self.structure)
        return self.module(*args, **kwargs)


def _module_subject(sample: Any, entry: Entry) -> Subject:
    seed, made = sample
    info = _MODULES[entry.name]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        module = info.module_cls(
            *made.constructor_input.args, **made.constructor_input.kwargs
        )
    module = module.to(getattr(torch, entry.dtype)).train(entry.kind == "train")
    forward = made.forward_input
    leaves, structure = pytree.tree_flatten((tuple(forward.args), dict(forward.kwargs)))
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    inputs = [_plain(leaves[i]) for i in slots]
    wrt = [
        n
        for n, i in enumerate(slots)
        if leaves[i].is_floating_point() or leaves[i].is_complex()
    ]
    return Subject(_Applied(module, leaves, slots, structure), inputs, wrt)


def as_function(target: Callable[..., Any]) -> tuple[Callable[..., Any], list[Tensor]]:
    """Return a module as a function of (*state, *inputs), and its state: parameters and buffers."""
    if not isinstance(target, nn.Module):
        return target, []
    names, values = [], []
    for name, value in itertools.chain(
        target.named_parameters(), target.named_buffers()
    ):
        names.append(name)
        values.append(value.detach().clone())

    def function(*tensors: Tensor) -> Any:
        state = dict(zip(names, tensors, strict=False))
        own = {
            name: value.clone() if name in buffers else value
            for name, value in state.items()
        }
        return torch.func.functional_call(
            copy.deepcopy(target), own, tensors[len(names) :]
        )

    buffers = {name for name, _ in target.named_buffers()}
    return function, values
