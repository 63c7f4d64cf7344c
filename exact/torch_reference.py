"""torch's own answers for a subject: value, derivatives and batches, by autograd and a loop.

Never imports jax.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from bridge_server.torch_runtime.randomness import RowMajorDraws
from bridge_server.torch_runtime.randomness import seed as seed_by_key
from exact.compare import Refusal, attempt

Function = Callable[..., Any]


class NoType(TypeError):
    """A result has a type that numpy and JAX lack."""


class Reference:
    """torch's answers for one function of flat tensors.

    Args:
      wrt: positions of the differentiated inputs.
      key: two uint32 words that seed each run, as in the bridge; None if the function samples no
        random numbers.
    """

    def __init__(
        self,
        function: Function,
        inputs: Sequence[Tensor],
        wrt: Sequence[int],
        key: Any = None,
    ) -> None:
        self.inputs, self.wrt, self.key = list(inputs), list(wrt), key
        self._function = function

    def run(self, *tensors: Tensor) -> list[Tensor]:
        """Return the result's leaves that are tensors or numbers."""
        if self.key is not None:
            seed_by_key(torch.tensor(self.key, dtype=torch.uint32))
        # The bridge draws in row-major order, whatever the layout (docs/design.md).
        with contextlib.nullcontext() if self.key is None else RowMajorDraws():
            leaves = pytree.tree_leaves(self._function(*tensors))
        return [_dense(leaf) for leaf in leaves if leaf is not None]

    def value(self) -> list[np.ndarray]:
        with torch.no_grad():
            return arrays(self.run(*_fresh(self.inputs)))

    def inexact_outputs(self) -> list[int]:
        with torch.no_grad():
            return [
                i for i, y in enumerate(self.run(*_fresh(self.inputs))) if is_inexact(y)
            ]

    def batched(self, batch: Sequence[Tensor]) -> list[np.ndarray]:
        """Return each row's result, stacked."""
        with torch.no_grad():
            rows = [
                self.run(*_fresh([x[i] for x in batch])) for i in range(len(batch[0]))
            ]
        return arrays([torch.stack(leaves) for leaves in zip(*rows, strict=True)])

    def gradient(
        self, outputs: Sequence[int], cotangents: Sequence[Tensor]
    ) -> list[np.ndarray]:
        """Return the cotangents of the differentiated inputs, in JAX's complex convention."""
        xs = self._leaves(self.inputs)
        ys = self._restricted(xs, outputs)
        return arrays([g.conj() for g in _grad(ys, xs, [c.conj() for c in cotangents])])

    def tangents(
        self, outputs: Sequence[int], tangents: Sequence[Tensor]
    ) -> list[np.ndarray]:
        """Return the outputs' tangents by forward mode.

        If an operator lacks forward mode, use two backward passes.
        """
        xs = self._primals()

        def function(*xs: Tensor) -> tuple[Tensor, ...]:
            return tuple(self._restricted(xs, outputs))

        found = attempt(lambda: torch.func.jvp(function, tuple(xs), tuple(tangents)))
        if isinstance(found, Refusal):
            return arrays(self._tangents_by_reverse_mode(outputs, tangents))
        return arrays([_dense(t).to(y.dtype) for y, t in zip(*found, strict=True)])

    def curvature(
        self,
        outputs: Sequence[int],
        weights: Sequence[Tensor],
        tangents: Sequence[Tensor],
    ) -> list[np.ndarray]:
        """Return the Hessian of sum(real(conj(weights) * outputs)) times the tangents.

        Complex numbers follow JAX's convention.
        """
        xs = self._leaves(self.inputs)
        ys = self._restricted(xs, outputs)
        gradients = _grad([_weighed(ys, weights)], xs, None, create_graph=True)
        return arrays(
            [g.conj() for g in _grad([_weighed(gradients, tangents)], xs, None)]
        )

    # torch's other routes to the same values. If the routes differ, torch contradicts itself.

    def batched_by_vmap(self, batch: Sequence[Tensor]) -> list[np.ndarray]:
        with torch.no_grad():
            return arrays(
                torch.func.vmap(
                    lambda *xs: tuple(self.run(*_fresh(xs))), randomness="same"
                )(*batch)
            )

    def tangents_by_reverse_mode(
        self, outputs: Sequence[int], tangents: Sequence[Tensor]
    ) -> list[np.ndarray]:
        return arrays(self._tangents_by_reverse_mode(outputs, tangents))

    def curvature_by_forward_mode(
        self,
        outputs: Sequence[int],
        weights: Sequence[Tensor],
        tangents: Sequence[Tensor],
    ) -> list[np.ndarray]:
        def total(*xs: Tensor) -> Tensor:
            return _weighed(self._restricted(xs, outputs), weights)

        gradient = torch.func.grad(total, argnums=tuple(range(len(self.wrt))))
        found = torch.func.jvp(gradient, tuple(self._primals()), tuple(tangents))[1]
        return arrays([_dense(g).conj() for g in found])

    def spread(
        self,
        answer: Callable[["Reference"], Any],
        eps: float,
        rng: np.random.RandomState,
    ) -> list[Any]:
        """Return the change of each leaf of an answer under a change of the inputs by an eps.

        A leaf is None if its change is undefined.
        """
        base = attempt(lambda: answer(self))
        if isinstance(base, Refusal):
            return []
        moved = [0.0] * len(base)
        for _ in range(3):
            other = attempt(lambda: answer(self._perturbed(eps, rng)))
            if isinstance(other, Refusal) or len(other) != len(base):
                return [None] * len(base)
            for i, (a, b) in enumerate(zip(base, other, strict=True)):
                if a.shape != b.shape:
                    return [None] * len(base)
                with np.errstate(all="ignore"):
                    far = np.abs(a.astype(np.complex128) - b.astype(np.complex128))
                moved[i] = max(
                    moved[i], float(np.nan_to_num(far, nan=0, posinf=0).max(initial=0))
                )
        return moved

    def _perturbed(self, eps: float, rng: np.random.RandomState) -> "Reference":
        def moved(x: Tensor) -> Tensor:
            return x * torch.from_numpy(
                np.asarray(1 + eps * rng.uniform(-1, 1, x.shape))
            ).to(x.dtype)

        inputs = [moved(x) if i in self.wrt else x for i, x in enumerate(self.inputs)]
        return Reference(self._function, inputs, self.wrt, self.key)

    def _primals(self) -> list[Tensor]:
        return [self.inputs[i].clone() for i in self.wrt]

    def _leaves(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [inputs[i].clone().requires_grad_() for i in self.wrt]

    def _restricted(self, xs: Sequence[Tensor], outputs: Sequence[int]) -> list[Tensor]:
        values = _fresh(self.inputs)
        for i, x in zip(self.wrt, xs, strict=True):
            # A function may write to its inputs, but not to autograd leaves.
            values[i] = x.clone()
        ys = self.run(*values)
        return [ys[i] for i in outputs]

    def _tangents_by_reverse_mode(
        self, outputs: Sequence[int], tangents: Sequence[Tensor]
    ) -> list[Tensor]:
        xs = self._leaves(self.inputs)
        ys = self._restricted(xs, outputs)
        us = [torch.zeros_like(y).requires_grad_() for y in ys]
        gradients = _grad(ys, xs, us, create_graph=True)
        return [t.detach() for t in _grad(gradients, us, list(tangents))]


def arrays(tensors: Sequence[Any]) -> list[np.ndarray]:
    return [array(x) for x in tensors]


def array(x: Any) -> np.ndarray:
    if not isinstance(x, Tensor):
        return np.asarray(x)
    x = x.detach().resolve_conj().resolve_neg()
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    if not hasattr(np, str(x.dtype).removeprefix("torch.")):
        raise NoType(str(x.dtype))
    return x.numpy().copy()


def is_inexact(y: Any) -> bool:
    return isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _fresh(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone() for x in inputs]


def _dense(x: Any) -> Any:
    if isinstance(x, Tensor) and x._is_zerotensor():
        return torch.zeros(x.shape, dtype=x.dtype)
    if isinstance(x, Tensor) and x.layout is not torch.strided:
        raise NoType(f"the result has layout {x.layout}")
    return x


def _weighed(ys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for y, w in zip(ys, weights, strict=True):
        part = (w.conj() * y).sum()
        total = total + (part.real if part.is_complex() else part).to(torch.float64)
    return total


def _grad(
    ys: Sequence[Tensor],
    xs: Sequence[Tensor],
    cotangents: Any,
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    """Return gradients, with zeros for inputs without effect."""
    pairs = [
        (y, None if cotangents is None else cotangents[i])
        for i, y in enumerate(ys)
        if y.requires_grad
    ]
    if not pairs:
        return [torch.zeros_like(x) for x in xs]
    outputs, given = zip(*pairs, strict=True)
    found = torch.autograd.grad(
        outputs,
        xs,
        None if cotangents is None else given,
        allow_unused=True,
        create_graph=create_graph,
    )
    return [
        torch.zeros_like(x) if g is None else _dense(g)
        for x, g in zip(xs, found, strict=True)
    ]
