"""A torch program and a JAX worker on one GPU: values, derivatives, and no byte through the
host."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jvp, vmap

from bridge_client import Session, connect
from bridge_client.torch import RemoteJaxFunction, allocate_in
from bridge_wire.errors import CallerError, LaneUnavailable
from tests.gpu.on_gpu import machine
from tests.gpu.on_gpu.machine import DEVICE, MEMORY, needs_cuda

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def nothing_goes_through_the_host(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of every test that has a session on the GPU."""
    session = (
        request.getfixturevalue("session")
        if "session" in request.fixturenames
        else None
    )
    yield
    if session is not None:
        assert (
            session.stats()["bytes_through_host"] == session.stats()["fallbacks"] == 0
        )


@pytest.fixture
def remote(session: Session) -> Callable[[str], RemoteJaxFunction]:
    return lambda name: RemoteJaxFunction(session, name=name)


def _rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(
        shape, dtype=dtype, generator=torch.Generator().manual_seed(0)
    ).to(DEVICE)


def _native(x: Tensor) -> Tensor:
    return torch.sin(x) * 2


def _close(seen: Any, expected: Any) -> None:
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


@needs_cuda
def test_tensors_are_shared_on_the_gpu(session: Session) -> None:
    """On either lane, and it can be required."""
    assert session.memory == MEMORY
    with connect(session.address, lane=session.lane, require=MEMORY) as required:
        assert required.memory == MEMORY


def test_forward_and_backward_are_right(
    remote: Callable[[str], RemoteJaxFunction],
) -> None:
    """At the sizes of a scalar, of a block, and of several slabs."""
    for shape in ((), (1,), (256,), (3, 5, 7), (0, 4), (1 << 20,), (24 << 20,)):
        x = _rand(*shape).requires_grad_()
        y = remote("sine")(x)
        assert y.device == x.device and y.dtype == x.dtype
        _close(y, _native(x))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.device == x.device
        _close(gradient, 2 * torch.cos(x))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.complex64,
    ],
    ids=str,
)
def test_every_dtype_arrives_as_it_is(
    dtype: torch.dtype, remote: Callable[[str], RemoteJaxFunction]
) -> None:
    """Bit by bit."""
    x = torch.arange(300, device=DEVICE).to(dtype)
    assert torch.equal(remote("unchanged")(x), x)


def test_any_layout_is_taken(remote: Callable[[str], RemoteJaxFunction]) -> None:
    """Transposed, strided, expanded, at an odd offset, and one tensor twice."""
    x = _rand(8, 6)
    for view in (
        x.T,
        x[::2, 1::3],
        x[:, :1].expand(8, 6),
        x.flatten()[1:],
        x.to(memory_format=torch.contiguous_format),
    ):
        _close(remote("sine")(view), _native(view))
    found = remote("pair")(x, x)
    _close(found["sum"], 2 * x)
    _close(found["product"][0], x * x)


def test_derivatives_of_every_kind_are_right(
    remote: Callable[[str], RemoteJaxFunction],
) -> None:
    """Hessian, vmap of grad, jvp, jacfwd, double backward, batched gradients."""
    f, x = remote("sine"), _rand(5)
    _close(hessian(lambda x: f(x).sum())(x), torch.diag(-2 * torch.sin(x)))
    _close(vmap(grad(lambda x: f(x).sum()))(_rand(4, 5)), 2 * torch.cos(_rand(4, 5)))
    _close(jvp(f, (x,), (torch.ones_like(x),))[1], 2 * torch.cos(x))
    _close(jacfwd(f)(x), torch.diag(2 * torch.cos(x)))
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    _close(second, -2 * torch.sin(x))
    rows = torch.autograd.grad(
        f(leaf), leaf, torch.eye(5, device=DEVICE), is_grads_batched=True
    )[0]
    _close(rows, torch.diag(2 * torch.cos(x)))


def test_a_module_trains(remote: Callable[[str], RemoteJaxFunction]) -> None:
    """Its parameters are on the GPU, and learn there."""
    module = remote("trainable").to(DEVICE)
    x, wanted = (
        _rand(64, 4),
        _rand(64, 4) @ torch.arange(12.0, device=DEVICE).view(4, 3),
    )
    optimizer = torch.optim.Adam(module.parameters(), lr=0.2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = ((module(x) - wanted) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(
        parameter.device.type == x.device.type for parameter in module.parameters()
    )
    assert losses[-1] < losses[0] / 10


# The latter needs a compiler for C on the machine.
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_calls_it(
    backend: str,
    remote: Callable[[str], RemoteJaxFunction],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch.compile with fullgraph."""
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)  # its thread would stay
    f, x = remote("sine"), _rand(64)
    with torch._inductor.config.patch(compile_threads=1):
        compiled = torch.compile(
            lambda x: f(x * 2) + 1, fullgraph=True, backend=backend
        )
        _close(compiled(x), _native(x * 2) + 1)
    torch._dynamo.reset()


@needs_cuda
def test_what_is_made_in_shared_memory_is_not_copied(session: Session) -> None:
    """By session.empty, by torch in allocate_in, and by an earlier call: the output is all that
    is written."""
    f = RemoteJaxFunction(session, name="sine")
    with allocate_in(session):
        allocated = torch.ones(1 << 20, device=DEVICE)
    for x in (
        allocated,
        torch.from_dlpack(session.empty(1 << 20, device="cuda")).fill_(1),
        f(allocated),
    ):
        before = session.stats()["bytes_copied"]
        y = f(x)
        assert session.stats()["bytes_copied"] - before == y.nbytes
        _close(y, _native(x))


@needs_cuda
def test_a_cuda_graph_refuses_a_call(
    remote: Callable[[str], RemoteJaxFunction],
) -> None:
    """With a clear error; the next call works."""
    f, x = remote("sine"), _rand(64)
    f(x)
    with (
        pytest.raises(CallerError, match="out of the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        f(x)
    _close(f(x), _native(x))


@needs_cuda
def test_streams_and_threads_call_side_by_side(
    remote: Callable[[str], RemoteJaxFunction],
) -> None:
    """Each finds its own results, again and again."""
    f, wrong = remote("sine"), []

    def work(seed: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i in range(50):
                x = torch.full((1000 + seed, 100), seed + i / 50, device=DEVICE)
                if not torch.allclose(f(x), torch.sin(x) * 2, atol=1e-5):
                    wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_cuda
def test_a_cpu_tensor_and_a_gpu_worker_are_right(worker: Session) -> None:
    """The result comes back to the host, where its input was."""
    with connect(worker.address) as session:
        x = torch.rand(1000).requires_grad_()
        y = RemoteJaxFunction(session, name="sine")(x)
        y.sum().backward()
        assert y.device.type == x.grad.device.type == "cpu"
        _close(y.detach(), _native(x.detach()))


@needs_cuda
def test_a_gpu_tensor_and_a_cpu_worker_are_right_and_reported() -> None:
    """Through the host, which is counted; it can be forbidden."""
    with machine.jax_worker("sine", args=("--device", "cpu")) as session:
        assert session.memory == "memfd"
        x = _rand(1000).requires_grad_()
        y = RemoteJaxFunction(session)(x)
        y.sum().backward()
        _close(y.detach(), _native(x.detach()))
        assert x.grad.is_cuda and session.stats()["bytes_through_host"] >= 4 * x.nbytes
        assert session.stats()["fallbacks"] == 1
        with pytest.raises(LaneUnavailable, match="cuda_ipc"):
            connect(session.address, require="cuda_ipc")
