"""RemoteTorchFunction with arrays on the worker's GPU, which is none."""

import ctypes
import gc
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge_client import Session, spawn
from bridge_client.jax import RemoteTorchFunction, callbacks, gpu, memory, runs
from bridge_wire.dtypes import BY_NAME
from bridge_wire.memory import cuda
from bridge_wire.memory.dlpack import DeviceExporter
from bridge_wire.specs import Spec
from tests.conftest import ROOT, eventually, python_of
from tests.gpu.faking import installed
from tests.gpu.posing import jax_on_gpu

_MODELS = {
    name: f"tests.gpu.torch_models:{name}"
    for name in ("scaled", "picked", "large", "network")
}
X = jnp.linspace(0.1, 2.0, 6).reshape(2, 3)
Y = jnp.linspace(1.0, 3.0, 6).reshape(2, 3)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, way: str) -> Iterator[Any]:
    with installed(tmp_path_factory.mktemp("machine")) as fake:
        yield fake


@pytest.fixture(scope="module")
def session(machine: Any) -> Iterator[Session]:
    with spawn(torch_model=_MODELS, python=python_of(".venv-torch"), cwd=ROOT) as made:
        made.pool.lease(1)  # its first slab has a descriptor
        assert made.gpu_pool() is not None  # and by words, a thread watches its lane
        yield made


@pytest.fixture
def stream(machine: Any) -> Iterator[int]:
    with jax_on_gpu() as made:
        yield made
    gc.collect()


@pytest.fixture
def scaled(session: Session) -> RemoteTorchFunction:
    return RemoteTorchFunction(session, name="scaled")


def _same(x: Any, y: Any) -> Any:
    return jnp.sin(x * y)


def _staged(session: Session) -> int:
    return session.stats()["bytes_through_host"]


def test_arrays_on_the_gpu_stay_there(
    scaled: RemoteTorchFunction, session: Session, stream: int
) -> None:
    """Inputs are copied into shared memory once, and outputs lie there."""
    before = session.stats()
    made = scaled(X, Y)
    np.testing.assert_allclose(made, _same(X, Y), rtol=1e-6, atol=1e-6)
    pool = session.gpu_pool()
    assert pool is not None and pool.address_of(
        made.unsafe_buffer_pointer(), made.nbytes
    )
    after = session.stats()
    assert after["bytes_copied"] - before["bytes_copied"] == 3 * X.nbytes
    assert after["bytes_through_host"] == before["bytes_through_host"]


def test_what_a_call_has_made_is_passed_on_as_it_lies(
    scaled: RemoteTorchFunction, session: Session, stream: int
) -> None:
    """The output of one call is the input of the next without a copy."""
    made = scaled(X, Y)
    before = session.stats()["bytes_copied"]
    np.testing.assert_allclose(
        scaled(made, made), _same(made, made), rtol=1e-6, atol=1e-6
    )
    assert session.stats()["bytes_copied"] - before == made.nbytes


def test_what_a_call_has_made_is_not_donated_where_xla_would_end_the_process(
    scaled: RemoteTorchFunction,
    session: Session,
    stream: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """XLA copies it instead, or raises.

    Since jax 0.11 it writes into the block, and nobody refers to that.
    """
    referred: list[Any] = []
    reference_to = gpu.OnGpu.reference_to
    monkeypatch.setattr(
        gpu.OnGpu,
        "reference_to",
        lambda self, array: referred.append(array.shape) or reference_to(self, array),
    )
    for ends_process in (True, False):
        monkeypatch.setattr(gpu, "DONATION_ENDS_PROCESS", ends_process)
        del referred[:]
        scaled(X, Y)
        assert referred == [X.shape] * ends_process
    monkeypatch.setattr(gpu, "DONATION_ENDS_PROCESS", True)
    made = scaled(X, Y)
    np.testing.assert_allclose(
        jax.jit(lambda x: x + 1, donate_argnums=0)(made),
        _same(X, Y) + 1,
        rtol=1e-6,
        atol=1e-6,
    )
    np.testing.assert_allclose(made, _same(X, Y), rtol=1e-6, atol=1e-6)
    blocks = session.stats()["blocks"]
    del made
    assert eventually(lambda: gc.collect() >= 0 and session.stats()["blocks"] < blocks)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_a_residual_aliases_is_not_donated(
    is_compiled: bool,
    scaled: RemoteTorchFunction,
    session: Session,
    stream: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """XLA would write into an array over a block, and the pullback would read that: the memory is
    referred to as long as the residual is kept, or in compiled code, where nobody can, copied.
    """

    class Reference:
        """To an array's memory."""

    references: list[Any] = []

    def reference_to(self: gpu.OnGpu, array: jax.Array) -> Reference:
        made = Reference()
        references.append(weakref.ref(made))
        return made

    for module in (gpu, memory):
        monkeypatch.setattr(module, "DONATION_ENDS_PROCESS", False)
    made = scaled(X, Y)
    monkeypatch.setattr(gpu.OnGpu, "reference_to", reference_to)
    before = session.stats()["bytes_copied"]
    if is_compiled:
        jax.jit(jax.grad(lambda x, y: scaled(x, y).sum(), (0, 1)))(made, made)
        assert (
            session.stats()["bytes_copied"] - before >= 5 * made.nbytes
            and references == []
        )
        return
    value, pull_back = jax.vjp(scaled, made, made)
    assert len(references) == 2 and all(
        reference() is not None for reference in references
    )
    pull_back(value)
    del value, pull_back
    assert eventually(
        lambda: (
            gc.collect() >= 0 and all(reference() is None for reference in references)
        )
    )


def test_without_a_backend_for_the_host_arrays_of_every_type_stay_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with JAX_PLATFORMS=cuda, where nothing could be tried on the host."""
    local_devices = jax.local_devices

    def without_cpu(*arguments: Any, backend: str | None = None, **options: Any) -> Any:
        if backend == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return local_devices(*arguments, backend=backend, **options)

    cached = (memory.has_cpu, memory._host, memory.is_importable)
    for function in cached:
        function.cache_clear()
    try:
        monkeypatch.setattr(jax, "local_devices", without_cpu)
        assert all(memory.is_importable(dtype) for dtype in memory.DTYPES)
        assert memory._host() is None
    finally:
        for function in cached:
            function.cache_clear()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_derivatives(
    is_compiled: bool, scaled: RemoteTorchFunction, session: Session, stream: int
) -> None:
    """Gradients, forward-mode derivatives and batches, at once and compiled, with nothing
    through the host."""
    wrapped = jax.jit if is_compiled else lambda f: f
    before = _staged(session)
    loss = lambda f: lambda x, y: (f(x, y) ** 2).sum()  # noqa: E731
    for made, expected in zip(
        wrapped(jax.grad(loss(scaled), (0, 1)))(X, Y),
        jax.grad(loss(_same), (0, 1))(X, Y),
        strict=True,
    ):
        np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)
    pushed = wrapped(lambda x, y: jax.jvp(scaled, (x, y), (y, x)))(X, Y)
    np.testing.assert_allclose(
        pushed, jax.jvp(_same, (X, Y), (Y, X)), rtol=1e-5, atol=1e-6
    )
    batched = wrapped(jax.vmap(jax.grad(loss(scaled))))(X, Y)
    np.testing.assert_allclose(
        batched, jax.vmap(jax.grad(loss(_same)))(X, Y), rtol=1e-5, atol=1e-6
    )
    assert _staged(session) == before


def test_residuals_are_pulled_back(
    scaled: RemoteTorchFunction, session: Session, stream: int
) -> None:
    """A handle finds its residual from within compiled code and without."""
    calls = session.stats()["calls"]
    made, pull = jax.vjp(scaled, X, Y)
    np.testing.assert_allclose(
        pull(made)[0], jax.vjp(_same, X, Y)[1](made)[0], rtol=1e-5, atol=1e-6
    )
    jax.jit(lambda x, y: jax.vjp(scaled, x, y)[1](x))(X, Y)
    jax.jit(pull)(made)
    assert session.stats()["calls"] - calls == 5
    del made, pull
    assert eventually(lambda: gc.collect() >= 0 and session.stats()["residuals"] == 0)


def test_a_loop_in_compiled_code(
    scaled: RemoteTorchFunction, session: Session, stream: int
) -> None:
    """Handles are stacked by a scan and found again by its transpose."""
    many = lambda f: lambda x: jax.lax.scan(lambda c, y: (f(c, y), None), x, Y)[0].sum()  # noqa: E731
    made = jax.jit(jax.grad(many(scaled)))(X[0])
    np.testing.assert_allclose(made, jax.grad(many(_same))(X[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_numbers_and_integers(is_compiled: bool, session: Session, stream: int) -> None:
    """Numbers are read by the host; 32-bit integers are widened on the GPU; 64-bit ones are
    checked and narrowed."""
    wrapped = jax.jit if is_compiled else lambda f: f
    scaled, picked = (
        RemoteTorchFunction(session, name=name) for name in ("scaled", "picked")
    )
    np.testing.assert_allclose(
        wrapped(lambda x, y: scaled(x, y, by=3.0))(X, Y),
        3 * np.asarray(_same(X, Y)),
        rtol=1e-6,
        atol=1e-6,
    )
    before = _staged(session)
    rows, columns = wrapped(picked)(X, jnp.array([1, -2, 1]))
    np.testing.assert_allclose(rows, 2 * X[jnp.array([1, -2, 1])], rtol=1e-6, atol=1e-6)
    assert columns.dtype == jnp.int32 and list(columns) == [2, 2, 2]
    assert _staged(session) == before
    with pytest.raises(Exception, match="which int32 cannot hold"):
        jax.block_until_ready(wrapped(RemoteTorchFunction(session, name="large"))(X))
    np.testing.assert_allclose(wrapped(scaled)(X, Y), _same(X, Y), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_parameters_on_the_gpu(
    is_compiled: bool, session: Session, stream: int
) -> None:
    """A training step of a module whose parameters jax has put there."""
    network = RemoteTorchFunction(session, name="network")
    params = jax.device_put(network.params)
    loss = lambda apply: lambda params: (apply(params, X) ** 2).sum()  # noqa: E731
    expected = jax.grad(
        loss(lambda params, x: x @ params["layer.weight"].T + params["layer.bias"])
    )(params)
    wrapped = jax.jit if is_compiled else lambda f: f
    made = wrapped(jax.grad(loss(network.apply)))(params)
    for name, value in expected.items():
        np.testing.assert_allclose(made[name], value, rtol=1e-5, atol=1e-6)


def test_memory_is_given_back(
    scaled: RemoteTorchFunction, session: Session, stream: int
) -> None:
    """When the arrays are gone there are no leased blocks, and slabs do not grow call by call."""
    gradient = jax.jit(jax.grad(lambda x, y: scaled(x, y).sum()))
    gc.collect()
    before = session.stats()
    for _ in range(20):
        scaled(X, Y)
        gradient(X, Y)
    gc.collect()
    after = session.stats()
    assert (
        after["slab_bytes"] == before["slab_bytes"]
        and after["blocks"] <= before["blocks"]
    )


class _Buffer(DeviceExporter):
    """Memory on the GPU as XLA shows it to a callback."""

    def __init__(self, pointer: int) -> None:
        super().__init__(
            pointer,
            Spec(BY_NAME["float32"], X.shape),
            None,
            (2, 0),
            lambda stream: None,
        )

    @property
    def value(self) -> Any:
        return np.ctypeslib.as_array(
            (ctypes.c_float * X.size).from_address(self.pointer)
        ).reshape(X.shape)


def test_a_callback_waits_for_nothing(
    scaled: RemoteTorchFunction,
    session: Session,
    machine: Any,
    stream: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inputs are read when XLA's stream comes to it, and outputs written when the worker's turn
    is over."""
    scaled(X, Y)
    (call,) = scaled._calls.values()
    found: list[Any] = []
    monkeypatch.setattr(
        callbacks,
        "buffer_callback",
        lambda called, *_, **__: found.append(called) or (lambda *xs: xs[:1]),
    )
    monkeypatch.setattr(
        callbacks,
        "_deliver",
        inspect.getclosurevars(callbacks._deliver).nonlocals["deliver"],
    )
    callbacks.call_back_on_gpu(runs.Run(call.program), X, Y)
    pool = session.gpu_pool()
    assert pool is not None
    blocks = [pool.device.allocate(X.nbytes) for _ in range(3)]
    x, y, out = map(_Buffer, blocks)
    y.value[:], out.value[:] = Y, 0
    held = machine.hold(stream)
    pool.device.copy(x.pointer, X.unsafe_buffer_pointer(), X.nbytes, stream)
    run = session.run

    def run_later(*arguments: Any, **options: Any) -> Any:
        y.value[:] = Y + 1  # nothing has been read yet
        held.set()  # the worker, which is on the host, waits for the inputs
        return run(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(session, "run", run_later)
        patch.setattr(cuda.Device, "synchronize", None)
        found[0](None, [out], x, y)
    pool.device.copy(x.pointer, Y.unsafe_buffer_pointer(), Y.nbytes, stream)
    pool.device.synchronize(stream)
    np.testing.assert_allclose(out.value, _same(X, Y + 1), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(x.value, Y)
    for block in blocks:
        pool.device.free(block)


def test_arrays_on_another_gpu_travel_through_the_host(
    scaled: RemoteTorchFunction,
    session: Session,
    stream: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At once, within compiled code, and where jax has no callbacks on buffers."""
    for module in (gpu, runs):
        monkeypatch.setattr(module, "ordinal_of", lambda array: 1)
    before = _staged(session)
    np.testing.assert_allclose(scaled(X, Y), _same(X, Y), rtol=1e-6, atol=1e-6)
    assert _staged(session) - before == 3 * X.nbytes
    own = gpu.gpu_of_callback
    monkeypatch.setattr(
        callbacks, "gpu_of_callback", lambda *args: own(*args)._replace(pool=None)
    )
    np.testing.assert_allclose(jax.jit(scaled)(X, Y), _same(X, Y), rtol=1e-6, atol=1e-6)
    assert _staged(session) - before == 6 * X.nbytes
    loss = lambda f: lambda x: f(x, Y).sum()  # noqa: E731
    np.testing.assert_allclose(
        jax.jit(jax.grad(loss(scaled)))(X),
        jax.grad(loss(_same))(X),
        rtol=1e-6,
        atol=1e-6,
    )
    monkeypatch.setattr(session, "gpu_pool", lambda: None)
    before = _staged(session)
    np.testing.assert_allclose(
        jax.jit(lambda x, y: scaled(x, y))(X, Y), _same(X, Y), rtol=1e-6, atol=1e-6
    )
    assert _staged(session) - before == 3 * X.nbytes
