"""What test_training_parallel.py runs in other processes: the ranks, and the workers of a
DataLoader.

No jax.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from bridge_client import Session, connect, spawn
from bridge_client.torch import RemoteJaxFunction

ROOT = Path(__file__).resolve().parents[3]
STEPS = 4
ROWS = 8  # of the whole batch


def network(session: Session) -> nn.Module:
    """Return a remote model between torch layers, the same on each rank."""
    torch.manual_seed(0)
    remote = RemoteJaxFunction(session, name="affine")
    return nn.Sequential(
        nn.Linear(3, 3), nn.Tanh(), remote, nn.Tanh(), nn.Linear(2, 1)
    ).double()


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 3, dtype=torch.float64, generator=generator)


def train(model: nn.Module, rank: int = 0, world_size: int = 1) -> None:
    """Train on this rank's share of each batch, by an optimizer with a state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(STEPS):
        x = batch(step).chunk(world_size)[rank]
        optimizer.zero_grad()
        ((model(x) - x.sin().sum(1, keepdim=True)) ** 2).mean().backward()
        optimizer.step()


def own_worker() -> Session:
    return spawn(
        jax_model={"affine": "tests.client.torch_client.functions:affine"},
        python=ROOT / ".venv-jax/bin/python",
        cwd=ROOT,
        args=["--x64"],
    )


def run_rank() -> None:
    """Train by DistributedDataParallel with a shared worker, then with one of this rank's own;
    save the weights."""
    rank, directory, shared = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2
    )
    for kind in ("shared", "own"):
        with connect(shared) if kind == "shared" else own_worker() as session:
            model = network(session)
            with torch.no_grad():
                for parameter in model.parameters():
                    # DistributedDataParallel begins with the weights of rank 0.
                    parameter.add_(rank)
            train(
                DistributedDataParallel(model, gradient_as_bucket_view=kind == "own"),
                rank,
                world_size=2,
            )
            torch.save(model.state_dict(), f"{directory}/{kind}-{rank}.pt")
            assert session.stats()["residuals"] == 0
    distributed.destroy_process_group()


class RemoteRows(Dataset[Tensor]):
    """Rows that a remote function makes, in whichever process asks for them."""

    def __init__(self, function: RemoteJaxFunction) -> None:
        self._function = function

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        x = torch.full((3,), float(i), requires_grad=True)
        (gradient,) = torch.autograd.grad(self._function(x).sum(), x)
        return gradient


def load_rows() -> None:
    """Load the rows in forked and in spawned workers, from a session that this process uses too."""
    from torch.utils.data import DataLoader

    with connect(sys.argv[1]) as session:
        sine = RemoteJaxFunction(session, name="sine")
        expected = 2 * torch.arange(8.0).cos()[:, None].expand(8, 3)
        sine(torch.ones(3))
        for start in ("fork", "spawn"):
            loader = DataLoader(
                RemoteRows(sine),
                batch_size=2,
                num_workers=2,
                multiprocessing_context=start,
            )
            torch.testing.assert_close(torch.cat(list(loader)), expected)
            torch.testing.assert_close(sine(torch.ones(3)), 2 * torch.ones(3).sin())
            print(start)
