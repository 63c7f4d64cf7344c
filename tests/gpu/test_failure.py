"""A worker whose GPU takes no more work of its process: it says so, and ends for another to take
its place."""

from pathlib import Path

import pytest

from bridge_client import connect, spawn
from bridge_server.model_errors import is_refused
from bridge_wire.errors import CudaError
from tests.calls import floats, placed, prepare, squares
from tests.conftest import ROOT, python_of
from tests.workers import serving

_MODELS = {
    name: f"tests.gpu.failing:{name}" for name in ("square", "failing", "untraceable")
}
_FLAGS = [f"--jax-model={name}={target}" for name, target in _MODELS.items()]


def test_a_worker_whose_gpu_has_failed_ends_with_status_1(
    tmp_path: Path, lane: str
) -> None:
    """The call that found out is answered, the log says why, and nothing is left at the address."""
    path = tmp_path / "worker.sock"
    with serving(tmp_path, "--listen", f"unix:{path}", *_FLAGS) as worker:
        with connect(worker.address, lane=lane) as session:
            assert squares(session, 3.0) == [9.0]
            with pytest.raises(CudaError, match=r"(?s)GPU has failed.*ILLEGAL_ADDRESS"):
                session.run(
                    prepare(session, "failing", floats(2)),
                    [placed(session, [1.0, 2.0])],
                )
            assert worker.wait() == 1
        assert "CRITICAL" in worker.stderr
        assert "the GPU rejects further work of this process" in worker.stderr
        assert not path.exists()


def test_a_spawned_worker_whose_gpu_has_failed_is_started_anew() -> None:
    """By the next call, also where the failure was found while a program was prepared."""
    with spawn(jax_model=_MODELS, python=python_of(".venv-jax"), cwd=ROOT) as session:
        with pytest.raises(CudaError, match="serves the next call"):
            prepare(session, "untraceable", floats(2))
        assert squares(session, 3.0) == [9.0]


def test_a_device_without_room_has_not_failed() -> None:
    """Nor one that does what is asked."""

    class OutOfMemoryError(RuntimeError):
        """Named as torch's."""

    def fail(error: Exception) -> None:
        raise error

    assert not is_refused(lambda: None)
    assert not is_refused(lambda: fail(OutOfMemoryError("CUDA out of memory")))
    assert is_refused(
        lambda: fail(
            RuntimeError("CUDA error: an illegal memory access was encountered")
        )
    )
