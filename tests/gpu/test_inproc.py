"""Models of this process on its GPU, which is none."""

import gc
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bridge_client.inproc import host
from bridge_client.inproc.devices import torch_device_of
from bridge_client.inproc.gpu import NearTurn
from bridge_client.inproc.session import InprocSession
from bridge_client.jax import RemoteTorchFunction
from bridge_client.programs import Program
from bridge_server.jax_runtime import JaxRuntime
from bridge_server.jax_runtime.meshes import Layout
from bridge_server.torch_runtime import TorchRuntime
from bridge_wire import specs, trees
from bridge_wire.classes import Classes
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import ResidualGone, TargetError
from bridge_wire.memory.cuda import device_of, gpus
from bridge_wire.memory.cuda_memory import end_what_is_left
from bridge_wire.memory.pool import Block
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec
from tests.gpu.posing import jax_on_gpu
from tests.gpu.posing_torch import pose

X = np.linspace(0.1, 2.0, 6, dtype=np.float32)
_SPEC = Spec(BY_NAME["float32"], X.shape)


@pytest.fixture(autouse=True)
def on_gpu(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Both runtimes take the fake GPU for theirs."""
    for runtime in (JaxRuntime, TorchRuntime):
        pose(monkeypatch.setattr, runtime)
    yield fake_cuda
    gc.collect()


@pytest.fixture(params=["jax", "torch"])
def session(request: pytest.FixtureRequest) -> Iterator[InprocSession]:
    """A session with a model of either framework."""
    models = {
        "jax": {"jax_model": lambda x: jnp.sin(x) * x},
        "torch": {"torch_model": lambda x: torch.sin(x) * x},
    }
    with host(**models[request.param]) as made:
        yield made


@pytest.fixture
def stream(session: InprocSession) -> Iterator[int]:
    """A stream of the caller's."""
    device = device_of(gpus()[0].uuid)
    made = device.new_stream()
    assert session.gpu_pool() is not None
    yield made
    device.synchronize(made)
    device.destroy_stream(made)


def _call(session: InprocSession) -> Program:
    arguments = trees.encode(
        ((0.0,), {}), lambda leaf: isinstance(leaf, float), Classes()
    )[0]
    name = next(iter(session.models))
    return session.prepare_call(
        pb.Call(model=name, arguments=arguments, inputs=[specs.encode(_SPEC)])
    )


def _block(session: InprocSession, stream: int, value: np.ndarray) -> Block:
    pool = session.gpu_pool()
    assert pool is not None
    block = pool.lease(value.nbytes, stream)
    pool.device.copy(block.pointer, value.ctypes.data, value.nbytes, stream)
    return block


def _value(session: InprocSession, stream: int, block: Block) -> np.ndarray:
    pool = session.gpu_pool()
    assert pool is not None
    found = np.empty_like(X)
    pool.device.copy(found.ctypes.data, block.pointer, found.nbytes, stream)
    pool.device.synchronize(stream)
    return found


def test_a_run_comes_in_the_order_of_the_callers_stream(
    session: InprocSession, stream: int, on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads what was put there before it, late as it may be, and its outputs, late too, are
    there for what comes after it.
    """
    program, begin = _call(session), NearTurn.begin
    monkeypatch.setattr(
        NearTurn, "begin", lambda self: (begin(self), on_gpu.sleep(self.stream, 0.05))
    )
    block = _block(session, stream, np.zeros_like(X))
    on_gpu.sleep(stream, 0.05)
    _overwrite(session, stream, block)
    (made,) = session.run(program, [block], stream=stream)
    np.testing.assert_allclose(
        _value(session, stream, made), np.sin(X) * X, rtol=1e-6, atol=1e-6
    )
    assert session.stats()["bytes_through_host"] == 0


def test_without_the_callers_event_its_write_is_missed(
    session: InprocSession, stream: int, on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    program, block = _call(session), _block(session, stream, np.zeros_like(X))
    device_of(gpus()[0].uuid).synchronize(stream)
    monkeypatch.setattr(NearTurn, "follow", lambda self, stream: None)
    held = on_gpu.hold(stream)
    _overwrite(session, stream, block)
    (made,) = session.run(program, [block], stream=stream)
    held.set()
    assert not _value(session, stream, made).any()


def test_without_the_models_event_its_result_is_missed(
    session: InprocSession, stream: int, on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the other direction, too."""
    program, begin, held = _call(session), NearTurn.begin, []
    monkeypatch.setattr(
        NearTurn,
        "begin",
        lambda self: (begin(self), held.append(on_gpu.hold(self.stream))),
    )
    monkeypatch.setattr(NearTurn, "precede", lambda self, stream: None)
    (made,) = session.run(program, [_block(session, stream, X)], stream=stream)
    assert not np.allclose(_value(session, stream, made), np.sin(X) * X)
    held[0].set()


def _overwrite(session: InprocSession, stream: int, block: Block) -> None:
    pool = session.gpu_pool()
    assert pool is not None
    pool.device.copy(block.pointer, X.ctypes.data, X.nbytes, stream)


def test_a_pullback_comes_in_order_too(session: InprocSession, stream: int) -> None:
    """Also on another stream than the run that kept the residual, whose inputs it may read."""
    keeping = _call(session).keeping((0,))
    blocks, residual = session.run_keeping(
        keeping, [_block(session, stream, X)], stream=stream
    )
    pool = session.gpu_pool()
    assert pool is not None
    other = pool.device.new_stream()
    pullback = keeping.pullback((0,), (0,))
    ones = _block(session, other, np.ones_like(X))
    (made,) = session.run_pullback(pullback, residual, [ones], stream=other)
    np.testing.assert_allclose(
        _value(session, other, made), np.cos(X) * X + np.sin(X), rtol=1e-6, atol=1e-6
    )
    session.drop_residual(residual)
    with pytest.raises(ResidualGone):
        session.run_pullback(pullback, residual, [ones], stream=other)
    del blocks, made
    pool.device.destroy_stream(other)


def test_memory_in_no_slab_is_read_where_it_lies(
    session: InprocSession, stream: int
) -> None:
    """If it is aligned; and inputs may also be on the host."""
    pool = session.gpu_pool()
    assert pool is not None
    own = pool.device.allocate(X.nbytes)
    pool.device.copy(own, X.ctypes.data, X.nbytes, stream)
    address = pool.address_of(own, X.nbytes)
    assert address is not None and pool.address_of(own + 8, 8) is None

    class Lying:
        pass

    lying: Any = Lying()
    lying.address = address
    (made,) = session.run(_call(session), [lying], stream=stream)
    np.testing.assert_allclose(
        _value(session, stream, made), np.sin(X) * X, rtol=1e-6, atol=1e-6
    )
    on_host = session.pool.lease(X.nbytes)
    on_host.buffer[:] = X.tobytes()
    (made,) = session.run(_call(session), [on_host], stream=stream)
    np.testing.assert_allclose(
        _value(session, stream, made), np.sin(X) * X, rtol=1e-6, atol=1e-6
    )
    pool.device.free(own)


def test_everything_is_given_back(
    session: InprocSession, stream: int, on_gpu: Any
) -> None:
    """Slabs, events and streams go with the session, or when it is forgotten."""
    for _ in range(3):
        session.run(_call(session), [_block(session, stream, X)], stream=stream)
    assert on_gpu.held()["event"] == 2 and on_gpu.held()["bytes"]
    session.close()
    gc.collect()
    assert not on_gpu.held()["bytes"] and on_gpu.held()["stream"] == 1


def test_arrays_of_jax_and_a_torch_module() -> None:
    """A module of this process is called and differentiated with arrays on the GPU, at once and
    in compiled code."""
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    f = RemoteTorchFunction(module)
    x = jnp.asarray(X).reshape(2, 3)
    weight, bias = (
        jnp.asarray(parameter.detach().numpy()) for parameter in module.parameters()
    )
    loss = lambda f: lambda x: (f(x) ** 2).sum()  # noqa: E731
    expected = lambda x: x @ weight.T + bias  # noqa: E731
    with jax_on_gpu():
        for wrapped in (lambda f: f, jax.jit):
            np.testing.assert_allclose(wrapped(f)(x), expected(x), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                wrapped(jax.grad(loss(f)))(x),
                jax.grad(loss(expected))(x),
                rtol=1e-5,
                atol=1e-6,
            )
            batched = wrapped(jax.vmap(jax.grad(loss(f))))(x)
            np.testing.assert_allclose(
                batched, jax.grad(loss(expected))(x), rtol=1e-5, atol=1e-6
            )
        stats = f.session.stats()
        assert stats["bytes_through_host"] == 0 and f.session.gpu_pool() is not None
        gc.collect()
    f.session.close()


def test_models_on_the_host_and_arrays_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They go through the host, are counted, and the log says why, once."""
    monkeypatch.setattr(TorchRuntime, "gpu", lambda self: None)
    f = RemoteTorchFunction(torch.sin)
    with jax_on_gpu():
        for wrapped in (lambda f: f, jax.jit):
            np.testing.assert_allclose(
                wrapped(f)(jnp.asarray(X)), np.sin(X), rtol=1e-6, atol=1e-6
            )
    assert f.session.stats()["bytes_through_host"] == 4 * X.nbytes
    assert [
        record.message
        for record in caplog.records
        if "through the host" in record.message
    ] == [
        "tensors on a GPU travel through the host, since the models run on no GPU; move them to a"
        " GPU, or make a GPU jax's default device"
    ]
    f.session.close()


class _OnGpu(torch.nn.Module):
    """A module that says that it is on another device."""

    def __init__(self, *devices: str) -> None:
        super().__init__()
        self._devices = devices

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        for device in self._devices:
            yield type("Parameter", (), {"device": torch.device(device)})


def test_torch_models_run_where_their_tensors_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And those without any where jax's arrays are by default; not on several devices."""
    assert (
        torch_device_of(
            [torch.nn.Linear(1, 1), (torch.sin, {"w": torch.zeros(1)}), torch.sin]
        )
        == "cpu"
    )
    assert torch_device_of([_OnGpu("cuda:1"), torch.sin]) == "cuda:1"
    with pytest.raises(TargetError, match="on cpu and cuda:0; put them on one device"):
        torch_device_of([_OnGpu("cuda:0"), torch.nn.Linear(1, 1)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_device_of([torch.sin]) == "cpu"
    monkeypatch.setattr(Layout, "ordinal", 1)
    assert torch_device_of([torch.sin]) == "cuda:1"
    assert torch_device_of([torch.nn.Linear(1, 1)]) == "cpu"


def test_a_forgotten_session_gives_everything_back(on_gpu: Any) -> None:
    """When something else is allocated or freed: a finalizer must not wait for the GPU."""
    session = host(jax_model=lambda x: jnp.sin(x) * x)
    stream = device_of(gpus()[0].uuid).new_stream()
    session.run(_call(session), [_block(session, stream, X)], stream=stream)
    del session
    gc.collect()
    end_what_is_left()
    assert set(on_gpu.held()) == {"stream"} and on_gpu.held()["stream"] == 1
    device_of(gpus()[0].uuid).destroy_stream(stream)
