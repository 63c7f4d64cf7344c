"""Example: trains a torch policy through brax, whose physics have gradients.

The state of the simulator, of brax's own classes, goes from step to step, and autograd goes back
through all steps. A pendulum on a cart learns to stay up.

brax is not part of `make setup`. Install it beside JAX and the bridge, and name the interpreter:
.venv-torch/bin/python examples/pendulum.py --worker-python PYTHON
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from bridge_client import spawn
from bridge_client.torch import RemoteJaxFunction

ROOT = Path(__file__).resolve().parent.parent
STEPS, UPDATES = 30, 10
GOAL = 0.2  # of the loss before training


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker-python", required=True, metavar="PYTHON")
    python = parser.parse_args().worker_python
    torch.manual_seed(0)
    models = {name: f"examples.pendulum_env:{name}" for name in ("reset", "step")}
    with spawn(jax_model=models, python=python, cwd=ROOT) as session:
        reset, step = (RemoteJaxFunction(session, name=name) for name in models)
        policy = nn.Linear(4, 1)
        nn.init.zeros_(policy.weight)
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.3)
        losses = []
        for update in range(UPDATES):
            loss = episode(policy, reset, step, seed=0)
            losses.append(loss.item())
            print(f"update {update:2}: loss {losses[-1]:.5f}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return 0 if losses[-1] <= GOAL * losses[0] else 1


def episode(
    policy: nn.Module, reset: RemoteJaxFunction, step: RemoteJaxFunction, seed: int
) -> Tensor:
    """Return the mean square of the pendulum's angle in an episode."""
    state, angles = reset(seed), []
    for _ in range(STEPS):
        state = step(state, policy(state.obs).tanh())
        angles.append(state.obs[1])
    return torch.stack(angles).square().mean()


if __name__ == "__main__":
    raise SystemExit(main())
