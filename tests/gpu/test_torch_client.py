"""RemoteJaxFunction with tensors on a GPU that is none: torch takes every tensor for one there, but
those that it is told of.

What only torch with CUDA can do is replaced here, and nothing else; the tests on a GPU are in
`on_gpu`.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bridge_client import Session, connect, spawn
from bridge_client.torch import RemoteJaxFunction, allocate_in, gpu
from bridge_wire.errors import CallerError
from bridge_wire.memory.cuda_memory import UNIT
from tests.conftest import ROOT, python_of
from tests.gpu.faking import environment, installed

_on_host: set[int] = set()  # the ids of tensors that are on the host all the same


@pytest.fixture(scope="module")
def worker(
    tmp_path_factory: pytest.TempPathFactory, way: str
) -> Iterator[tuple[Any, str]]:
    """A worker on a fake GPU: the fake, and the worker's address."""
    directory = tmp_path_factory.mktemp("cuda")
    models = {
        name: f"tests.gpu.models:{name}" for name in ("sine", "scaled", "trained")
    }
    with installed(directory) as fake:
        undo = fake.pose_as_host()
        python, env = python_of(".venv-jax"), environment(directory)
        with spawn(jax_model=models, python=python, cwd=ROOT, env=env) as session:
            yield fake, session.address
        undo()


@pytest.fixture
def session(worker: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """A session with that worker, while torch takes its tensors for ones on the GPU."""
    _, address = worker
    with connect(address, require="cuda_ipc") as session:
        device = session.gpu_pool().device
        stream = device.new_stream()
        brought_back = gpu.OnGpu.brought_back

        def synchronized(run: gpu.OnGpu, outputs: Any, session: Session) -> Any:
            device.synchronize(stream)  # the host's torch knows no streams
            return brought_back(run, outputs, session)

        monkeypatch.setattr(gpu.OnGpu, "brought_back", synchronized)
        monkeypatch.setattr(gpu, "current_stream", lambda index: stream)
        monkeypatch.setattr(gpu, "index_of", lambda tensor: 0)
        monkeypatch.setattr(gpu, "tensor_over", lambda pool, *of: _tensor_over(*of))
        monkeypatch.setattr(
            Tensor,
            "is_cuda",
            property(lambda tensor: id(tensor) not in _on_host),
            raising=False,
        )
        monkeypatch.setattr(
            Tensor,
            "is_cpu",
            property(lambda tensor: id(tensor) in _on_host),
            raising=False,
        )
        yield session
        device.destroy_stream(stream)


def _tensor_over(block: Any, spec: Any) -> Tensor:
    dtype = getattr(torch, spec.dtype.name)
    if block.nbytes == 0:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(block, dtype=dtype).resize_(spec.shape)


@contextlib.contextmanager
def on_host(tensor: Tensor) -> Iterator[Tensor]:
    """Let a tensor be on the host."""
    _on_host.add(id(tensor))
    try:
        yield tensor
    finally:
        _on_host.discard(id(tensor))


def lies_on_gpu(session: Session, tensor: Tensor) -> bool:
    pool = session.gpu_pool()
    return (
        pool is not None
        and pool.address_of(tensor.data_ptr(), tensor.nbytes) is not None
    )


def test_outputs_and_gradients_lie_on_the_gpu(session: Session) -> None:
    """In the memory that is shared with the worker, and nothing goes through the host."""
    f = RemoteJaxFunction(session, name="sine")
    x = torch.randn(5, requires_grad=True)
    y = f(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), 2 * x.detach().sin())
    torch.testing.assert_close(x.grad, 2 * x.detach().cos())
    assert lies_on_gpu(session, y)
    assert session.stats()["bytes_through_host"] == session.stats()["fallbacks"] == 0


def test_what_lies_in_the_slab_is_not_copied(session: Session) -> None:
    """An output that is passed on, and an array of session.empty: only outputs are written."""
    f = RemoteJaxFunction(session, name="sine")
    for x in (
        f(torch.ones(256)),
        torch.from_dlpack(session.empty(256, device="cuda")).fill_(1),
    ):
        before = session.stats()["bytes_copied"]
        f(x)
        assert session.stats()["bytes_copied"] - before == 1024


def test_no_cuda_graph_can_hold_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before CUDA itself says so, which ends the capture with an error that names no call."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(CallerError, match="out of the capture"):
        gpu.current_stream(0)


def test_a_tensor_of_the_host_and_a_number_come_along(session: Session) -> None:
    """Each input travels by the memory it is in; the gradient of one on the host comes there."""
    f = RemoteJaxFunction(session, name="scaled")
    with on_host(torch.full((4,), 3.0)) as y:
        made = f(torch.full((4,), 2.0), y, 0.5)
    assert made.tolist() == [3.0] * 4 and lies_on_gpu(session, made)


def test_any_derivative_is_taken_there(session: Session) -> None:
    """The same programs: hessian, and vmap of grad."""
    f = RemoteJaxFunction(session, name="sine")
    x = torch.randn(4)
    torch.testing.assert_close(
        torch.func.hessian(lambda x: f(x).sum())(x), torch.diag(-2 * x.sin())
    )
    rows = torch.randn(3, 4)
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(rows), 2 * rows.cos()
    )


def test_parameters_on_the_gpu_live_in_the_slab(session: Session) -> None:
    """A training step with torch.optim copies none of them."""
    model = RemoteJaxFunction(session, name="trained")
    model.to(torch.float32)  # as .cuda() does, this moves what is elsewhere
    assert all(lies_on_gpu(session, parameter) for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.from_dlpack(session.empty((2, 3), device="cuda")).fill_(1)
    for _ in range(2):
        before = session.stats()["bytes_copied"]
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs = 2 * 4 + sum(parameter.nbytes for parameter in model.parameters())
        assert session.stats()["bytes_copied"] - before <= outputs + 2 * 4
    assert all(lies_on_gpu(session, parameter) for parameter in model.parameters())


def test_what_torch_allocates_in_the_session_is_not_copied(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The segments of a pool of torch's own are shared when the context ends; the next context
    uses the pool again."""
    device = session.gpu_pool().device
    pointer = device.allocate(UNIT)
    segments = [{"address": pointer, "total_size": UNIT}]
    made = []

    class Pool:
        def __init__(self) -> None:
            made.append(self)

        def snapshot(self) -> list[dict[str, int]]:
            return segments

    monkeypatch.setattr(torch.cuda, "MemPool", Pool)
    monkeypatch.setattr(
        torch.cuda, "use_mem_pool", lambda pool, index: contextlib.nullcontext()
    )
    f = RemoteJaxFunction(session, name="sine")
    with allocate_in(session):
        memory = (ctypes.c_ubyte * 1024).from_address(pointer)
        x = torch.frombuffer(memory, dtype=torch.float32).fill_(1)
    before = session.stats()["bytes_copied"]
    torch.testing.assert_close(f(x), 2 * torch.ones(256).sin())
    assert session.stats()["bytes_copied"] - before == 1024
    slabs = len(session.gpu_pool().slabs)
    for _ in range(3):  # as in a training loop
        with allocate_in(session):
            pass
    assert len(made) == 1 and len(session.gpu_pool().slabs) == slabs
    with allocate_in(session), allocate_in(session):
        pass
    assert len(made) == 2
    session.close()
    device.free(pointer)


def test_a_session_without_a_gpu_allocates_none_there(jax_worker: Session) -> None:
    """The error says what there is."""
    with connect(jax_worker.address) as session:
        with (
            pytest.raises(CallerError, match="no memory on a GPU"),
            allocate_in(session),
        ):
            pass
        with pytest.raises(CallerError, match="device='cuda'"):
            session.empty(3, device="cuda")
