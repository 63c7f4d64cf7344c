"""`make soak`: eight clients against a worker that is killed and replaced all the time.

Every value and every gradient is checked. Prints the figures as JSON; the status is 1 if a value
was wrong, a call was lost, an exception reached a loop, or something was left behind.

    .venv-torch/bin/python -m tools.soak [--seconds 600] [--clients 8] [--seed 0]
"""

import argparse
import contextlib
import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from bridge_client import connect
from bridge_client.remote.session import RemoteSession
from bridge_client.torch import RemoteJaxFunction

ROOT = Path(__file__).resolve().parent.parent
_PYTHON = str(ROOT / ".venv-jax" / "bin" / "python")
_MODEL = """
def square(x):
    return x * x


def affine(x):
    return 2 * x + 1  # exact in any order of roundings
"""
_SIZES = (1, 16, 1024, 65_536, 1_000_003)
_PAUSES_S = 4.0, 12.0  # between two ends of a worker
_READY_S = 120.0


class Supervised:
    """A worker at one address: killed or terminated at random, and started again."""

    def __init__(self, directory: Path, chance: random.Random) -> None:
        (directory / "soaked.py").write_text(_MODEL)
        self.address = f"unix:{directory}/worker.sock"
        self.ends: Counter[str] = Counter()
        self._directory = directory
        self._chance = chance
        self._stop = threading.Event()
        self._process = self._started()
        self._thread = threading.Thread(target=self._replace_again_and_again)

    def _started(self) -> subprocess.Popen[bytes]:
        models = [f"--jax-model=soaked:{name}" for name in ("square", "affine")]
        with (self._directory / "log").open("ab") as log:
            return subprocess.Popen(
                [_PYTHON, "-m", "bridge_server", "--listen", self.address, *models],
                env={**os.environ, "PYTHONPATH": f"{self._directory}:{ROOT}"},
                stdout=log,
                stderr=log,
            )

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """End the worker in order; its status must be 0."""
        self._stop.set()
        self._thread.join()
        with connect(self.address, wait_s=_READY_S):
            pass
        self._process.terminate()
        self.ends[f"status {self._process.wait(60)}"] += 1

    def _replace_again_and_again(self) -> None:
        while not self._stop.wait(self._chance.uniform(*_PAUSES_S)):
            number = self._chance.choice((signal.SIGKILL, signal.SIGTERM))
            self.ends[number.name] += 1
            self._process.send_signal(number)
            self._process.wait(60)
            self._process = self._started()


def _client(address: str, seed: int, lane: str, seconds: float) -> dict[str, int]:
    """Call the models until the time is over; return what was seen."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    seen: Counter[str] = Counter()
    with connect(address, lane=lane, wait_s=_READY_S, retries=1) as session:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            size = chance.choice(_SIZES)
            x = torch.randn(size, generator=generator, requires_grad=True)
            try:
                seen[_checked(session, x, chance)] += 1
            except Exception as error:
                seen[f"exception {type(error).__name__}"] += 1
                print(f"client {seed}: {error!r}", file=sys.stderr, flush=True)
            if seen.total() == 100:
                _settle(seen)
        del x
        gc.collect()
        seen["blocks left"] = session.stats()["blocks"]
    seen["descriptors gained"] = _descriptors() - seen.pop("descriptors", 0)
    seen["MiB gained"] = _mib() - seen.pop("MiB", 0)
    return dict(seen)


def _checked(session: RemoteSession, x: torch.Tensor, chance: random.Random) -> str:
    name = chance.choice(("square", "affine"))
    y = RemoteJaxFunction(session, name=name)(x)
    weights = torch.arange(1.0, 1.0 + x.numel()) % 7
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    is_square = name == "square"
    value = x * x if is_square else 2 * x + 1
    slope = 2 * x if is_square else torch.full_like(x, 2)
    is_right = torch.equal(y, value) and torch.equal(gradient, slope * weights)
    return "right" if is_right else "wrong"


def _settle(seen: Counter[str]) -> None:
    """Note the resources once everything is warm."""
    seen["descriptors"], seen["MiB"] = _descriptors(), _mib()


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@contextlib.contextmanager
def _clients(
    address: str, options: argparse.Namespace
) -> Iterator[list[dict[str, int]]]:
    """Run the clients, each in a process of its own; yields the list of what they saw."""
    commands = [
        [sys.executable, "-m", "tools.soak", "--client", str(i), "--address", address]
        for i in range(options.clients)
    ]
    time_of = ["--seconds", str(options.seconds), "--seed", str(options.seed)]
    processes = [
        subprocess.Popen([*command, *time_of], stdout=subprocess.PIPE, cwd=ROOT)
        for command in commands
    ]
    seen: list[dict[str, int]] = []
    yield seen
    for process in processes:
        output, _ = process.communicate(timeout=options.seconds + 300)
        seen.append(json.loads(output) if output else {"lost clients": 1})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client is not None:
        lane = "local" if options.client % 2 else "grpc"
        seed = 1000 * options.seed + options.client
        print(json.dumps(_client(options.address, seed, lane, options.seconds)))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        worker = Supervised(Path(directory), random.Random(options.seed))
        with _clients(worker.address, options) as seen:
            worker.begin()
        worker.end()
    total = sum((Counter(each) for each in seen), Counter())
    # Counter's sum leaves out what is 0 or less.
    total["clients"] = len(seen)
    print(json.dumps({"clients": dict(total), "ends of workers": dict(worker.ends)}))
    faults = [name for name in total if name.startswith(("wrong", "exception", "lost"))]
    return 1 if faults or total["blocks left"] or not total["right"] else 0


if __name__ == "__main__":
    sys.exit(main())
