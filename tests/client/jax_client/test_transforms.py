"""jax's transformations of a remote torch function, each compared in float64 with those of the
same function in jax."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import (
    grad,
    hessian,
    jacfwd,
    jacrev,
    jit,
    jvp,
    linearize,
    value_and_grad,
    vjp,
    vmap,
)
from jax.ad_checkpoint import print_saved_residuals
from jax.test_util import check_grads

from bridge_client import Session
from tests.client.jax_client.conftest import Remote, holds_nothing

Function = Callable[[jax.Array], jax.Array]

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(autouse=True)
def nothing_is_held(session: Session) -> Iterator[None]:
    """After each test there are no residuals and no leased blocks, as before it."""
    yield
    assert holds_nothing(session)


def smooth(x: jax.Array) -> jax.Array:
    """What the worker's `smooth` computes."""
    return jnp.tanh(x * jnp.sin(x)) * x.sum()


X = np.linspace(0.3, 1.2, 3)
ROWS = np.linspace(-0.7, 1.1, 6).reshape(2, 3)


def squared(f: Function) -> Function:
    return lambda x: (f(x) ** 2).sum()


def stepped(f: Function, wrap: Callable[[Any], Any] = lambda body: body) -> Function:
    """Return three steps of f as a scan."""
    return lambda x: jax.lax.scan(
        wrap(lambda carry, _: (f(carry), carry[0])), x, None, length=3
    )[0]


def pulled_twice(f: Function, x: jax.Array) -> Any:
    pull = vjp(f, x)[1]
    return pull(x), pull(2 * x)


def chosen(f: Function) -> Function:
    return lambda x: jax.lax.cond(x.sum() > 0, f, lambda y: y * 2, x)


# By name: the transform, its argument, and how many calls it takes outside jit, and inside.
TRANSFORMS: dict[
    str, tuple[Callable[[Function, jax.Array], Any], np.ndarray, int, int]
] = {
    "call": (lambda f, x: f(x), X, 1, 1),
    "grad": (lambda f, x: grad(squared(f))(x), X, 2, 2),
    "value_and_grad": (lambda f, x: value_and_grad(squared(f))(x), X, 2, 2),
    "vjp, used twice": (pulled_twice, X, 3, 3),
    "jvp": (lambda f, x: jvp(f, (x,), (x,)), X, 2, 2),
    "linearize": (lambda f, x: linearize(f, x)[1](x), X, 2, 1),
    "linear_transpose": (
        lambda f, x: jax.linear_transpose(linearize(f, x)[1], x)(x),
        X,
        2,
        1,
    ),
    "jacfwd": (lambda f, x: jacfwd(f)(x), X, 2, 1),
    "jacrev": (lambda f, x: jacrev(f)(x), X, 2, 1),
    "hessian": (lambda f, x: hessian(squared(f))(x), X, 4, 3),
    "jacrev of jacrev": (lambda f, x: jacrev(jacrev(squared(f)))(x), X, 4, 3),
    "third derivative": (lambda f, x: jacfwd(jacrev(grad(squared(f))))(x), X, 8, 5),
    "grad of jvp": (
        lambda f, x: grad(lambda y: jvp(f, (y,), (y,))[1].sum())(x),
        X,
        3,
        1,
    ),
    "vmap": (lambda f, x: vmap(f)(x), ROWS, 1, 1),
    "vmap of vmap": (
        lambda f, x: vmap(vmap(f, in_axes=1, out_axes=1))(jnp.stack([x, x + 1])),
        ROWS,
        1,
        1,
    ),
    "vmap of grad": (lambda f, x: vmap(grad(squared(f)))(x), ROWS, 2, 2),
    "grad of vmap": (
        lambda f, x: grad(lambda y: (vmap(f)(y) ** 2).sum())(x),
        ROWS,
        2,
        2,
    ),
    "vmap of hessian": (lambda f, x: vmap(hessian(squared(f)))(x), ROWS, 4, 3),
    "scan": (lambda f, x: stepped(f)(x), X, 3, 3),
    "grad of scan": (lambda f, x: grad(lambda y: stepped(f)(y).sum())(x), X, 6, 6),
    "jvp of scan": (lambda f, x: jvp(stepped(f), (x,), (x,)), X, 6, 6),
    "vmap of grad of scan": (
        lambda f, x: vmap(grad(lambda y: stepped(f)(y).sum()))(x),
        ROWS,
        6,
        6,
    ),
    "grad of scan of checkpoint": (
        lambda f, x: grad(lambda y: stepped(f, jax.checkpoint)(y).sum())(x),
        X,
        6,
        6,
    ),
    "grad of lax.map": (
        lambda f, x: grad(lambda y: jax.lax.map(f, y).sum())(x),
        ROWS,
        4,
        4,
    ),
    "while": (
        lambda f, x: jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1])), (0, x)
        )[1],
        X,
        3,
        3,
    ),
    "grad of cond": (lambda f, x: grad(lambda y: chosen(f)(y).sum())(x), X, 2, 2),
    "vmap of grad of cond": (
        lambda f, x: vmap(grad(lambda y: chosen(f)(y).sum()))(x),
        ROWS,
        2,
        1,
    ),
    "grad of checkpoint": (lambda f, x: grad(jax.checkpoint(squared(f)))(x), X, 3, 2),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_those_of_the_function_in_jax(
    remote: Remote, session: Session, name: str
) -> None:
    """At once and inside jit, each gives what jax makes of the same function in jax, to 1e-10,
    in so many calls."""
    transform, x, *expected_calls = TRANSFORMS[name]
    f, argument = remote("smooth"), jnp.asarray(x)
    expected = jit(lambda y: transform(smooth, y))(argument)
    calls = []
    for wrap in (lambda call: call, jit):
        before = session.stats()["calls"]
        seen = jax.block_until_ready(wrap(lambda y: transform(f, y))(argument))
        calls.append(session.stats()["calls"] - before)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
            seen,
            expected,
        )
    assert calls == expected_calls


def test_a_jitted_function_is_prepared_and_traced_once(remote: Remote) -> None:
    """Calls of the same signature trace nothing again, and prepare nothing on the worker."""
    f, traced = remote("smooth"), []

    @jit
    def loss(x: jax.Array) -> jax.Array:
        traced.append(x)
        return squared(f)(x)

    derivative = jit(grad(loss))
    first = derivative(jnp.asarray(X))
    programs = list(f._calls.values())
    np.testing.assert_array_equal(derivative(jnp.asarray(X)), first)
    assert (len(traced), list(f._calls.values())) == (1, programs)


def test_what_only_types_are_asked_of_makes_no_call(
    remote: Remote, session: Session
) -> None:
    """eval_shape and make_jaxpr know the outputs from Prepare."""
    f = remote("smooth")
    before = session.stats()["calls"]
    made = jax.eval_shape(f, jnp.asarray(X))
    text = str(jax.make_jaxpr(grad(squared(f)))(jnp.asarray(X)))
    assert (made.shape, made.dtype) == ((3,), jnp.float64)
    assert "bridge_keep[program=smooth wrt=(0,)]" in text
    assert session.stats()["calls"] == before


def test_checkpoint_saves_nothing_of_a_run(
    remote: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within jax.checkpoint, results are computed again instead of kept."""
    print_saved_residuals(
        jax.checkpoint(lambda x: jnp.sin(remote("smooth")(x)).sum()), jnp.asarray(X)
    )
    assert capsys.readouterr().out.strip() == "f64[3] from the argument x"


def test_vmap_over_some_arguments(remote: Remote) -> None:
    """What is not mapped is the same for the whole batch, in gradients too: per sample, and of
    the sum."""
    x, w = jnp.asarray(ROWS), jnp.asarray(np.linspace(-1, 1, 9).reshape(3, 3))

    def gradients(g: Callable[..., jax.Array]) -> Any:
        per_sample = vmap(grad(lambda w, x: g(x, w).sum()), in_axes=(None, 0))
        of_all = grad(lambda w, x: vmap(g, in_axes=(0, None))(x, w).sum())
        return jit(lambda w, x: (per_sample(w, x), of_all(w, x)))(w, x)

    expected = gradients(lambda x, w: jnp.tanh(w @ x) * x.sum())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10),
        gradients(remote("affine")),
        expected,
    )


def test_several_results_of_which_one_matters(remote: Remote) -> None:
    """Only the cotangents that there are travel, and only the gradients that are asked for are
    computed."""
    f, x, y = remote("two_results"), jnp.asarray(X), jnp.asarray(X) + 1
    seen = grad(lambda y: f(x, y)[1].sum())(y)
    np.testing.assert_allclose(seen, jnp.exp(y), rtol=1e-12)
    both = jit(lambda x, y: vjp(f, x, y)[1]((x, y)))(x, y)
    expected = vjp(lambda x, y: (jnp.sin(x) * y, jnp.exp(y)), x, y)[1]((x, y))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), both, expected
    )


def test_complex_functions_have_jaxs_convention(remote: Remote) -> None:
    """Derivatives of functions of complex numbers are jax's, not torch's conjugates of them."""
    f, twin = remote("complex_power"), lambda z, w: z**2 * jnp.conj(w)
    z, w = jnp.asarray([1 + 2j, 3 - 1j]), jnp.asarray([2 + 0.5j, -1j])
    seen = vjp(f, z, w)[1](w), jvp(f, (z, w), (w, z))
    expected = vjp(twin, z, w)[1](w), jvp(twin, (z, w), (w, z))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), seen, expected
    )


def test_functions_that_torch_func_cannot_look_into(remote: Remote) -> None:
    """An autograd.Function of the old style has its gradient, also batched."""
    f, x = remote("old_style"), jnp.asarray(ROWS)
    expected = 3 * jnp.sin(x) ** 2 * jnp.cos(x)
    np.testing.assert_allclose(grad(lambda x: f(x).sum())(x), expected, rtol=1e-12)
    np.testing.assert_allclose(
        jit(vmap(grad(lambda x: f(x).sum())))(x), expected, rtol=1e-12
    )


def test_finite_differences(remote: Remote) -> None:
    """jax's own check of derivatives against finite differences passes, in both modes, twice."""
    check_grads(remote("smooth"), (jnp.asarray(X),), order=2, modes=["fwd", "rev"])
