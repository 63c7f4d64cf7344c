"""More shapes than a worker keeps programs for: evicted programs are prepared again, unnoticed."""

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bridge_client import Session, connect
from bridge_client.inproc import host
from bridge_client.jax import RemoteTorchFunction
from bridge_client.programs import Recent
from bridge_client.torch import RemoteJaxFunction
from tests.workers import Worker, serving

_MODEL = """
def f(x):
    return x * x * len(x)
"""
# The last ones are sent in chunks where arrays travel by value.
_SIZES = (1, 2, 3, 4, 5, 6, 20_000, 20_001)


@pytest.fixture(params=["jax", "torch"])
def framework(request: pytest.FixtureRequest) -> str:
    """Each framework of models."""
    name: str = request.param
    return name


@pytest.fixture
def worker(tmp_path: Path, framework: str) -> Iterator[Worker]:
    """A worker that keeps two programs, and the last sixteen of each session."""
    (tmp_path / "shaped.py").write_text(_MODEL)
    target = f"--{framework}-model={tmp_path / 'shaped.py'}:f"
    listen = f"--listen=unix:{tmp_path}/worker.sock"
    how = target, listen, "--max-programs=2"
    with serving(tmp_path / "logs", *how, venv=f".venv-{framework}") as worker:
        yield worker


def test_evicted_programs_are_prepared_again(
    worker: Worker, framework: str, lane: str
) -> None:
    """Sixteen shapes in turn, forward and backward: more than the worker keeps."""
    sizes = (*range(1, 15), *_SIZES[-2:])
    with connect(worker.address, lane=lane) as session:
        gradient = _gradient_of(session)
        for _ in range(2):
            for size in sizes:
                assert gradient(size) == [2.0 * size] * size
        done = session._current_link().measure()
    # Without eviction, there is a forward and a backward of each.
    assert sum(runs.compiles for runs in done.runs) > 3 * len(sizes)


def test_a_backward_after_the_eviction_of_its_programs(
    worker: Worker, framework: str, lane: str
) -> None:
    """The residuals of all shapes wait for their backwards, which come in another order."""
    if framework == "torch":
        pytest.skip("the backward of a JAX caller follows its forward")
    with connect(worker.address, lane=lane) as session:
        f = RemoteJaxFunction(session)
        inputs = [torch.ones(size, requires_grad=True) for size in range(1, 25)]
        outputs = [f(x) for x in inputs]
        gc.collect()
        assert session.stats()["residuals"] == len(inputs)
        for x, y in list(zip(inputs, outputs, strict=True))[::-1]:
            y.sum().backward(retain_graph=True)
            assert x.grad.tolist() == [2.0 * len(x)] * len(x)
        for x, y in zip(inputs, outputs, strict=True):
            y.sum().backward()
            assert x.grad.tolist() == [4.0 * len(x)] * len(x)


def test_clients_and_threads_that_evict_each_others_programs(
    worker: Worker, framework: str, lane: str
) -> None:
    with (
        connect(worker.address, lane=lane) as one,
        connect(worker.address, lane=lane) as other,
        ThreadPoolExecutor(4) as threads,
    ):
        gradients = [_gradient_of(one), _gradient_of(other)]

        def all_sizes(number: int) -> bool:
            sizes = [(7 * number + 5 * i) % 23 + 1 for i in range(15)]
            gradient = gradients[number % 2]
            return all(gradient(size) == [2.0 * size] * size for size in sizes)

        assert all(threads.map(all_sizes, range(4)))


def test_eviction_in_this_process(framework: str) -> None:
    with host(**{f"{framework}_model": lambda x: x * x * len(x)}) as session:
        for era in session._eras.values():
            era.programs._max_programs = 2
        gradient = _gradient_of(session)
        for _ in range(2):
            for size in _SIZES:
                assert gradient(size) == [2.0 * size] * size
        gc.collect()
        programs = [era.programs for era in session._eras.values()]
        assert max(each.evicted for each in programs) >= 2 * 2 * (len(_SIZES) - 1)
        assert max(len(each._slots) for each in programs) == 2
        if framework == "jax":
            f = RemoteJaxFunction(session)
            x = torch.ones(2, requires_grad=True)
            y = f(x)
            assert gradient(9) == [18.0] * 9
            assert gradient(10) == [20.0] * 10
            y.sum().backward()
            assert x.grad.tolist() == [4.0, 4.0]


def test_a_function_remembers_the_calls_it_made_last() -> None:
    """Any number of them leaves no more than the limit, and those in use stay."""
    table: Recent[str] = Recent(4)
    for i in range(100):
        table.remember(i, f"{i}")
        assert table[0] == "0", "in use all the time"
        assert len(table) + len(table._older) <= 4
    assert table[98] == "98"
    assert table[50] is None
    assert table.remember(98, "another") == "98"
    table.clear()
    assert table[0] is None


def _gradient_of(session: Session) -> Callable[[int], list[float]]:
    """Return the function from a size to the gradient of the model's sum at ones."""
    if session.framework == "jax":
        f = RemoteJaxFunction(session)

        def by_torch(size: int) -> list[float]:
            x = torch.ones(size, requires_grad=True)
            f(x).sum().backward()
            return x.grad.tolist()

        return by_torch
    g = RemoteTorchFunction(session)
    gradient = jax.grad(lambda x: g(x).sum())

    def by_jax(size: int) -> list[float]:
        found: list[float] = np.asarray(gradient(jnp.ones(size))).tolist()
        return found

    return by_jax
