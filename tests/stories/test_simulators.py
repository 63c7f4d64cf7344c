"""States of simulators and training libraries go through torch as through JAX's own loop.

Needs --simulators=PYTHON, an interpreter with the packages that tests/stories/simulated.py names.
"""

import io
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bridge_client import Session, spawn
from bridge_client.torch import RemoteJaxFunction
from tests.conftest import ROOT

NAMES = ("brax", "mjx", "gymnax", "jumanji", "train_state", "optax", "jax_md")
# A step, and all steps one after another: XLA compiles a loop otherwise than a step.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@dataclass(frozen=True)
class Simulator:
    """A served simulator, and what JAX's own loop computes with it."""

    name: str
    session: Session
    reset: RemoteJaxFunction
    step: RemoteJaxFunction
    seen: RemoteJaxFunction
    expected: dict[str, Tensor]

    def followed(self, state: Any, pushes: Tensor) -> Any:
        for push in pushes:
            state = self.step(state, push)
        return state


@pytest.fixture(scope="module", params=NAMES)
def simulator(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Simulator]:
    python = request.config.getoption("--simulators")
    if python is None:
        pytest.skip("needs --simulators=PYTHON")
    name, output = request.param, tmp_path_factory.mktemp("simulated") / "expected.npz"
    models = {
        part: f"tests.stories.simulated:{name}.{part}"
        for part in ("reset", "step", "seen")
    }
    command = [python, "-m", "tests.stories.simulated", name, str(output)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ, timeout=600)
    with np.load(output) as saved:
        expected = {name: torch.from_numpy(saved[name]) for name in saved}
    with spawn(jax_model=models, python=python, cwd=ROOT) as session:
        functions = {part: RemoteJaxFunction(session, name=part) for part in models}
        functions["reset"](0)  # the session's first memory is no test's
        yield Simulator(name, session, **functions, expected=expected)


def test_an_episode_ends_as_in_jax(simulator: Simulator) -> None:
    expected = simulator.expected
    last = simulator.followed(simulator.reset(0), expected["pushes"])
    torch.testing.assert_close(simulator.seen(last), expected["one"], **CLOSE)


def test_a_batch_of_episodes_ends_as_in_jax(simulator: Simulator) -> None:
    expected = simulator.expected
    states = torch.func.vmap(simulator.reset)(expected["seeds"].int())
    step = torch.func.vmap(simulator.step, in_dims=(0, None))
    for push in expected["pushes"]:
        states = step(states, push)
    seen = torch.func.vmap(simulator.seen)(states)
    torch.testing.assert_close(seen, expected["batch"], **CLOSE)


def test_the_gradient_through_steps_is_that_of_jax(simulator: Simulator) -> None:
    expected = simulator.expected
    scale = torch.tensor(0.5, requires_grad=True)
    pushes = scale * expected["pushes"][: int(expected["differentiated"])]
    last = simulator.followed(simulator.reset(0), pushes)
    loss = simulator.seen(last).square().sum()
    if expected["slope"] == 0:  # steps that cut the action to an integer
        assert not loss.requires_grad or torch.autograd.grad(loss, scale)[0] == 0
        return
    (slope,) = torch.autograd.grad(loss, scale)
    torch.testing.assert_close(
        slope, expected["slope"], rtol=1e-4, atol=1e-6, equal_nan=True
    )


def test_a_saved_state_goes_on(simulator: Simulator) -> None:
    """torch.save with weights_only in the middle of an episode changes nothing."""
    expected = simulator.expected
    half = len(expected["pushes"]) // 2
    state = simulator.followed(simulator.reset(0), expected["pushes"][:half])
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    resumed = torch.load(file, weights_only=True)
    last = simulator.followed(resumed, expected["pushes"][half:])
    torch.testing.assert_close(simulator.seen(last), expected["one"], **CLOSE)
