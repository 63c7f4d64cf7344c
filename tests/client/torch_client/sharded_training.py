"""What test_moved_parameters.py runs in other processes: training with parameters that torch
shards.

No jax here.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_module, distribute_tensor

from bridge_client import Session, connect
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import StructureError

STEPS = 3
ROWS = 8


class Affine(nn.Module):
    """The remote model "affine" in torch."""

    def __init__(self, remote: nn.Module) -> None:
        super().__init__()
        for name, value in remote.named_parameters():
            setattr(self, name, nn.Parameter(value.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def _around(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), module, nn.Linear(2, 1)).to(
        next(module.parameters()).dtype
    )


def _shard_itself(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    whole = _around(module)
    fully_shard(whole[1], mesh=mesh)
    return whole


def _shard_parent(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(_around(module), mesh=mesh)  # type: ignore[return-value]


def _shard_both(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(_shard_itself(module, mesh), mesh=mesh)  # type: ignore[return-value]


def _shard_in_bfloat16(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    whole = _around(module.float())
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32
    )
    fully_shard(whole[1], mesh=mesh, mp_policy=policy)
    return fully_shard(whole, mesh=mesh, mp_policy=policy)  # type: ignore[return-value]


KINDS: dict[str, Callable[[nn.Module, DeviceMesh], nn.Module]] = {
    "itself": _shard_itself,
    "parent": _shard_parent,
    "both": _shard_both,
    "bfloat16": _shard_in_bfloat16,
}


def _trained(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """Return the whole weights after some steps on this rank's share of each batch, and the last
    output."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        dtype = next(model.parameters()).dtype
        x = (
            torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(step))
            .to(dtype)
            .chunk(2)[rank]
        )
        optimizer.zero_grad()
        y = model(x)
        (y - x.sin().sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    whole = {
        name: x.full_tensor() if hasattr(x, "full_tensor") else x
        for name, x in model.state_dict().items()
    }
    return {"y": y.detach(), **whole}


def _session(address: str) -> Session:
    if address:
        return connect(address)
    import jax

    from bridge_client.inproc import host
    from tests.client.torch_client.functions import affine

    jax.config.update("jax_enable_x64", True)
    return host(jax_model={"affine": affine})


def run_rank() -> None:
    """Train remote models and torch modules that are sharded over two ranks; save both results
    of each kind."""
    rank, directory, address = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    seen: dict[str, Any] = {}
    with _session(address) as session:
        for kind, shard in KINDS.items():
            remote = RemoteJaxFunction(session, name="affine").double()
            plain = Affine(remote)
            seen[kind] = [
                _trained(shard(model, mesh), rank) for model in (remote, plain)
            ]
    torch.save(seen, f"{directory}/{rank}.pt")
    distributed.destroy_process_group()


def refuse() -> None:
    """Call models whose parameters, or arguments, are shards; print what was refused by name."""
    distributed.init_process_group(
        "gloo", store=distributed.HashStore(), rank=0, world_size=1
    )
    mesh = init_device_mesh("cpu", (1,))
    with connect(sys.argv[1]) as session:
        x = torch.ones(2, 3)
        perceptron = RemoteJaxFunction(session, name="perceptron")
        fully_shard(perceptron.params.Dense_1, mesh=mesh)
        _expect("branch", "params.Dense_1.bias", lambda: perceptron(x))
        affine = RemoteJaxFunction(session, name="affine")
        affine(x)  # the program is known
        distribute_module(affine, mesh)
        _expect("distributed", "bias", lambda: affine(x))
        unhooked = fully_shard(RemoteJaxFunction(session, name="affine"), mesh=mesh)
        _expect("unhooked", "bias", lambda: unhooked.forward(x))
        sine = RemoteJaxFunction(session, name="sine")
        _expect("argument", "args[0]", lambda: sine(distribute_tensor(x, mesh)))
    distributed.destroy_process_group()


def _expect(name: str, path: str, call: Callable[[], object]) -> None:
    try:
        call()
    except StructureError as error:
        assert f"`{path}` is a DTensor" in str(error), error
        print(name)
