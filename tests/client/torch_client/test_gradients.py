"""Gradients of many functions against two independent sources: jax.vjp in this process, and
finite differences."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.client.torch_client.conftest import Remote
from tests.client.torch_client.gradient_cases import CASES
from tests.client.torch_client.reference import (
    assert_within,
    float_leaves,
    is_inexact,
    to_torch,
    vjp,
)

Random = Callable[..., np.ndarray]


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


# The arguments of each case, of `r(*shape)` for normally distributed numbers; small, for finite
# differences.
ARGUMENTS: dict[str, Callable[[Random], tuple[Any, ...]]] = {
    "sine": lambda r: (r(2, 3), r(2, 3)),
    "broadcast": lambda r: (r(3, 1), r(4), r()),
    "pytree": lambda r: (
        {"inner": (r(2, 3), r(3, 2)), "list": [r(2), integers(4)]},
        r(),
    ),
    "several outputs": lambda r: (r(3, 2),),
    "mixed outputs": lambda r: (r(5),),
    "embedding": lambda r: (r(4, 2), integers(3, 0, 3)),
    "scalar": lambda r: (r(), r() + 4),
    "empty": lambda r: (r(0, 3), r(2, 3)),
    "matmul": lambda r: (r(2, 3, 4), r(4, 2)),
    "convolution": lambda r: (r(1, 2, 5, 4), r(3, 2, 3, 3), r(3)),
    "scan": lambda r: (r(3, 3), r(4, 3)),
    "fori_loop": lambda r: (r(3),),
    "while_loop": lambda r: (r(4) ** 2 + 0.5,),
    "cond": lambda r: (r(3), np.array(True)),
    "sort": lambda r: (r(2, 5),),
    "gather": lambda r: (r(3, 3), integers(0, 2, 2, 0), integers(1, 0, 0, 2)),
    "scatter": lambda r: (r(4, 2), integers(1, 1, 3), r(3, 2)),
    "custom_vjp": lambda r: (r(4),),
    "norm": lambda r: (r(3, 4),),
    "cross entropy": lambda r: (r(3, 4), integers(1, 0, 3)),
    "cholesky and solve": lambda r: (r(3, 3), r(3, 2)),
    "triangular solve": lambda r: (r(3, 3), r(3, 2)),
    "eigenvalues": lambda r: (r(3, 3),),
    "attention": lambda r: (
        r(2, 2, 3),
        r(2, 3, 3),
        r(2, 3, 2),
        np.array([[True, False, True], [True, True, True]]),
    ),
    "layer norm": lambda r: (r(2, 4), r(4), r(4)),
    "fft": lambda r: (r(2, 6),),
    "kinks": lambda r: (r(6),),
    "inner gradient": lambda r: (r(4), r(4)),
    "checkpoint": lambda r: (r(4),),
    "unused input": lambda r: (r(3), r(2)),
    "identity": lambda r: (r(2, 2),),
    "cumulative": lambda r: (r(3, 3),),
    "to complex": lambda r: (r(3), r(3)),
    "complex products": lambda r: (r(3) + 1j * r(3), r(3) - 1j * r(3)),
    "complex matmul": lambda r: (r(2, 3) + 1j * r(2, 3), r(3, 2)),
}

# The same in torch, for its convention for complex gradients.
TORCH: dict[str, Callable[..., Any]] = {
    "complex products": lambda z, w: (
        z * w.conj() + z.exp(),
        (z * w).real,
        w.abs() ** 2,
    ),
    "complex matmul": lambda z, x: ((z @ x.to(z.dtype)).sum(0), (z + 3).angle()),
    "to complex": lambda x, y: (
        torch.complex(x, y) ** 2,
        (torch.complex(x, y) + 2).abs(),
    ),
}

# XLA's float32 solvers and eigenvalues amplify the last bit by the matrix's condition number.
LOOSE_IN_FLOAT32 = {
    "cholesky and solve": 1e-4,
    "triangular solve": 1e-5,
    "eigenvalues": 1e-5,
}


def test_every_case_has_arguments() -> None:
    """No case is left out below."""
    assert set(ARGUMENTS) == set(CASES) and len(CASES) >= 20


def random(seed: str) -> Random:
    rng = np.random.default_rng(zlib.crc32(seed.encode()))
    return lambda *shape: np.asarray(rng.normal(size=shape))


def arguments(case: str, dtype: Any = np.float64) -> tuple[Any, ...]:
    """Return the case's arguments with all floats in the given dtype; complex numbers in the
    matching one."""

    def cast(x: Any) -> Any:
        if np.iscomplexobj(x):
            return x.astype(np.result_type(dtype, np.complex64))
        return x.astype(dtype) if is_inexact(x.dtype) else x

    return jax.tree.map(cast, ARGUMENTS[case](random(case)))


def remote_vjp(
    f: Callable[..., Any], args: Any, seed: str
) -> tuple[list[Any], list[np.ndarray], list[Tensor]]:
    """Return the outputs of `f(*args)`, random cotangents for the float ones, and the gradients
    of all float inputs."""
    inputs = [x.requires_grad_() for x in float_leaves(args)]
    outputs = jax.tree.leaves(f(*args))
    r = random(seed)
    differentiable = [y for y in outputs if y.requires_grad]
    given = [
        torch.tensor(r(*y.shape) + (1j * r(*y.shape) if y.is_complex() else 0)).to(y)
        for y in differentiable
    ]
    gradients = torch.autograd.grad(differentiable, inputs, given)
    return outputs, [as_numpy(ct) for ct in given], list(gradients)


def as_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def check_against_jax(
    remote: Remote, case: str, dtype: Any, tolerance: float, args: Any = None
) -> None:
    numpy_args = arguments(case, dtype)
    f = remote("gradient_case")
    outputs, given, gradients = remote_vjp(
        lambda *a: f(case, *a), to_torch(numpy_args) if args is None else args, case
    )
    expected_outputs, expected = vjp(CASES[case], numpy_args, given, x64=True)
    assert len(gradients) == len(expected) == len(float_leaves(numpy_args))
    for seen, wanted in zip(
        outputs + gradients, expected_outputs + expected, strict=True
    ):
        assert str(seen.dtype) == f"torch.{wanted.dtype}"
        assert_within(seen, wanted, tolerance)


@pytest.mark.parametrize("case", CASES)
def test_float64_gradients_are_those_of_jax(x64_remote: Remote, case: str) -> None:
    """Outputs and gradients are those of jax.vjp to 1e-12."""
    check_against_jax(x64_remote, case, np.float64, 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_float32_gradients_are_those_of_jax(x64_remote: Remote, case: str) -> None:
    """Outputs and gradients are those of jax.vjp in float32 to 1e-6, and have the inputs'
    dtypes."""
    check_against_jax(x64_remote, case, np.float32, LOOSE_IN_FLOAT32.get(case, 1e-6))


@pytest.mark.parametrize("case", CASES)
def test_float64_gradients_are_the_finite_differences(
    x64_remote: Remote, case: str
) -> None:
    """Each element of the Jacobian is the central difference of the remote function itself."""
    args = to_torch(arguments(case))
    leaves, structure = jax.tree.flatten(args)
    wrt = [i for i, leaf in enumerate(leaves) if is_inexact(leaf.dtype)]
    f = x64_remote("gradient_case")

    def of_floats(*inputs: Tensor) -> tuple[Tensor, ...]:
        full = list(leaves)
        for i, x in zip(wrt, inputs, strict=True):
            full[i] = x
        outputs = jax.tree.leaves(f(case, *jax.tree.unflatten(structure, full)))
        return tuple(y for y in outputs if is_inexact(y.dtype))

    inputs = [leaves[i].requires_grad_() for i in wrt]
    assert torch.autograd.gradcheck(
        of_floats,
        inputs,
        fast_mode=False,
        check_undefined_grad=case == "several outputs",
    )


@pytest.mark.parametrize("case", TORCH)
def test_complex_gradients_follow_torchs_convention(
    x64_remote: Remote, case: str
) -> None:
    """The gradients are those of the same function written in torch."""
    f = x64_remote("gradient_case")
    _, _, seen = remote_vjp(lambda *a: f(case, *a), to_torch(arguments(case)), case)
    _, _, expected = remote_vjp(TORCH[case], to_torch(arguments(case)), case)
    for one, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_imaginary_step_has_torchs_sign(x64_remote: Remote) -> None:
    """Descending |z - i|^2 along the negative gradient approaches i, and not its conjugate."""
    z = torch.tensor(0.2 - 0.3j, dtype=torch.complex128, requires_grad=True)
    f = x64_remote("gradient_case")
    for _ in range(40):
        square = f("complex products", torch.zeros((), dtype=z.dtype), z - 1j)[2]
        (gradient,) = torch.autograd.grad(square, z)
        z = (z - 0.2 * gradient).detach().requires_grad_()
    torch.testing.assert_close(
        z.detach(), torch.tensor(1j, dtype=torch.complex128), atol=1e-6, rtol=0
    )


SMALL = [
    "sine",
    "broadcast",
    "scalar",
    "empty",
    "matmul",
    "kinks",
    "layer norm",
    "unused input",
    "several outputs",
]


@pytest.mark.parametrize("case", SMALL)
def test_float16_gradients_are_those_of_jax(x64_remote: Remote, case: str) -> None:
    """In float16 they agree to a few units of its last place, 2**-10."""
    check_against_jax(x64_remote, case, np.float16, 4 * 2**-10)


@pytest.mark.parametrize("case", SMALL)
def test_bfloat16_gradients_are_those_of_jax(x64_remote: Remote, case: str) -> None:
    """In bfloat16 they agree to a few units of its last place, 2**-7."""
    args = jax.tree.map(lambda x: torch.tensor(x).bfloat16(), arguments(case))
    check_against_jax(x64_remote, case, ml_dtypes.bfloat16, 4 * 2**-7, args)


@pytest.mark.parametrize("case", ["pytree", "several outputs", "embedding", "scan"])
def test_gradients_are_the_same_over_every_lane(any_lane: Remote, case: str) -> None:
    """Outputs and gradients agree with jax.vjp over both lanes, in a worker without x64."""
    f = any_lane("gradient_case")
    numpy_args = arguments(case, np.float32)
    outputs, given, gradients = remote_vjp(
        lambda *a: f(case, *a), to_torch(numpy_args), case
    )
    expected_outputs, expected = vjp(CASES[case], numpy_args, given, x64=False)
    for seen, wanted in zip(
        outputs + gradients, expected_outputs + expected, strict=True
    ):
        assert_within(seen, wanted, 1e-6)
