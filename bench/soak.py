"""Soak test: the memory growth of client and worker over many calls of 1 KiB.

The client runs in .venv-torch: imports torch, never jax.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from bench import ROOT
from bench.measure import KIB, Growth

_WARM_SHARE = 10  # a tenth of the calls warms up


def soak(calls: int) -> dict[str, Growth]:
    """Return the growth of "client" and "worker", measured in two new processes."""
    python = str(ROOT / ".venv-torch/bin/python")
    command = [python, "-m", "bench.soak", str(calls)]
    output = subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return {
        process: Growth(*resident) for process, resident in json.loads(output).items()
    }


def _measure(calls: int) -> dict[str, tuple[int, int]]:
    # This process is the measured client, not the caller of `soak`.
    import torch
    from tqdm import tqdm

    from bridge_client import spawn
    from bridge_client.torch import RemoteJaxFunction

    python = ROOT / ".venv-jax/bin/python"
    with spawn(
        jax_model="bench.models:sine", python=python, cwd=ROOT, require="memfd"
    ) as session:
        function = RemoteJaxFunction(session)
        x = torch.randn(KIB // 4, requires_grad=True)
        cotangent = torch.randn(KIB // 4)

        def run(calls: int) -> None:
            for _ in tqdm(
                range(calls), desc="calls of 1 KiB", mininterval=1, leave=False
            ):
                x.grad = None
                function(x).backward(cotangent)

        processes = {"client": os.getpid(), "worker": _only_child()}
        run(calls // _WARM_SHARE)
        before = {name: _resident_bytes(pid) for name, pid in processes.items()}
        run(calls)
        return {
            name: (before[name], _resident_bytes(pid))
            for name, pid in processes.items()
        }


def _only_child() -> int:
    (child,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return int(child)


def _resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (resident,) = re.findall(r"VmRSS:\s+(\d+) kB", status)
    return int(resident) * KIB


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]))))
