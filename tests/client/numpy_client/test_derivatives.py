"""Derivatives on NumPy arrays: against formulas, finite differences, and JAX in process."""

import gc
import os
import signal
import threading
from typing import Any

import numpy as np
import pytest

from bridge_client import Session, connect
from bridge_client.numpy import RemoteFunction
from bridge_wire.errors import (
    CallerError,
    DTypeError,
    RemoteModelError,
    SpecError,
    StructureError,
)
from tests.client.numpy_client.conftest import spawned
from tests.conftest import eventually
from tests.workers import children, run_program

X = np.array([0.5, -0.25, 2.0])


def value_of(x: Any, a: float = 1.0, b: float = 100.0) -> Any:
    return np.sum(b * (x[1:] - x[:-1] ** 2) ** 2 + (a - x[:-1]) ** 2)


def gradient_of(x: Any, a: float = 1.0, b: float = 100.0) -> Any:
    rest = x[1:] - x[:-1] ** 2
    gradient = np.zeros_like(x)
    gradient[:-1] += -4 * b * rest * x[:-1] - 2 * (a - x[:-1])
    gradient[1:] += 2 * b * rest
    return gradient


def hessian_of(x: Any) -> Any:
    steps = 1e-5 * np.eye(len(x))
    rows = [(gradient_of(x + h) - gradient_of(x - h)) / 2e-5 for h in steps]
    return np.array(rows)


def test_value_and_gradient(either: Session) -> None:
    """The value and the gradient are those of the formula, with a number beside the array."""
    f = RemoteFunction(either, name="rosenbrock")
    value, gradient = f.value_and_grad(X)
    np.testing.assert_allclose(value, value_of(X), rtol=1e-14)
    np.testing.assert_allclose(gradient, gradient_of(X), rtol=1e-13)
    value, gradient = f.value_and_grad(X, b=10.0)
    np.testing.assert_allclose(value, value_of(X, b=10.0), rtol=1e-14)
    np.testing.assert_allclose(gradient, gradient_of(X, b=10.0), rtol=1e-13)


def test_products_with_the_hessian(either: Session) -> None:
    """`hvp` is the Hessian times a vector."""
    f = RemoteFunction(either, name="rosenbrock")
    for direction in np.eye(3):
        (product,) = f.hvp((X,), (direction,))
        np.testing.assert_allclose(product, hessian_of(X) @ direction, rtol=1e-7)


def test_pullback_and_tangent(either: Session) -> None:
    """`vjp` and `jvp` pair to the same number, and leave integers out."""
    f = RemoteFunction(either, name="damped")
    x, w = np.linspace(0, 1, 4), np.arange(1.0, 5.0)
    result, pull = f.vjp(x, w)
    cotangent = np.array([1.0, -1.0, 2.0, 0.5])
    of_x, of_w = pull({"y": cotangent, "count": None})
    np.testing.assert_allclose(result["y"], np.exp(-x) * w, rtol=1e-14)
    np.testing.assert_allclose(of_x, -np.exp(-x) * w * cotangent, rtol=1e-13)
    np.testing.assert_allclose(of_w, np.exp(-x) * cotangent, rtol=1e-13)
    direction = np.array([1.0, 2.0, 3.0, 4.0])
    result, tangent = f.jvp((x, w), (direction, None))
    np.testing.assert_allclose(
        tangent["y"], -np.exp(-x) * w * direction, rtol=1e-13, atol=1e-15
    )
    assert tangent["count"] is None and result["count"] == 3


@pytest.mark.parametrize("number", [1j, 1e60, 10**400])
def test_numbers_that_a_type_cannot_hold_are_refused(
    worker: Session, number: Any
) -> None:
    f = RemoteFunction(worker, name="damped")
    x = np.ones((), np.float32)
    with pytest.raises(DTypeError, match="a number that float32 holds"):
        f.jvp((x, x), (number, None))
    _, tangent = f.jvp((x, x), (float("nan"), None))
    assert np.isnan(tangent["y"])


@pytest.mark.parametrize("axes", [True, "0", ("a",), 0.0, ()])
def test_axes_that_are_no_integers_are_refused(worker: Session, axes: Any) -> None:
    f = RemoteFunction(worker, name="damped")
    with pytest.raises(CallerError, match="expected an integer or None"):
        f.vmap(axes)
    x = np.ones((2, 3), np.float32)
    assert f.vmap(np.int64(0))(x, x)["y"].shape == (2, 3)


def test_gradients_have_the_structure_of_their_arguments(worker: Session) -> None:
    """The gradients of two pytrees are such pytrees, with None at integers and numbers."""
    f = RemoteFunction(worker, name="loss")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=5)
    parameters = {"w": rng.normal(size=3), "b": [np.array(0.5)]}
    batch = {"y": y, "x": x, "id": 7}
    value, (of_parameters, of_batch) = f.value_and_grad(
        parameters, batch, argnums=(0, -1)
    )
    residual = x @ parameters["w"] + 0.5 - y
    np.testing.assert_allclose(value, np.mean(residual**2), rtol=1e-13)
    np.testing.assert_allclose(of_parameters["w"], 2 / 5 * x.T @ residual, rtol=1e-12)
    np.testing.assert_allclose(of_parameters["b"], [2 / 5 * residual.sum()], rtol=1e-12)
    np.testing.assert_allclose(of_batch["y"], -2 / 5 * residual, rtol=1e-12)
    assert of_batch["id"] is None


def test_states_have_gradients(worker: Session) -> None:
    """The cotangents of a worker's state are instances of its class."""
    state = RemoteFunction(worker, name="started")(np.ones(4))
    result, pull = RemoteFunction(worker, name="stepped").vjp(state, 0.5)
    cotangents, of_dt = pull(type(result)(None, 1.0))
    assert type(cotangents) is type(state) and of_dt is None
    np.testing.assert_allclose(cotangents.state.position, np.full(4, 0.5))
    assert cotangents.state.steps is None


def test_gradients_of_parameters_of_a_torch_model(torch_address: str) -> None:
    """A buffer is passed and has no gradient; parameters have theirs."""
    x = np.array([1.0, 2.0, 3.0])
    with connect(torch_address) as session:
        f = RemoteFunction(session, name="scored", parameters="client")
        value, gradient = f.value_and_grad(f.parameters(), x)
    inner = x * 0.5 + 1
    np.testing.assert_allclose(value, (inner**2).sum())
    np.testing.assert_allclose(gradient["weight"], 2 * inner * x)
    assert gradient["shift"] is None


def test_torch_models_that_look_at_values_are_traced_on_the_call(
    torch_address: str,
) -> None:
    """A torch model that fails on made-up values is traced on those of the call, also in a
    batch."""
    x = np.array([4.0, 6.5])
    with connect(torch_address) as session:
        f = RemoteFunction(session, name="guarded")
        value, gradient = f.value_and_grad(x)
        np.testing.assert_allclose((value, *gradient), (58.25, 8, 13))
        with pytest.raises(RemoteModelError, match="the sum is 2"):
            f(np.ones(2))


def test_functions_of_this_process() -> None:
    """A session with models of this process has the same derivatives."""
    done = run_program(
        """
        import jax
        jax.config.update("jax_enable_x64", True)
        import numpy as np
        from bridge_client.inproc import host
        from bridge_client.numpy import RemoteFunction
        from tests.client.numpy_client import models
        with host(jax_model=models.rosenbrock) as session:
            f = RemoteFunction(session)
            x = np.array([0.5, -0.25, 2.0])
            value, gradient = f.value_and_grad(x)
            result, pull = f.vjp(x)
            x[:] = 0
            (again,) = pull(1.0)
            x[:] = 0.5, -0.25, 2.0
            expected = jax.value_and_grad(models.rosenbrock)(x)
            np.testing.assert_allclose(value, expected[0], rtol=1e-14)
            np.testing.assert_allclose(gradient, expected[1], rtol=1e-13)
            np.testing.assert_array_equal(again, gradient)
            (product,) = f.hvp((x,), (np.ones(3),))
            row = jax.hessian(models.rosenbrock)(x) @ np.ones(3)
            np.testing.assert_allclose(product, row, rtol=1e-12)
            batch = f.vmap()(np.stack([x, 2 * x]))
            np.testing.assert_allclose(batch, [f(x), f(2 * x)], rtol=1e-14)
            print("equal")
        """
    )
    assert done.stdout == "equal\n", done.stderr


def test_complex_gradients_are_those_of_jax(worker: Session) -> None:
    """The gradient of a complex argument is the conjugate of the direction of ascent, as in JAX."""
    f = RemoteFunction(worker, name="split")
    z = np.array([1 + 2j, -0.5 + 1j])
    _, gradient = f.value_and_grad(z)
    np.testing.assert_allclose(gradient, 2 * z.real - 6j * z.imag, rtol=1e-14)


def test_batches_map_values_and_derivatives(either: Session) -> None:
    """A mapped function has each example's value, gradient, tangent and product with the Hessian,
    in one call."""
    f = RemoteFunction(either, name="rosenbrock").vmap((1,))
    rng = np.random.default_rng(1)
    batch = rng.normal(size=(3, 5))
    np.testing.assert_allclose(f(batch), [value_of(x) for x in batch.T], rtol=1e-13)
    values, gradients = f.value_and_grad(batch)
    expected = np.array([gradient_of(x) for x in batch.T])
    np.testing.assert_allclose(values, [value_of(x) for x in batch.T], rtol=1e-13)
    np.testing.assert_allclose(gradients, expected, rtol=1e-12)
    directions = rng.normal(size=(3, 5))
    _, tangents = f.jvp((batch,), (directions,))
    np.testing.assert_allclose(tangents, (expected * directions.T).sum(1), rtol=1e-12)
    (products,) = f.hvp((batch,), (directions,))
    for x, direction, product in zip(batch.T, directions.T, products, strict=True):
        np.testing.assert_allclose(product, hessian_of(x) @ direction, rtol=1e-6)


def test_shared_arguments_of_a_batch_have_a_gradient_per_example(
    worker: Session,
) -> None:
    """An argument with in_axes None is shared, and has the gradient of each example."""
    f = RemoteFunction(worker, name="damped").vmap((0, None))
    x, w = np.linspace(0, 1, 4), np.array(2.0)
    result, pull = f.vjp(x, w)
    kept = x.copy()
    x[:] = 0  # not seen by the pullback
    of_x, of_w = pull({"y": np.ones(4), "count": None})
    np.testing.assert_allclose(result["y"], np.exp(-kept) * 2, rtol=1e-14)
    np.testing.assert_allclose(of_x, -np.exp(-kept) * 2, rtol=1e-14)
    np.testing.assert_allclose(of_w, np.exp(-kept), rtol=1e-14)


# Residuals ----------------------------------------------------------------------------------------


def test_pullback_does_not_see_later_changes(worker: Session) -> None:
    """An argument that is changed in place after the forward run changes no cotangent, wherever
    it lies."""
    f = RemoteFunction(worker, name="rosenbrock")
    in_slab = RemoteFunction(worker, name="tripled")(X)
    expected = gradient_of(3 * X)
    for x in (in_slab, 3 * X):
        _, pull = f.vjp(x)
        x[:] = 0
        (cotangent,) = pull(1.0)
        np.testing.assert_allclose(cotangent, expected, rtol=1e-13)


def test_residual_lives_as_long_as_its_pullback(worker: Session) -> None:
    """The worker keeps a residual until the pullback is dropped, which may be called again."""
    f = RemoteFunction(worker, name="rosenbrock")
    _, pull = f.vjp(X)
    (first,), (second,) = pull(1.0), pull(2.0)
    np.testing.assert_allclose(2 * first, second, rtol=1e-14)
    assert worker.stats()["residuals"] == 1
    del pull
    gc.collect()

    def is_dropped() -> bool:
        f(X)  # a dropped residual is told with the next call
        return worker.stats()["residuals"] == 0

    assert eventually(is_dropped)


def test_pullback_outlives_the_worker() -> None:
    """A pullback whose worker was killed and started again computes from the same inputs."""
    before = children()
    with spawned(".venv-jax", "--x64") as session:
        (pid,) = children() - before
        f = RemoteFunction(session, name="rosenbrock")
        _, pull = f.vjp(X)
        os.kill(pid, signal.SIGKILL)
        (cotangent,) = pull(1.0)
        np.testing.assert_allclose(cotangent, gradient_of(X), rtol=1e-13)
        assert session.stats()["restarts"] == 1


# Errors -------------------------------------------------------------------------------------------


def test_misuse_of_derivatives_is_named(worker: Session) -> None:
    """Results, arguments, tangents and cotangents without a derivative are refused by name."""
    f = RemoteFunction(worker, name="damped")
    g = RemoteFunction(worker, name="rosenbrock")
    with pytest.raises(CallerError, match="expected one real scalar"):
        f.value_and_grad(X, X)
    with pytest.raises(CallerError, match="no derivative; pass an array of floats"):
        g.value_and_grad(np.array([1, 2, 3]))
    with pytest.raises(CallerError, match="argnums=2, but the call has 1"):
        g.value_and_grad(X, argnums=2)
    with pytest.raises(StructureError, match="expected a tuple of 1 tangents"):
        g.jvp((X,), (X, X))
    with pytest.raises(CallerError, match="no argument has a tangent"):
        g.hvp((X,), (None,))
    with pytest.raises(SpecError, match=r"has shape .2.; expected .3."):
        g.jvp((X,), (np.ones(2),))
    with pytest.raises(DTypeError, match="float32; expected float64: cast it"):
        g.jvp((X,), (np.ones(3, np.float32),))
    _, pull = f.vjp(X, X)
    with pytest.raises(DTypeError, match=r"`cotangent\['count'\]` belongs to a result"):
        pull({"y": X, "count": np.array(1)})
    with pytest.raises(StructureError, match="`cotangent` is a ndarray; expected a"):
        pull(X)
    with pytest.raises(CallerError, match="no result has a cotangent"):
        pull(None)


# Programs of others -------------------------------------------------------------------------------


def test_scipy_finds_the_same_minimum_as_in_process() -> None:
    """BFGS with values and gradients of the worker gives the result of the same function in this
    process, compiled by JAX, to the bit."""
    done = run_program(
        """
        import sys
        import numpy as np
        from scipy.optimize import minimize
        from bridge_client import spawn
        from bridge_client.numpy import RemoteFunction
        target = "tests/client/numpy_client/models.py:rosenbrock"
        x0 = np.array([-1.2, 1.0, 0.5, 2.0])
        with spawn(target, python=".venv-jax/bin/python", args=["--x64"]) as session:
            f = RemoteFunction(session)
            remote = minimize(f.value_and_grad, x0, jac=True, method="BFGS")
            newton = minimize(
                f.value_and_grad,
                x0[:2],
                jac=True,
                method="Newton-CG",
                hessp=lambda x, p: f.hvp((x,), (p,))[0],
            )
        assert not {"jax", "torch"} & set(sys.modules)
        import jax
        jax.config.update("jax_enable_x64", True)
        from tests.client.numpy_client import models
        # As the worker does, XLA compiles the forward and the backward pass one by one; in one
        # piece it rounds the gradient differently.
        compiled = jax.value_and_grad(jax.jit(models.rosenbrock))
        def in_process(x):
            value, gradient = compiled(x)
            return float(value), np.asarray(gradient)
        local = minimize(in_process, x0, jac=True, method="BFGS")
        assert remote.success and newton.success and remote.nit > 10
        assert remote.x.tobytes() == local.x.tobytes()
        assert remote.jac.tobytes() == local.jac.tobytes()
        assert (remote.fun, remote.nfev) == (local.fun, local.nfev)
        np.testing.assert_allclose(newton.x, np.ones(2), rtol=1e-3)
        print("equal")
        """
    )
    assert done.stdout == "equal\n", done.stderr


def test_threads_compute_side_by_side(worker: Session) -> None:
    """Calls of several threads with arrays of different shapes do not disturb each other."""
    f = RemoteFunction(worker, name="rosenbrock")
    wrong: list[int] = []

    def compute(size: int) -> None:
        rng = np.random.default_rng(size)
        for _ in range(50):
            x = rng.normal(size=size)
            value, gradient = f.value_and_grad(x)
            is_near = np.allclose(gradient, gradient_of(x), rtol=1e-11, atol=1e-11)
            if not (is_near and np.isclose(value, value_of(x), rtol=1e-12)):
                wrong.append(size)

    threads = [threading.Thread(target=compute, args=(n,)) for n in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
