"""torchax's operators, made to work with the torch that is here. Imports both frameworks, and torchax when needed."""

import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn
from unittest.mock import patch

import jax
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules import transformer
from torch.utils import _pytree as torch_pytree
from torch.utils._mode_utils import no_dispatch

from bridge_server.jax_runtime.types import has_x64
from bridge_server.switches import Switch
from bridge_server.torch_runtime.attention import simple_attention
from bridge_server.torch_via_xla.aliases import Aliases, is_permuted, named_in, refuse_stale
from bridge_server.torch_via_xla.arrays import to_jax
from bridge_server.torch_via_xla.derivatives import OPERATORS
from bridge_server.torch_via_xla.functions import applied, apply_plainly, take_over
from bridge_wire.dtypes import TURN_ON_X64
from bridge_wire.errors import CallerError, DTypeError

_OF_VALUES = {torch.tensor, torch.as_tensor}  # what makes tensors of Python's values, whose range is checked
# Methods of torchax's tensors that are no views, as torch's own are, or change the tensor itself.
_NOT_TORCHS = ("detach", "flatten", "type_as")
_LOSSY = {torch.float64, torch.complex128}

_loading = threading.Lock()


def environment() -> Any:
    """Return the environment in which torch code is traced.

    Raises:
      CallerError: torchax is not installed.
    """
    with _loading:
        return _made_environment()


@functools.cache
def _made_environment() -> Any:
    """Return the torchax environment of this module: its tables of operators, with what they lack."""
    with _as_torchax_expects():
        try:
            from torchax import tensor
            from torchax.tensor import Environment, RuntimeProperty
        except ImportError as error:
            raise CallerError(f"tracing torch code needs torchax: pip install torchax ({error})") from error
        # A device that any torch has, unlike torchax's "jax": a traced tensor has no memory here.
        for name in _NOT_TORCHS:
            delattr(tensor.Tensor, name)
        tensor.Tensor.device = tensor.View.device = property(lambda _: torch.device("meta"))

        class Bridge(Environment):
            """An environment that takes tensors of torch's own for constants, and loses nothing in silence."""

            def dispatch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
                if not has_x64():
                    self._refuse_lossy(func, args, kwargs)
                if func in _OF_VALUES and not _holds_tensors((args, kwargs)):
                    with no_dispatch(), torch._C.DisableTorchFunction():
                        made = func(
                            *args, **{name: value for name, value in (kwargs or {}).items() if name != "device"}
                        )
                    return self._constant(made)
                if func is torch.tensor:
                    kwargs = _with_dtype(args, kwargs or {})
                refuse_stale(named_in((args, kwargs)))
                if func is torch.Tensor.contiguous and is_permuted(args[0]):
                    return self.j2t_iso(args[0]._elem)
                made = super().dispatch(func, types, args, kwargs)
                with no_dispatch(), torch._C.DisableTorchFunction():
                    self.param.aliases.note_views(func, args, kwargs or {}, made)
                if not torch.is_grad_enabled():
                    _stop_gradients(made)
                return made

            def _should_use_torchax_tensor(self, device: Any) -> bool:
                return device is None or torch.device(device).type != "cpu"

            def _is_same_device(self, moved: Any, device: Any) -> bool:
                # A traced tensor is wherever JAX has it, whatever the code says.
                return isinstance(moved, tensor.Tensor) or super()._is_same_device(moved, device)

            def t2j_iso(self, tree: Any) -> Any:
                return super().t2j_iso(torch_pytree.tree_map_only(Tensor, self._constant, tree))

            def wrapped(self, tree: Any) -> Any:
                """Return a pytree with each of its arrays as a tensor of this environment."""
                return jax.tree.map(self._wrapped, tree)

            def unwrapped(self, tree: Any) -> Any:
                """Return a pytree with each of its tensors as an array."""
                refuse_stale(named_in(tree))
                return torch_pytree.tree_map_only(Tensor, self.t2j_iso, tree)

            @contextlib.contextmanager
            def drawing_from(self, rng: jax.Array | None) -> Iterator[None]:
                """Trace with random numbers from this key, and raise what was refused."""
                before, mine = self._property.content, _Trace(None, rng, None)
                self._property.content = mine
                try:
                    yield
                except TypeError:
                    # Of a DTypeError within `x * y`, Python makes a TypeError that tells nobody anything.
                    if mine.refusal is not None:
                        raise mine.refusal from None
                    raise
                finally:
                    self._property.content = before
                    mine.aliases.clear()

            @contextlib.contextmanager
            def within(self, rng: jax.Array | None) -> Iterator[None]:
                """Trace code with random numbers from this key: a part of what is traced already, or by itself."""
                with contextlib.ExitStack() as stack:
                    is_part = self._is_tracing()
                    stack.enter_context(self.drawing_from(rng))
                    if not is_part:
                        stack.enter_context(torch.enable_grad())
                        stack.enter_context(taken_over)
                        stack.enter_context(self)
                    yield

            def key_for_a_part(self) -> jax.Array | None:
                """Return a key for what a part of the code draws, if there is one for the code."""
                return None if self.param.prng is None else self.param.get_and_rotate_prng_key()

            def _is_tracing(self) -> bool:
                return isinstance(self.param, _Trace)

            def _apply(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
                if self._is_tracing() and any(hasattr(x, "jax") for x in args):
                    return applied(self, function, args, kwargs)
                return apply_plainly(function, args, kwargs)

            def _refuse_lossy(self, func: Any, args: Any, kwargs: Any) -> None:
                for value in torch_pytree.tree_leaves((args, kwargs)):
                    if isinstance(value, torch.dtype) and value in _LOSSY:
                        what = f"the torch code computes in {value} (in {getattr(func, '__name__', func)})"
                        self._refuse(DTypeError(f"{what}, but JAX runs without x64: {TURN_ON_X64}"))

            def _refuse(self, error: DTypeError) -> NoReturn:
                self.param.refusal = error
                raise error

            def _wrapped(self, leaf: Any) -> Any:
                if isinstance(leaf, np.ndarray | np.generic):
                    with no_dispatch(), torch._C.DisableTorchFunction():
                        leaf = torch.as_tensor(np.asarray(leaf))
                return self._constant(leaf) if isinstance(leaf, Tensor) else self.j2t_iso(leaf)

            def _constant(self, tensor: Tensor) -> Tensor:
                if hasattr(tensor, "jax"):  # one of torchax's, or a view of one
                    return tensor
                try:
                    with no_dispatch(), torch._C.DisableTorchFunction():
                        made: Tensor = self.j2t_iso(to_jax(tensor.detach()))
                except DTypeError as error:
                    self._refuse(error)
                return made

        class _Trace(RuntimeProperty):
            """What belongs to one trace, in one thread."""

            refusal: DTypeError | None = None

            def __init__(self, *how: Any) -> None:
                super().__init__(*how)
                self.aliases = Aliases()

            def get_and_rotate_prng_key(self) -> jax.Array:
                if self.prng is None:
                    raise CallerError("the torch code draws random numbers: pass rng=, a key of jax.random.key")
                key: jax.Array = super().get_and_rotate_prng_key()
                return key

        env = Bridge()
        taken_over = Switch(functools.partial(take_over, env._apply))
    _let_masks_be_traced(tensor.Tensor)
    for operator, f in OPERATORS.items():
        env.override_op_definition(operator, _of_tensors(env, f))
    env.override_op_definition(torch.ops.aten.detach, _detach)
    env.override_op_definition(functional.batch_norm, _batch_norm)
    env.override_op_definition(functional.instance_norm, _instance_norm)
    return env


def _holds_tensors(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in torch_pytree.tree_leaves(tree))


def _stop_gradients(made: Any) -> None:
    """Make constants of what was computed; a slice remains one, for it may be written into."""
    for leaf in torch_pytree.tree_leaves(made):
        if isinstance(leaf, Tensor) and hasattr(leaf, "_elem"):
            leaf._elem = jax.lax.stop_gradient(leaf._elem)


def _with_dtype(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of `torch.tensor` with the dtype that torch would find in its data, partly traced."""
    if kwargs.get("dtype") is not None:
        return dict(kwargs)
    leaves = torch_pytree.tree_leaves(args[:1] or kwargs.get("data"))
    with no_dispatch(), torch._C.DisableTorchFunction():
        dtypes = [leaf.dtype if isinstance(leaf, Tensor) else torch.tensor(leaf).dtype for leaf in leaves]
        return {**kwargs, "dtype": functools.reduce(torch.promote_types, dtypes)}


def _let_masks_be_traced(kind: type[Tensor]) -> None:
    """Keep nn.TransformerEncoder from looking at a traced mask's values: whether it is causal is but a hint."""
    original = transformer._detect_is_causal_mask

    def detect(mask: Any, is_causal: Any = None, size: Any = None) -> bool:
        return is_causal is True if isinstance(mask, kind) else original(mask, is_causal, size)

    transformer._detect_is_causal_mask = detect


@contextlib.contextmanager
def _as_torchax_expects() -> Iterator[None]:
    """Import torchax as if all the operators were there that its tables name, and undo what it does besides.

    torchax 0.0.13 names overloads of ATen with Dimname, which torch 2.13 has no more: they cannot be called, so it does
    not matter what stands for them.
    """
    packet = torch._ops.OpOverloadPacket
    original = packet.__getattr__

    def with_stand_ins(self: Any, key: str) -> Any:
        try:
            return original(self, key)
        except AttributeError:
            if key.startswith("_") or not str(self).startswith("aten."):
                raise
            return f"{self}.{key}, which this torch lacks"

    with (
        simple_attention,  # torchax turns fused attention off for good
        patch.object(packet, "__getattr__", with_stand_ins),
        # With a device named "jax", for which torch has no code, torch.compile fails, whatever it compiles.
        patch.object(torch.utils, "rename_privateuse1_backend"),
        patch.object(torch, "_register_device_module"),
        patch.dict(os.environ),
    ):
        yield


def _of_tensors(env: Any, f: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arrays as one of tensors."""

    def called(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = env.t2j_iso((args, kwargs))
        return env.j2t_iso(f(*args, **kwargs))

    return called


def _detach(x: Tensor) -> Tensor:
    return x.apply_jax(jax.lax.stop_gradient)  # type: ignore[attr-defined]


# What torchax computes without writing the statistics back -------------------------------------------------------


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training and running_mean is not None and running_var is not None:
        return _normalized(x, [1, -1], running_mean, running_var, weight, bias, eps)
    count = math.prod(x.shape) // x.shape[1]
    if training and count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")
    axes = [0, *range(2, x.ndim)]
    mean, var = x.mean(axes), x.var(axes, correction=0)
    _update(running_mean, mean, momentum)
    _update(running_var, _unbiased(var, count), momentum)
    return _normalized(x, [1, -1], mean, var, weight, bias, eps)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats and running_mean is not None and running_var is not None:
        return _normalized(x, [1, -1], running_mean, running_var, weight, bias, eps)
    axes = list(range(2, x.ndim))
    mean, var = x.mean(axes), x.var(axes, correction=0)
    _update(running_mean, mean.mean(0), momentum)
    _update(running_var, _unbiased(var, math.prod(x.shape[2:])).mean(0), momentum)
    return _normalized(x, list(x.shape[:2]), mean, var, weight, bias, eps)


def _unbiased(var: Tensor, count: int) -> Tensor:
    return var * (count / max(count - 1, 1))


def _update(running: Tensor | None, new: Tensor, momentum: float) -> None:
    if running is not None:
        running.copy_((1 - momentum) * running + momentum * new)


def _normalized(
    x: Tensor, lead: list[int], mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    ones = [1] * (x.ndim - 2)
    y = (x - mean.reshape(lead + ones)) * torch.rsqrt(var.reshape(lead + ones) + eps)
    if weight is not None:
        y = y * weight.reshape([1, -1, *ones])
    if bias is not None:
        y = y + bias.reshape([1, -1, *ones])
    return y.to(x.dtype)
