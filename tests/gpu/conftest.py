"""What the tests of CUDA share: a machine with a GPU that is none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.faking import installed


@pytest.fixture
def fake_cuda(tmp_path: Path) -> Iterator[Any]:
    """One fake GPU for this process, and for those that it starts with its environment."""
    with installed(tmp_path) as fake:
        yield fake
