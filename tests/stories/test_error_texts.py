"""Errors of models in worker processes: their tracebacks, and the worker's own output."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bridge_client import connect, spawn
from bridge_client.jax import RemoteTorchFunction
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import ArgumentError, RemoteModelError
from tests.conftest import python_of
from tests.workers import serving

_JAX_MODEL = """
import jax.numpy as jnp

def product(x, scale=1.0):
    return x @ jnp.ones(9) * scale
"""
_TORCH_MODEL = """
import torch

net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(5, 2))

def product(x):
    return net(x)
"""


@pytest.mark.parametrize(
    ("args", "env", "is_full"),
    [
        ((), {}, False),
        (("--full-tracebacks",), {}, True),
        ((), {"BRIDGE_FULL_TRACEBACKS": "1"}, True),
        ((), {"BRIDGE_FULL_TRACEBACKS": "0"}, False),
    ],
)
def test_a_worker_shows_all_frames_only_if_asked(
    tmp_path: Path, args: tuple[str, ...], env: dict[str, str], is_full: bool
) -> None:
    """By default a remote traceback consists of the model's lines."""
    (tmp_path / "model.py").write_text(_JAX_MODEL)
    with spawn(
        jax_model="model:product",
        python=python_of(".venv-jax"),
        cwd=tmp_path,
        args=args,
        env=env,
    ) as session:
        function = RemoteJaxFunction(session)
        with pytest.raises(RemoteModelError) as raised:
            function(torch.ones(3))
        with pytest.raises(ArgumentError, match=r"\(x, scale=1\.0\)"):
            function(torch.ones(3), factor=2.0)
    text = raised.value.remote_traceback
    assert "return x @ jnp.ones(9) * scale" in text
    assert ("bridge_server" in text and "site-packages/jax" in text) is is_full
    assert ("bridge_server" in text or "site-packages" in text) is is_full


def test_a_wrong_shape_prints_nothing_on_the_worker(tmp_path: Path) -> None:
    """A torch model with a wrong shape is the caller's error; the worker's log has it in a line."""
    (tmp_path / "model.py").write_text(_TORCH_MODEL)
    args = ("--listen", f"unix:{tmp_path}/worker.sock", "--torch-model=model:product")
    env = {"PYTHONPATH": str(tmp_path)}
    with serving(tmp_path / "w", *args, venv=".venv-torch", env=env) as worker:
        with (
            connect(worker.address) as session,
            pytest.raises(RemoteModelError) as raised,
        ):
            RemoteTorchFunction(session)(np.ones((2, 3), np.float32))
        assert "fake" not in worker.stderr and "Traceback" not in worker.stderr
        assert all("request " in x for x in worker.stderr.splitlines() if "Error" in x)
        assert "made-up" not in str(raised.value)
    assert str(raised.value).startswith("RuntimeError: mat1 and mat2 shapes cannot be")
    assert "Linear" not in raised.value.remote_traceback
    assert "return net(x)" in raised.value.remote_traceback
