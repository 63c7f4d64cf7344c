"""The engine, the images and the containers of each test."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.running import Containers, copied_app
from tools.containers import Engine, prepare


@pytest.fixture(scope="session")
def prepared() -> tuple[Engine, str]:
    """The engine that is used, with both images built, and the name of their base."""
    return prepare(os.environ.get("ENGINE") or None, os.environ.get("BASE") or None)


@pytest.fixture(scope="session")
def engine(prepared: tuple[Engine, str]) -> Engine:
    return prepared[0]


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied_app(tmp_path_factory.mktemp("containers"))


@pytest.fixture
def containers(engine: Engine, app: Path) -> Iterator[Containers]:
    containers = Containers(engine, app)
    containers.close()  # of a run that was killed
    yield containers
    containers.close()
