"""Residuals: a forward under grad runs once, and what it keeps on the worker goes with the last
use."""

import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge_client import Session, connect
from bridge_client.jax import RemoteTorchFunction, residuals
from bridge_wire.errors import RemoteModelError, SessionClosed
from tests.client.jax_client.conftest import Remote, holds_nothing, kill
from tests.conftest import eventually

X = jnp.linspace(0.1, 1.0, 4)
SLOPE = 2 * np.cos(np.linspace(0.1, 1.0, 4))


def smooth(x: jax.Array) -> jax.Array:
    return jnp.tanh(x * jnp.sin(x)) * x.sum()


def kept(session: Session) -> int:
    gc.collect()
    return session.stats()["residuals"]


def test_outside_jit_a_residual_lives_as_long_as_its_pullback(
    remote: Remote, session: Session
) -> None:
    """It serves each use of the pullback, and goes with it."""
    _, pull = jax.vjp(remote("sine"), X)
    assert kept(session) == 1
    calls = session.stats()["calls"]
    for scale in (1, 2):
        np.testing.assert_allclose(
            pull(scale * jnp.ones(4))[0], scale * SLOPE, rtol=1e-5, atol=1e-6
        )
    assert (session.stats()["calls"] - calls, kept(session)) == (2, 1)
    del pull
    assert eventually(lambda: kept(session) == 0)


def test_no_transfer_is_hidden(remote: Remote) -> None:
    """Calls and derivatives outside compiled code are left alone by jax.transfer_guard."""
    f = remote("sine")
    f(X), jax.vjp(f, X)
    with jax.transfer_guard("disallow"):
        value, pull = jax.vjp(f, X)
        gradient = pull(value)[0]
    np.testing.assert_allclose(gradient, value * SLOPE, rtol=1e-5, atol=1e-6)


def test_inside_jit_the_first_pullback_takes_it(
    remote: Remote, session: Session
) -> None:
    """Nobody tells when the handle is forgotten there; a second use recomputes from the inputs."""
    _, pull = jax.jit(lambda x: jax.vjp(remote("sine"), x))(X)
    apply = jax.jit(lambda pull, cotangent: pull(cotangent)[0])
    assert kept(session) == 1
    for scale in (1, 2):
        np.testing.assert_allclose(
            apply(pull, scale * jnp.ones(4)), scale * SLOPE, rtol=1e-5, atol=1e-6
        )
        assert kept(session) == 0


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["at once", "jit"])
def test_a_pullback_that_fails_takes_it_too(
    remote: Remote, session: Session, wrap: Callable[..., Any]
) -> None:
    """What a backward that raised would have read is of no more use."""
    gradient = wrap(jax.grad(lambda x: remote("fails_backwards")(x).sum()))
    with pytest.raises(RemoteModelError, match="no way back"):
        jax.block_until_ready(gradient(X))
    assert eventually(lambda: kept(session) == 0)


def test_a_pullback_that_is_not_used_keeps_nothing(
    remote: Remote, session: Session
) -> None:
    """jit sees that nobody wants the residual, and runs the plain program."""
    made = jax.jit(lambda x: jax.vjp(remote("sine"), x)[0])(X)
    np.testing.assert_allclose(made, 2 * np.sin(X), rtol=1e-5, atol=1e-6)
    assert kept(session) == 0


def test_residuals_never_asked_for_are_bounded(
    remote: Remote, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest of those that compiled code left behind are dropped, by number and by size."""
    begin = jax.jit(lambda x: jax.vjp(remote("square"), x))
    monkeypatch.setattr(residuals, "_MOST_UNCLAIMED", 3)
    pulls = [begin(X + i)[1] for i in range(5)]
    assert kept(session) == 3
    monkeypatch.setattr(session.pool, "max_bytes", 400 * X.nbytes)
    begin(jnp.ones(99 * 4))
    assert kept(session) == 2  # the large one, and one beside it
    for i, pull in enumerate(pulls):
        np.testing.assert_allclose(
            pull(jnp.ones(4))[0], 2 * (X + i), rtol=1e-6, atol=1e-6
        )


def test_evicted_by_the_worker(mortal_worker: Session) -> None:
    """A residual that the worker has no room for is recomputed, in scans too."""
    f = RemoteTorchFunction(mortal_worker, name="smooth")

    def many(g: Any) -> Any:
        return lambda x: jax.lax.scan(lambda c, _: (g(c), None), x, None, length=6)[
            0
        ].sum()

    # What six steps make of the smallest difference is large.
    with jax.enable_x64(True):
        x = jnp.linspace(0.1, 1.0, 4)
        expected = jax.grad(many(smooth))(x)
        np.testing.assert_allclose(jax.jit(jax.grad(many(f)))(x), expected, rtol=1e-9)


def test_of_an_earlier_life_of_the_worker(mortal_worker: Session) -> None:
    """A worker that was started again has no residuals, and a pullback recomputes."""
    pull = jax.vjp(RemoteTorchFunction(mortal_worker, name="smooth"), X)[1]
    kill(mortal_worker)
    np.testing.assert_allclose(
        pull(X)[0], jax.vjp(smooth, X)[1](X)[0], rtol=1e-5, atol=1e-6
    )
    del pull
    assert holds_nothing(mortal_worker)


def test_nothing_is_left_after_many_steps(remote: Remote, session: Session) -> None:
    """Neither residuals nor blocks grow with the number of steps."""
    step = jax.jit(jax.value_and_grad(lambda x: (remote("sine")(x) ** 2).sum()))
    for _ in range(50):
        value, gradient = step(X)
    jax.block_until_ready((value, gradient))
    assert holds_nothing(session)


def test_a_closed_session_ends_calls_in_compiled_code(torch_worker: Session) -> None:
    """A function that was compiled with a session says that it was closed."""
    with connect(torch_worker.address) as session:
        f = jax.jit(RemoteTorchFunction(session, name="sine"))
        f(X).block_until_ready()
    with pytest.raises(SessionClosed, match="the session is closed"):
        f(X).block_until_ready()
