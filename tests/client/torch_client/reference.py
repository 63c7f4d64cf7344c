"""jax in the tests' own process, as the reference for values and gradients; and conversions
between it and torch."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor


def to_numpy(value: Any) -> Any:
    """Return a structure of tensors as one of NumPy arrays."""
    return jax.tree.map(
        lambda x: x.detach().resolve_conj().numpy() if isinstance(x, Tensor) else x,
        value,
    )


def to_torch(value: Any) -> Any:
    """Return a structure of arrays as one of tensors; what is no array stays."""
    # An empty NumPy array has strides of 0, which gradcheck refuses.
    row_major = torch.contiguous_format
    return jax.tree.map(
        lambda x: (
            torch.tensor(x).clone(memory_format=row_major)
            if isinstance(x, np.ndarray | np.generic)
            else x
        ),
        value,
    )


def float_leaves(value: Any) -> list[Any]:
    """Return the float and complex arrays or tensors of a structure."""
    return [
        x for x in jax.tree.leaves(value) if hasattr(x, "dtype") and is_inexact(x.dtype)
    ]


def is_inexact(dtype: Any) -> bool:
    """Whether a dtype of torch, NumPy or jax can carry a derivative."""
    if isinstance(dtype, torch.dtype):
        return dtype.is_floating_point or dtype.is_complex
    return bool(jax.numpy.issubdtype(dtype, jax.numpy.inexact))


def vjp(
    f: Callable[..., Any], args: Any, cotangents: Sequence[np.ndarray], *, x64: bool
) -> list[np.ndarray]:
    """Return the outputs of `f(*args)`, and the gradients of its float leaves in torch's
    convention.

    `args` holds NumPy arrays; `cotangents` has one array per float output.
    """
    with jax.enable_x64(x64):
        leaves, structure = jax.tree.flatten(args)
        wrt = [
            i
            for i, leaf in enumerate(leaves)
            if hasattr(leaf, "dtype") and is_inexact(leaf.dtype)
        ]

        def restricted(*primals: Any) -> Any:
            full = list(leaves)
            for i, primal in zip(wrt, primals, strict=True):
                full[i] = primal
            outputs = jax.tree.leaves(f(*jax.tree.unflatten(structure, full)))
            return [
                y for y in outputs if hasattr(y, "dtype") and is_inexact(y.dtype)
            ], outputs

        def both(primals: Any, cotangents: Any) -> Any:
            _, pull, outputs = jax.vjp(restricted, *primals, has_aux=True)
            # jax.vjp is linear, torch's gradient conjugate-linear in the cotangent.
            return outputs, [
                jax.numpy.conj(x)
                for x in pull([jax.numpy.conj(ct) for ct in cotangents])
            ]

        made = jax.jit(both)(
            [jax.numpy.asarray(leaves[i]) for i in wrt], list(cotangents)
        )
        return jax.tree.map(np.asarray, made)


def assert_within(seen: Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Fail unless the arrays have one shape and differ by at most `tolerance`, relative to the
    largest element."""
    assert tuple(seen.shape) == expected.shape
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    expected = np.asarray(expected).astype(wide)
    if expected.size:
        found = (
            seen.detach()
            .resolve_conj()
            .to(torch.complex128 if seen.is_complex() else torch.float64)
            .numpy()
        )
        worst = np.abs(found - expected).max() / max(1.0, np.abs(expected).max())
        assert worst <= tolerance, f"off by {worst:.3g}"
