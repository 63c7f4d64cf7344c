"""What may be served, taken apart into code and state."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from bridge_server.held_arrays import arrays_held
from bridge_server.torch_runtime.callables import Code, CodeOfFunction, CodeOfModule, CodeOfPair
from bridge_server.torch_runtime.types import DTYPES, HOST
from bridge_wire.errors import TargetError

_log = logging.getLogger(__name__)


class Parts(NamedTuple):
    """A target taken apart."""

    code: Code
    state: Mapping[str, Tensor]
    trainable: frozenset[str]
    documented: Any  # the callable whose docstring and signature describe the model
    skips_first: bool = False  # whether that signature begins with the parameters


def parts_of(name: str, target: Any, device: torch.device) -> Parts | None:
    """Return the parts of a function, a module, or a pair of either and its parameters; None for
    anything else.

    Their tensors are on the device; for another one than the host, a module is moved there.
    """
    if device != HOST:
        target = _moved(target, device)
    if (
        isinstance(target, tuple)
        and len(target) == 2
        and callable(target[0])
        and isinstance(target[1], Mapping)
    ):
        code, params = target
        return (
            _of_module(name, code, params)
            if isinstance(code, nn.Module)
            else _of_pair(name, code, params)
        )
    if isinstance(
        target, torch.jit.ScriptModule
    ):  # it holds its tensors where Python cannot replace them
        return Parts(CodeOfFunction(target), {}, frozenset(), target.forward)
    if isinstance(target, nn.Module):
        return _of_module(name, target, {})
    if callable(target) and not isinstance(target, type):
        _warn_of_constants(name, target)
        return Parts(CodeOfFunction(target), {}, frozenset(), target)
    return None


def _warn_of_constants(name: str, function: Callable[..., Any]) -> None:
    """Log which tensors look like parameters and cannot be trained."""
    if paths := arrays_held(function, lambda value: isinstance(value, Tensor) and value.ndim > 0):
        shown = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
        _log.warning(
            "model %r is served without parameters, but holds %d tensors (%s): they are constants,"
            " which no client can train; to train them serve the nn.Module itself, or a pair"
            " (function, params)",
            name,
            len(paths),
            shown,
        )


def _moved(target: Any, device: torch.device) -> Any:
    if isinstance(target, nn.Module):
        return target.to(device)
    if isinstance(target, tuple):
        return tuple(_moved(each, device) for each in target)
    return pytree.tree_map_only(Tensor, lambda each: each.to(device), target)


def _of_pair(name: str, function: Callable[..., Any], params: Mapping[str, Any]) -> Parts:
    leaves, structure = pytree.tree_flatten_with_path(params)
    state = {".".join(str(_step(step)) for step in path): leaf for path, leaf in leaves}
    if len(state) != len(leaves):
        raise TargetError(f"two parameters of {name!r} have the same path among {sorted(state)}")
    _check(name, state)
    code = CodeOfPair(function, structure, [leaf.detach() for leaf in state.values()])
    return Parts(
        code,
        state,
        frozenset(filter(lambda label: _is_inexact(state[label]), state)),
        function,
        True,
    )


def _of_module(name: str, module: nn.Module, given: Mapping[str, Tensor]) -> Parts:
    """Take a module apart; tensors of the same names in `given` take the place of its own."""
    own: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if unknown := sorted(given.keys() - own.keys()):
        raise TargetError(f"{name!r} has no parameter {unknown[0]!r}; it has {sorted(own)[:20]}")
    # What has no counterpart in the other framework, such as a quantized weight, stays with the
    # worker.
    sent = {
        label: each
        for label, each in own.items()
        if each.layout is torch.strided and each.dtype in DTYPES
    }
    state = {label: given.get(label, each) for label, each in sent.items()}
    _check(name, state)
    trained = {label for label, each in module.named_parameters() if each.requires_grad}
    trainable = frozenset(
        label for label in state if label in trained and _is_inexact(state[label])
    )
    code = CodeOfModule(module, list(sent.values()), [each.detach() for each in state.values()])
    return Parts(code, state, trainable, module.forward)


def _check(name: str, state: Mapping[str, Any]) -> None:
    for label, leaf in state.items():
        if not isinstance(leaf, Tensor) or leaf.dtype not in DTYPES:
            what = (
                f"a tensor of {leaf.dtype}"
                if isinstance(leaf, Tensor)
                else f"a {type(leaf).__qualname__}"
            )
            raise TargetError(
                f"the parameter {label!r} of {name!r} is {what}; expected a dense tensor"
            )
        if nn.parameter.is_lazy(leaf) or leaf.is_meta:
            raise TargetError(
                f"the parameter {label!r} of {name!r} has no values yet; initialise the module"
                " first"
            )


def _is_inexact(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def _step(step: Any) -> Any:
    return next(getattr(step, name) for name in ("key", "idx", "name") if hasattr(step, name))
