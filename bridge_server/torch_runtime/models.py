"""Targets of torch, each split into code and state."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from bridge_server.held_arrays import warn_of_held_arrays
from bridge_server.runtime import CALL
from bridge_server.signatures import (
    Methods,
    bound_method,
    methods_of,
    only_method,
    unsigned,
)
from bridge_server.torch_runtime.callables import (
    Code,
    CodeOfFunction,
    CodeOfModule,
    CodeOfPair,
)
from bridge_server.torch_runtime.types import DTYPES, HOST
from bridge_wire.errors import TargetError

_log = logging.getLogger(__name__)
_REMEDY = "serve the nn.Module itself, or a pair (function, params)"


class Parts(NamedTuple):
    """A target split into code and state."""

    code: Code
    state: Mapping[str, Tensor]
    trainable: frozenset[str]
    documented: Any  # the callable whose docstring describes the model
    methods: Methods


def parts_of(name: str, target: Any, device: torch.device) -> Parts | None:
    """Return the parts of a function, a module, or a pair of either and its parameters, else None.

    A bound method of a module has the module's parameters. The tensors are moved to the device,
    unless it is the host.
    """
    binding = bound_method(target, [nn.Module])
    if binding is not None and not isinstance(binding[0], torch.jit.ScriptModule):
        owner, method = binding
        parts = parts_of(name, owner, device)
        return parts and _only(parts, owner, method)
    if device != HOST:
        target = _moved(target, device)
    if isinstance(target, tuple) and len(target) == 2:
        code, params = target
        if callable(code) and isinstance(params, Mapping):
            split = _of_module if isinstance(code, nn.Module) else _of_pair
            return split(name, code, params)
    if isinstance(target, nn.Module):
        return _of_module(name, target, {})
    if not isinstance(target, type) and (methods := methods_of(target)):
        warn_of_held_arrays(
            _log, name, target, _is_array, noun="tensors", remedy=_REMEDY
        )
        return Parts(CodeOfFunction(target), {}, frozenset(), target, methods)
    return None


def _only(parts: Parts, owner: nn.Module, name: str) -> Parts:
    """Return parts with a method of their module in the place of all methods."""
    if name in (CALL, "forward"):
        return parts._replace(methods={CALL: parts.methods[CALL]})
    function = getattr(owner, name)
    methods = only_method(function, attribute=name)
    return parts._replace(documented=function, methods=methods)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _moved(target: Any, device: torch.device) -> Any:
    if isinstance(target, nn.Module):
        return target.to(device)
    if isinstance(target, tuple):
        return tuple(_moved(each, device) for each in target)
    return pytree.tree_map_only(Tensor, lambda each: each.to(device), target)


def _of_pair(
    name: str, function: Callable[..., Any], params: Mapping[str, Any]
) -> Parts:
    leaves, structure = pytree.tree_flatten_with_path(params)
    state = {".".join(str(_step(step)) for step in path): leaf for path, leaf in leaves}
    if len(state) != len(leaves):
        raise TargetError(
            f"two parameters of {name!r} have the same path among {sorted(state)}"
        )
    _check(name, state)
    code = CodeOfPair(function, structure, [leaf.detach() for leaf in state.values()])
    trainable = frozenset(label for label, leaf in state.items() if _is_inexact(leaf))
    return Parts(code, state, trainable, function, only_method(function, skipped=1))


def _of_module(name: str, module: nn.Module, params: Mapping[str, Tensor]) -> Parts:
    """Split a module; tensors in `params` replace its own tensors of the same names."""
    own: dict[str, Tensor] = {
        **dict(module.named_parameters()),
        **dict(module.named_buffers()),
    }
    if unknown := sorted(params.keys() - own.keys()):
        raise TargetError(
            f"{name!r} has no parameter {unknown[0]!r}; it has {sorted(own)[:20]}"
        )
    # Tensors without a counterpart in the other framework, such as quantized weights, stay with
    # the worker.
    sent = {label: each for label, each in own.items() if _can_be_sent(each)}
    state = {label: params.get(label, each) for label, each in sent.items()}
    _check(name, state)
    trained = {label for label, each in module.named_parameters() if each.requires_grad}
    trainable = frozenset(
        label for label in trained & state.keys() if _is_inexact(state[label])
    )
    values = [each.detach() for each in state.values()]
    code = CodeOfModule(module, list(sent.values()), values)
    return Parts(code, state, trainable, module.forward, _methods(module))


def _methods(module: nn.Module) -> Methods:
    if isinstance(module, torch.jit.ScriptModule):
        return only_method(module.forward)
    methods = methods_of(module, nn.Module)
    if getattr(module.forward, "__func__", None) is nn.Module.forward:  # it has none
        del methods[CALL]
    else:
        methods |= only_method(module.forward)
    if module._forward_pre_hooks or type(module).__call__ is not nn.Module.__call__:
        methods = unsigned(methods, CALL)  # other code changes the arguments first
    return methods


def _check(name: str, state: Mapping[str, Any]) -> None:
    for label, leaf in state.items():
        if not isinstance(leaf, Tensor) or leaf.dtype not in DTYPES:
            is_tensor = isinstance(leaf, Tensor)
            seen = f"tensor of {leaf.dtype}" if is_tensor else type(leaf).__qualname__
            raise TargetError(
                f"the parameter {label!r} of {name!r} is a {seen}; expected a dense tensor"
            )
        if nn.parameter.is_lazy(leaf) or leaf.is_meta:
            raise TargetError(
                f"the parameter {label!r} of {name!r} has no values yet; initialise the module"
                " first"
            )


def _can_be_sent(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.dtype in DTYPES


def _is_inexact(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def _step(step: Any) -> Any:
    return next(
        getattr(step, name) for name in ("key", "idx", "name") if hasattr(step, name)
    )
