"""Calls on arrays that are spread over several devices: one call per shard, and nothing
gathered."""

import os
import subprocess

import jax
import pytest
from jax.sharding import PartitionSpec as P

from bridge_client import Session
from bridge_wire.errors import StructureError
from tests.client.jax_client.conftest import Remote
from tests.conftest import ROOT, python_of


@pytest.mark.parametrize("venv", [".venv-both", ".venv-jax-next"])
def test_each_of_four_devices_makes_its_own_call(
    torch_worker: Session, venv: str
) -> None:
    """Under shard_map, and where specs are declared: values, gradients, parameters, statistics and
    keys.

    With today's jax, too, which `make setup` installs where it finds a newer Python.
    """
    if venv == ".venv-jax-next" and not (ROOT / venv).exists():
        pytest.skip(f"`make setup` found no newer Python: no {venv}")
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(ROOT),
    }
    command = [
        python_of(venv),
        "-m",
        "tests.client.jax_client.sharded",
        torch_worker.address,
    ]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines() == [
        f"checked {what}"
        for what in (
            "in_shard_map",
            "where_specs_are_declared",
            "with_parameters",
            "state_and_keys",
            "on_another_device",
            "on_an_explicit_mesh",
        )
    ]


def test_specs_that_fit_no_argument(remote: Remote) -> None:
    """What is declared for another number of arguments is told at once, with or without a mesh."""
    f = remote("square", in_specs=(P("data"), P("data")), out_specs=P("data"))
    with pytest.raises(StructureError, match=r"equal along \['data'\]"):
        remote("square", in_specs=P("data"), out_specs=P())
    with (
        jax.set_mesh(jax.make_mesh((1,), ("data",))),
        pytest.raises(StructureError, match=r"in_specs=.* is no prefix"),
    ):
        f(jax.numpy.ones(3))
