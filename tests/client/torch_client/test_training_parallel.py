"""Training and loading with several processes: DistributedDataParallel, and the workers of a
DataLoader."""

import contextlib
from pathlib import Path

import pytest
import torch

from bridge_client import Session, connect
from tests.client.torch_client.data_parallel import network, train
from tests.workers import run_program, start_program

_MODULE = "tests.client.torch_client.data_parallel"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, x64_worker: Session) -> Path:
    """The directory where both ranks left the weights that they trained."""
    directory = tmp_path_factory.mktemp("ranks")
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                start_program(
                    f"from {_MODULE} import run_rank; run_rank()",
                    str(rank),
                    str(directory),
                    x64_worker.address,
                    venv=".venv-torch",
                    GLOO_SOCKET_IFNAME="lo",
                )
            )
            for rank in range(2)
        ]
        for rank in ranks:
            _, stderr = rank.communicate(timeout=120)
            assert rank.returncode == 0, stderr
    return directory


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_two_ranks_train_as_one_process_with_the_whole_batch(
    trained: Path, x64_worker: Session, kind: str
) -> None:
    """With DistributedDataParallel over gloo, with one worker for both or one each, the weights are
    those that one process gets from the doubled batch.
    """
    with connect(x64_worker.address) as session:
        model = network(session)
        train(model)
        expected = {name: value.clone() for name, value in model.state_dict().items()}
    for rank in range(2):
        seen = torch.load(trained / f"{kind}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-12)


def test_workers_of_a_data_loader_call_the_function(jax_worker: Session) -> None:
    """Forked and spawned workers of a DataLoader call and differentiate the function that they
    were given."""
    done = run_program(
        f"from {_MODULE} import load_rows; load_rows()",
        jax_worker.address,
        venv=".venv-torch",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["fork", "spawn"]
    assert "Traceback" not in done.stderr
