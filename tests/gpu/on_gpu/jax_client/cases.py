"""A JAX program and a torch worker on one GPU.

Run by test_jax_client, in a process of its own that has no torch.
"""

import contextlib
import gc
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge_client import Session, connect
from bridge_client.jax import RemoteTorchFunction
from bridge_client.remote.gpu import Ordering
from bridge_wire.errors import DTypeError, OutOfMemory
from tests.conftest import ROOT, eventually
from tests.gpu.on_gpu import machine
from tests.gpu.on_gpu.machine import MEMORY, TORCH_ALLOCATORS, needs_cuda

SERVED = ("sine", "unchanged", "outer", "late", "linear", "largest", "far")
_SIZE = 1 << 20


@pytest.fixture(scope="session")
def torch_only() -> Iterator[Session]:
    """A torch worker on the GPU."""
    with machine.torch_worker(*SERVED) as session:
        RemoteTorchFunction(session, name="sine")(jnp.ones(3))
        yield session


@pytest.fixture(params=["local", "grpc"])
def session(request: pytest.FixtureRequest, torch_only: Session) -> Iterator[Session]:
    """A new session over each of the lanes, through which no byte of an array on the GPU goes by
    the host."""
    with connect(torch_only.address, lane=request.param) as session:
        yield session
        assert (
            session.stats()["bytes_through_host"] == session.stats()["fallbacks"] == 0
        )


def _close(seen: Any, expected: Any) -> None:
    np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-5)


@needs_cuda
def test_arrays_are_shared_on_the_gpu(session: Session) -> None:
    """And the default device is the GPU."""
    assert session.memory == MEMORY and jax.default_backend() == "gpu"


def test_values_and_gradients_are_right_under_jit(session: Session) -> None:
    """At several sizes, and operation by operation too."""
    f = RemoteTorchFunction(session, name="sine")
    for shape in ((), (1,), (3, 5, 7), (0, 4), (_SIZE,), (24 << 20,)):
        x = jax.random.uniform(jax.random.key(0), shape)
        for g in (f, jax.jit(f)):
            y = g(x)
            assert y.devices() == x.devices() and y.dtype == x.dtype
            _close(y, 2 * jnp.sin(x))
        _close(jax.jit(jax.grad(lambda x: f(x).sum()))(x), 2 * jnp.cos(x))


def test_derivatives_of_every_kind_are_right(session: Session) -> None:
    """Hessian, vmap of grad, jvp, scan, checkpoint."""
    f, x = RemoteTorchFunction(session, name="sine"), jnp.linspace(0.1, 1.0, 5)
    _close(jax.hessian(lambda x: f(x).sum())(x), jnp.diag(-2 * jnp.sin(x)))
    _close(
        jax.vmap(jax.grad(lambda x: f(x).sum()))(x[:, None]), 2 * jnp.cos(x)[:, None]
    )
    _close(jax.jvp(f, (x,), (jnp.ones_like(x),))[1], 2 * jnp.cos(x))
    _close(
        jax.lax.scan(lambda carry, _: (f(carry) / 2, None), x, None, length=3)[0],
        jnp.sin(jnp.sin(jnp.sin(x))),
    )
    _close(jax.grad(lambda x: jax.checkpoint(f)(x).sum())(x), 2 * jnp.cos(x))


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int8", "uint8", "int32", "float16", "bfloat16", "float32", "complex64"],
)
def test_every_dtype_arrives_as_it_is(dtype: str, session: Session) -> None:
    """Bit by bit."""
    x = jnp.arange(300).astype(dtype)
    assert jnp.array_equal(RemoteTorchFunction(session, name="unchanged")(x), x)


def test_integers_are_converted_on_the_gpu(session: Session) -> None:
    """Both ways, at once and under jit; what does not fit in 32 bits is an error, and the next
    call works."""
    x = jax.random.uniform(jax.random.key(3), (50, 7))
    for wrapped in (lambda f: f, jax.jit):
        places = wrapped(RemoteTorchFunction(session, name="largest"))(
            x, jnp.arange(-50, 0)
        )
        assert places.dtype == jnp.int32 and jnp.array_equal(places, x.argmax(-1))
        with pytest.raises(
            DTypeError, match="values from 1099511627776 to 1099511627776"
        ):
            jax.block_until_ready(wrapped(RemoteTorchFunction(session, name="far"))(x))


@needs_cuda
def test_calls_pass_on_what_they_have_made(session: Session) -> None:
    """Without a copy; and it is never donated."""
    f, x = RemoteTorchFunction(session, name="sine"), jnp.linspace(0.0, 1.0, _SIZE)
    y = f(x)
    before = session.stats()["bytes_copied"]
    _close(f(y), 2 * jnp.sin(2 * jnp.sin(x)))
    assert session.stats()["bytes_copied"] - before == y.nbytes
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _close(jax.jit(lambda y: y + 1, donate_argnums=0)(y), 2 * jnp.sin(x) + 1)
    _close(f(x), 2 * jnp.sin(x))


@needs_cuda
def test_memory_is_not_used_again_before_xla_has_read_it(session: Session) -> None:
    """An array dies while a computation is still about to read it, and its memory is that of the
    next results."""
    from tests.gpu.on_gpu.jax_models import late

    f, slow, x = (
        RemoteTorchFunction(session, name="sine"),
        jax.jit(late),
        jnp.ones(_SIZE),
    )
    slow(x).block_until_ready()
    for _ in range(3):
        made = slow(f(x))
        for _ in range(4):
            f(jnp.zeros(_SIZE))
        _close(made, 2 * jnp.sin(x) + 1)


def test_many_calls_leave_nothing(session: Session) -> None:
    """Neither blocks nor residuals, at once and under jit, and slabs do not grow."""
    f, x = RemoteTorchFunction(session, name="sine"), jnp.linspace(0.0, 1.0, 1000)
    loss = lambda x: f(x).sum()  # noqa: E731
    steps = [f, jax.grad(loss), jax.jit(jax.grad(loss))]
    sizes = []
    for _ in range(100):
        for step in steps:
            step(x).block_until_ready()
        sizes.append(session.stats()["slab_bytes"])
    assert sizes[-1] == sizes[10]
    assert eventually(lambda: gc.collect() >= 0 and session.stats()["residuals"] == 0)


def test_a_module_trains(session: Session) -> None:
    """With its parameters as JAX arrays on the GPU."""
    g = RemoteTorchFunction(session, name="linear")
    x = jax.random.normal(jax.random.key(1), (64, 4))
    wanted = x @ jnp.arange(12.0).reshape(4, 3)

    def loss(params: Any) -> Any:
        return ((g.apply(params, x) - wanted) ** 2).mean()

    step = jax.jit(
        lambda params: jax.tree.map(
            lambda p, d: p - 0.2 * d, params, jax.grad(loss)(params)
        )
    )
    params = first = g.params
    for _ in range(100):
        params = step(params)
    assert loss(params) < loss(first) / 10


@needs_cuda
def test_the_client_reads_what_the_worker_writes_late(torch_only: Session) -> None:
    """XLA's stream waits for the worker's work."""
    with connect(torch_only.address) as session:
        f = jax.jit(lambda x: RemoteTorchFunction(session, name="late")(x) * 1)
        x = jnp.ones(_SIZE)
        f(x).block_until_ready()
        for _ in range(3):
            assert jnp.array_equal(f(x), x + 1)


@needs_cuda
def test_unless_its_stream_waits_the_workers_result_is_missed(
    torch_only: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    with connect(torch_only.address) as session:
        f = jax.jit(lambda x: RemoteTorchFunction(session, name="late")(x) * 1)
        f(jnp.full(_SIZE, 5.0)).block_until_ready()
        monkeypatch.setattr(Ordering, "end", lambda self, stream, outputs=(): None)
        assert not jnp.array_equal(f(jnp.ones(_SIZE)), jnp.full(_SIZE, 2.0))


@needs_cuda
def test_the_worker_reads_what_the_client_writes_late(torch_only: Session) -> None:
    """What XLA has still to compute comes first."""
    from tests.gpu.on_gpu.jax_models import late

    with connect(torch_only.address) as session:
        f = jax.jit(lambda x: RemoteTorchFunction(session, name="sine")(late(x)))
        for value in (0.0, 1.0, 2.0):
            _close(f(jnp.full(_SIZE, value)), 2 * jnp.sin(jnp.full(_SIZE, value + 1)))


@needs_cuda
def test_no_room_for_torch_is_out_of_memory(torch_only: Session) -> None:
    """A typed error, and the worker serves on."""
    with connect(torch_only.address) as session:
        with pytest.raises(OutOfMemory):
            RemoteTorchFunction(session, name="outer")(
                jnp.ones(1 << 17)
            ).block_until_ready()  # 64 GiB
        _close(
            RemoteTorchFunction(session, name="sine")(jnp.ones(3)),
            2 * jnp.sin(jnp.ones(3)),
        )


_BREAKING = """
import contextlib
import os
import jax.numpy as jnp
import numpy as np
from bridge_client.jax import RemoteTorchFunction
from bridge_wire.errors import BridgeError, WorkerDied
from tests.conftest import eventually
from tests.gpu.on_gpu import machine

with machine.torch_worker("broken", "sine") as session:
    first, x = machine.pid_of(session), jnp.ones(10)
    sine = RemoteTorchFunction(session, name="sine")
    np.testing.assert_allclose(sine(x), 2 * jnp.sin(x), rtol=1e-5, atol=1e-6)
    said = ""
    for _ in range(3):
        try:
            RemoteTorchFunction(session, name="broken")(x)
        except BridgeError as error:
            said = str(error)
            break
    assert "CUDA" in said or "assert" in said, said
    assert eventually(lambda: session._host.has_ended())
    assert RemoteTorchFunction(session, name="sine").session is session
    with contextlib.suppress(WorkerDied):  # says that outputs of the broken calls are lost
        RemoteTorchFunction(session, name="sine")(x)
    RemoteTorchFunction(session, name="sine")(x)
    assert machine.pid_of(session) != first
    print("right", flush=True)
    session._host.close()
    # A stream here may wait for the broken worker forever, and JAX, at its end, for that stream.
    os._exit(0)
"""


@needs_cuda
@pytest.mark.gpu(limit_s=130)
def test_a_context_that_breaks_ends_the_worker_and_the_next_call_starts_another() -> (
    None
):
    """The error says what CUDA said.

    In a process of its own: a stream there may wait for the broken one forever.
    """
    done = subprocess.run(
        [sys.executable, "-c", _BREAKING],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "right\n", done.stderr


@needs_cuda
@pytest.mark.parametrize(
    "settings", TORCH_ALLOCATORS, ids=lambda settings: next(iter(settings.values()))
)
def test_every_allocator_of_a_torch_worker_works(settings: dict[str, str]) -> None:
    """By one copy on the device."""
    with machine.torch_worker("sine", env=settings) as session:
        x = jnp.linspace(0, 1, _SIZE)
        _close(
            jax.grad(lambda x: RemoteTorchFunction(session)(x).sum())(x), 2 * jnp.cos(x)
        )
        assert session.memory == MEMORY and session.stats()["bytes_through_host"] == 0
