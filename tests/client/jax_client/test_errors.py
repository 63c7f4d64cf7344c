"""Errors in compiled code arrive with their types, and a worker that dies is an error at once."""

import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from bridge_client import Session, connect
from bridge_client.jax import RemoteTorchFunction
from bridge_wire.errors import (
    CallTimeout,
    RemoteModelError,
    SpecError,
    WorkerDied,
    WorkerUnavailable,
)
from tests.client.jax_client.conftest import Remote, holds_nothing, kill
from tests.workers import Background, Gate, run_program

X = jnp.linspace(0.1, 1.0, 4)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def test_what_a_model_raises_comes_out_of_compiled_code(
    remote: Remote, session: Session
) -> None:
    """The first time as later, from jit, grad, scan and vmap: as the model's error, with the
    remote traceback."""
    f = remote("raises_below_zero")
    for transform in (
        lambda x: f(x),
        jax.grad(lambda x: f(x).sum()),
        lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
        lambda x: f(jnp.sin(x)) + 1,
    ):
        compiled = jax.jit(transform)
        for good in (False, True, False):
            if good:
                assert np.isfinite(compiled(X)).all()
                continue
            with pytest.raises(
                RemoteModelError, match="ValueError: there is a negative value"
            ) as raised:
                jax.block_until_ready(compiled(-X))
            assert isinstance(raised.value, JaxRuntimeError)
            assert raised.value.remote_type == "builtins.ValueError"
            assert "in raises_below_zero" in raised.value.remote_traceback
    with pytest.raises(RemoteModelError, match="there is a negative value"):
        f(-X)
    del raised
    assert holds_nothing(session)


def test_a_model_that_returns_nothing_on_zeros(remote: Remote) -> None:
    """A result that was empty when the call was prepared is looked at, though XLA has no use for
    empty arrays."""
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(
            SpecError,
            match=r"\['found'\] of model 'growing' is now float32\[4\], and was float32\[0\]",
        ):
            jax.block_until_ready(wrap(remote("growing"))(X))


def test_what_is_wrong_with_a_call_is_said_while_it_is_traced(
    remote: Remote, session: Session
) -> None:
    """Before any data moves, jit raises what Prepare says."""
    with pytest.raises(
        RemoteModelError,
        match=r"no arrays of shape \(4,\) here.*\n.*args\[0\]: float32\[4\]",
    ):
        jax.jit(remote("refusing"))(X)
    assert session.stats()["calls"] == 0


def test_an_error_of_somebody_else_stays_what_it_is() -> None:
    """The errors of other callbacks are none of ours."""

    def fail(x: np.ndarray) -> np.ndarray:
        raise RuntimeError("torch-jax-bridge error #0#")

    with pytest.raises(JaxRuntimeError) as raised:
        jax.jit(lambda x: jax.pure_callback(fail, x, x))(X).block_until_ready()
    assert type(raised.value) is JaxRuntimeError


def test_a_worker_that_dies_during_a_call_in_compiled_code(
    mortal_worker: Session, tmp_path: Path
) -> None:
    """The call ends with WorkerDied, and the next one has a new worker."""
    gate = Gate(tmp_path / "gate")
    f = jax.jit(
        lambda x: RemoteTorchFunction(mortal_worker, name="gated")(x, str(gate))
    )
    call = Background(lambda: f(X).block_until_ready())
    gate.wait_for_a_caller()
    kill(mortal_worker)
    with pytest.raises(WorkerDied, match="the next call reconnects"):
        call.result()
    gate.open()
    np.testing.assert_array_equal(f(X), 2 * X)


def test_a_worker_that_nobody_starts_again(mortal_worker: Session) -> None:
    """A call of compiled code raises at once, each time."""
    with connect(mortal_worker.address, retry_s=0) as session:
        f = jax.jit(
            jax.grad(lambda x: RemoteTorchFunction(session, name="sine")(x).sum())
        )
        jax.block_until_ready(f(X))
        kill(mortal_worker)
        for _ in range(2):
            with pytest.raises(WorkerUnavailable):
                jax.block_until_ready(f(X))
    RemoteTorchFunction(mortal_worker, name="sine")(X)


def test_a_call_that_takes_too_long(torch_worker: Session, gate: Gate) -> None:
    """timeout_s holds in compiled code too; the memory of such a call comes back when the worker
    has let go of it."""
    with connect(torch_worker.address) as session:
        # Traced without a limit.
        jax.eval_shape(
            lambda x: RemoteTorchFunction(session, name="gated")(x, str(gate)), X
        )
        f = RemoteTorchFunction(session, name="gated", timeout_s=1.0)
        with pytest.raises(CallTimeout, match=r"no answer within 1\.0 s"):
            jax.jit(lambda x: f(x, str(gate)))(X).block_until_ready()
        gate.open()
        np.testing.assert_array_equal(jax.jit(lambda x: f(x, str(gate)))(X), 2 * X)
        assert holds_nothing(session)


def test_a_call_in_compiled_code_can_be_interrupted(
    remote: Remote, session: Session, gate: Gate, ctrl_c: None
) -> None:
    """Ctrl-C ends it with KeyboardInterrupt, the first time as later, and no block is lost."""
    f = jax.jit(lambda x: remote("gated")(x, str(gate)))

    def interrupt() -> None:
        gate.wait_for_a_caller()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    for _ in range(2):
        gate.shut()
        interrupting = Background(interrupt)
        with pytest.raises(KeyboardInterrupt):
            jax.block_until_ready(f(X))
        interrupting.result()
    gate.open()
    np.testing.assert_array_equal(f(X), 2 * X)
    assert holds_nothing(session)


def test_a_program_may_end_while_calls_are_under_way(torch_worker: Session) -> None:
    """What was dispatched and not waited for ends in peace, before its session is closed."""
    program = """
        import sys, jax
        from jax.sharding import PartitionSpec as P
        from bridge_client import connect
        from bridge_client.jax import RemoteTorchFunction
        f = RemoteTorchFunction(connect(sys.argv[1]), name="smooth")
        scanned = lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=100)[0]
        mesh = jax.make_mesh((4,), ("data",))
        x = jax.device_put(jax.numpy.ones(4), jax.NamedSharding(mesh, P("data")))
        jax.jit(jax.shard_map(scanned, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(x)
    """
    four = "--xla_force_host_platform_device_count=4"
    ended = run_program(program, torch_worker.address, venv=".venv-jax", XLA_FLAGS=four)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
