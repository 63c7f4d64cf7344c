"""A client that calls until it is ended, and prints a line for each call: the number of right
answers, or the wrong one. Its image has no jax.

count.py [slow]: calls the model `slow` once, before.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bridge_client import Tls, connect
from bridge_client.torch import RemoteJaxFunction

address = os.environ["BRIDGE_ADDRESS"]
access: dict[str, Any] = {"require": "memfd"}
if not address.startswith("unix:"):
    authority = Path(os.environ["BRIDGE_TLS_CA"]).read_bytes()
    access = {"tls": Tls(authority), "token_file": os.environ["BRIDGE_TOKEN_FILE"]}
with connect(address, wait_s=60, retry_s=60, retries=3, **access) as session:
    print("connected", session.lane, session.memory, flush=True)
    if "slow" in sys.argv:
        slow = RemoteJaxFunction(session, name="slow")
        print("calling slow", flush=True)
        print("slow", slow(torch.ones(2)).tolist(), flush=True)
    damped = RemoteJaxFunction(session, name="damped")
    t = torch.linspace(0, 6, 1000)
    number = 0
    while True:
        amplitude = torch.tensor(1.0 + number % 7, requires_grad=True)
        answer = damped(t, amplitude, torch.tensor(0.3))
        answer.sum().backward()
        slope = torch.exp(-0.3 * t) * torch.cos(t)
        torch.testing.assert_close(answer.detach(), amplitude.detach() * slope)
        torch.testing.assert_close(amplitude.grad, slope.sum(), rtol=1e-4, atol=1e-3)
        number += 1
        print("right", number, flush=True)
        time.sleep(0.05)
