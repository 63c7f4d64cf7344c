"""The client of docker/compose.yaml: fits two parameters by gradients through the worker.

Its image has no jax.
"""

import os

import torch

from bridge_client import connect
from bridge_client.torch import RemoteJaxFunction

device, memory = ("cuda", "cuda_ipc") if torch.cuda.is_available() else ("cpu", "memfd")
t = torch.linspace(0, 6, 100, device=device)
seen = 2.0 * torch.exp(-0.3 * t) * torch.cos(t)
with connect(os.environ["BRIDGE_ADDRESS"], require=memory) as session:
    wave = RemoteJaxFunction(session)
    amplitude, rate = (
        torch.tensor(1.0, device=device, requires_grad=True) for _ in range(2)
    )
    optimizer = torch.optim.Adam([amplitude, rate], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = ((wave(t, amplitude, rate) - seen) ** 2).mean()
        loss.backward()
        optimizer.step()
    print(
        f"lane {session.lane}, memory {session.memory}: amplitude {amplitude:.2f}, rate {rate:.2f}"
    )
