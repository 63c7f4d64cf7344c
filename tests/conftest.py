"""Shared fixtures: real workers in their own environment, and the rule that nothing is left
behind."""

import faulthandler
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from bridge_client import Session, spawn
from tests.contract.models import MODELS

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
_ON_GPU = TESTS / "gpu" / "on_gpu"
# Workers of tests leave the user's cache alone, and compile as at a first start.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")


def python_of(venv: str) -> str:
    """Return the interpreter of one of the environments that `make setup` creates."""
    python = ROOT / venv / "bin" / "python"
    if not python.exists():
        raise RuntimeError(f"{venv} is missing; run `make setup`")
    return str(python)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--examples-extra",
        metavar="PYTHON",
        help=(
            "an interpreter with lightning, transformers and accelerate beside torch: run their"
            " examples too"
        ),
    )
    parser.addoption(
        "--simulators",
        metavar="PYTHON",
        help=(
            "an interpreter with the bridge, brax, mujoco-mjx, gymnax, jumanji, flax, optax and"
            " jax-md: run their examples and simulators too"
        ),
    )
    parser.addoption(
        "--chaos",
        action="store_true",
        help="run every cell of the chaos suite, not only one per event and lane",
    )
    parser.addoption(
        "--containers",
        action="store_true",
        help="run the tests of the images and compose files too; needs podman or docker",
    )
    parser.addoption(
        "--gpu",
        action="store_true",
        help="run the tests that need an NVIDIA GPU, and only these; see docs/gpu.md",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("gpu"):  # now: later on, pytest captures this descriptor
        faulthandler.register(signal.SIGALRM, os.dup(2), all_threads=True, chain=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of a run on a GPU, where other packages may be installed, the other tests are not even
    imported."""
    is_other = collection_path.is_file() and _ON_GPU not in collection_path.parents
    return True if config.getoption("gpu") and is_other else None


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if config.getoption("gpu"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and --gpu"))
        if item.get_closest_marker("containers") and not config.getoption("containers"):
            item.add_marker(
                pytest.mark.skip(reason="needs an engine, and --containers")
            )


def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    """Return whether the condition comes true before the deadline."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(scope="session")
def jax_worker() -> Iterator[Session]:
    """A worker without x64 that hosts every model of tests/models.py."""
    with _hosting_all() as session:
        yield session


@pytest.fixture(scope="session")
def x64_worker() -> Iterator[Session]:
    """The same with x64."""
    with _hosting_all("--x64") as session:
        yield session


@pytest.fixture(scope="session")
def torch_worker() -> Iterator[Session]:
    """A worker without jax that hosts every model of tests/server/torch_server and
    tests/client/jax_client."""
    models = {
        name: f"tests.{module}:{name}"
        for folder, module in (
            ("server/torch_server", "server.torch_server.models"),
            ("client/jax_client", "client.jax_client.torch_models"),
        )
        for name in (TESTS / folder / "models.txt").read_text().split()
    }
    with spawn(
        torch_model=models | _contract("torch"),
        python=python_of(".venv-torch"),
        cwd=ROOT,
    ) as session:
        yield session


def _hosting_all(*args: str) -> Session:
    names = (TESTS / "models.txt").read_text().split()
    return spawn(
        jax_model={name: f"tests.models:{name}" for name in names} | _contract("jax"),
        python=python_of(".venv-jax"),
        cwd=ROOT,
        args=args,
    )


def _contract(framework: str) -> dict[str, str]:
    return {
        f"contract.{name}": f"tests.contract.in_{framework}:{name}" for name in MODELS
    }


@pytest.fixture(params=["local", "grpc"])
def lane(request: pytest.FixtureRequest) -> str:
    """Each of the lanes between two processes."""
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same weights and samples in every run."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test there are no more descriptors, threads and children than before."""
    # Session-wide workers may start in the middle of a test: have them first.
    for name in ("jax_worker", "x64_worker", "torch_worker", "mortal_worker"):
        if name in request.fixturenames:
            request.getfixturevalue(name)
    before = held()
    yield

    def is_clean() -> bool:
        now = held()
        return all(now[kind] <= before[kind] for kind in before)

    def is_clean_after_collection() -> bool:
        gc.collect()
        return is_clean()

    assert is_clean() or eventually(is_clean_after_collection), (
        f"left behind: {before} before the test, {held()} after it"
    )


def held() -> dict[str, int]:
    """Return how many descriptors, threads and children this process has."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": sum(
            not thread.name.startswith("ThreadPool-copy")
            for thread in threading.enumerate()
        ),
        "children": len(children.read_text().split()) if children.exists() else 0,
    }


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Has SIGINT raise KeyboardInterrupt, also where a shell that started this in the background
    had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
