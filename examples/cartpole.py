"""Example: trains a torch policy in gymnax's CartPole, which runs in a JAX worker.

The states of the simulator and its typed random keys are values here: `torch.vmap` steps 64
episodes by one call. REINFORCE with a baseline raises the mean length of an episode.

gymnax is not part of `make setup`. Install it beside JAX and the bridge, and name the interpreter:
.venv-torch/bin/python examples/cartpole.py --worker-python PYTHON
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, vmap

from bridge_client import spawn
from bridge_client.torch import RemoteJaxFunction

ROOT = Path(__file__).resolve().parent.parent
EPISODES, STEPS, UPDATES = 64, 200, 30
GOAL = 60.0  # mean steps per episode; an untrained policy falls after about 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker-python", required=True, metavar="PYTHON")
    python = parser.parse_args().worker_python
    torch.manual_seed(0)
    names = ("keys", "reset", "step")
    models = {name: f"examples.cartpole_env:{name}" for name in names}
    with spawn(jax_model=models, python=python, cwd=ROOT) as session:
        keys, reset, step = (
            RemoteJaxFunction(session, name=name, static_argnames="count")
            for name in names
        )
        policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
        for update in range(UPDATES):
            episode = keys(update, count=EPISODES)
            log_probs, alive = rollout(policy, vmap(reset), vmap(step), episode)
            length = alive.sum(0).mean().item()
            if update % 5 == 0 or update == UPDATES - 1:
                print(f"update {update:3}: {length:6.1f} steps per episode")
            optimizer.zero_grad()
            loss_of(log_probs, alive).backward()
            optimizer.step()
    return 0 if length >= GOAL else 1


def rollout(
    policy: nn.Module,
    reset: Callable[..., Any],
    step: Callable[..., Any],
    keys: Any,
) -> tuple[Tensor, Tensor]:
    """Return, for each step and episode, the action's log-probability and whether it counts."""
    observation, state = reset(keys)
    running = torch.ones(EPISODES)
    log_probs, alive = [], []
    for _ in range(STEPS):
        actions = torch.distributions.Categorical(logits=policy(observation))
        action = actions.sample()
        log_probs.append(actions.log_prob(action))
        alive.append(running)
        keys, observation, state, _, done = step(keys, state, action.int())
        running = running * ~done
    return torch.stack(log_probs), torch.stack(alive)


def loss_of(log_probs: Tensor, alive: Tensor) -> Tensor:
    """Return the loss whose gradient is the policy gradient."""
    still_to_come = alive.flip(0).cumsum(0).flip(0)
    counts = alive.sum(1, keepdim=True).clamp(min=1)
    baseline = (still_to_come * alive).sum(1, keepdim=True) / counts
    advantage = (still_to_come - baseline) * alive
    return -(log_probs * advantage).sum() / alive.sum()


if __name__ == "__main__":
    raise SystemExit(main())
