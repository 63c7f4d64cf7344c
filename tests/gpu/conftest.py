"""Shared fixtures of the tests of CUDA: a machine with a fake GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.faking import installed


@pytest.fixture(scope="module", params=["words", "events"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """How lanes are in order with the GPU: by words, or by events where the driver has no words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_CUDA_WORDS", str(int(request.param == "words")))
        yield request.param


@pytest.fixture
def fake_cuda(tmp_path: Path) -> Iterator[Any]:
    """One fake GPU for this process, and for those that it starts with its environment."""
    with installed(tmp_path) as fake:
        yield fake
