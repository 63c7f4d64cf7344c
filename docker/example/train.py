"""The client of the Compose files: fits two parameters by gradients through the worker.

Its image has no jax.
"""

import os
from pathlib import Path

import torch

from bridge_client import Session, Tls, connect
from bridge_client.torch import RemoteJaxFunction

device, memory = ("cuda", "cuda_ipc") if torch.cuda.is_available() else ("cpu", "memfd")


def connected() -> Session:
    """Return a session: by shared memory over a Unix socket, else over TCP with TLS and a token."""
    address = os.environ["BRIDGE_ADDRESS"]
    if address.startswith("unix:"):
        return connect(address, require=memory, wait_s=60)
    authority = Path(os.environ["BRIDGE_TLS_CA"]).read_bytes()
    token = os.environ["BRIDGE_TOKEN_FILE"]
    return connect(address, tls=Tls(authority), token_file=token, wait_s=60)


t = torch.linspace(0, 6, 100, device=device)
seen = 2.0 * torch.exp(-0.3 * t) * torch.cos(t)
with connected() as session:
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
