"""Which device a worker's models run on. Decided before any framework is imported; never imports
one.

`python -m bridge_server.process.devices` prints the GPUs that a process with this environment may
use.
"""

import argparse
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence

from bridge_server.runtime import Runtime
from bridge_wire.errors import CallerError, CudaError
from bridge_wire.memory.cuda import Gpu, device_of, gpus

_log = logging.getLogger(__name__)

CPU, CUDA = "cpu", "cuda"
_ONE_OF_THEM = re.compile(r"cuda:\d+|GPU-[0-9A-Fa-f-]+")
_FRACTION = "XLA_CLIENT_MEM_FRACTION"
# XLA takes either of the two, and neither torch nor this program looks at them.
_FRACTIONS = (_FRACTION, "XLA_PYTHON_CLIENT_MEM_FRACTION")
_CHILD_S = 60.0  # until it has started, on a busy machine


def parse_device(text: str) -> str:
    """Return the value of --device.

    Raises:
      ArgumentTypeError: it is none.
    """
    if text in (CPU, CUDA) or _ONE_OF_THEM.fullmatch(text):
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} is no device such as cpu, cuda, cuda:1 or GPU-5fc7c93e-..."
    )


def parse_fraction(text: str) -> float:
    """Return the value of --gpu-memory-fraction.

    Raises:
      ArgumentTypeError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no fraction such as 0.5: more than 0, and at most 1"
        )
    return value


def choose(device: str | None, fraction: float | None, *, is_spread: bool) -> None:
    """Set this process's environment so that frameworks run models on that device; None leaves it
    to them.

    `is_spread` says that models span several devices. Memory is taken as it is needed, unless the
    user wants otherwise.

    Raises:
      CallerError: there is no such device, or the options contradict each other or the environment.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if fraction is not None:
        _limit(fraction, device)
    if device is None:
        return
    if device == CPU:
        os.environ.update(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
    else:
        there = _visible()
        if device != CUDA and is_spread:
            raise CallerError(
                f"--device {device} is one device, and --mesh is for several: use --device cuda"
            )
        ordinal = _ordinal(device, there)
        if device != CUDA:
            _narrow_to(ordinal)
    os.environ.pop("BRIDGE_DEVICE", None)  # processes that this one starts see no more than it does


def gpu_at(ordinal: int | None) -> Gpu | None:
    """Return the GPU that frameworks in this process know by that number; None if there is none,
    as of the host."""
    return (
        None if ordinal is None else next((gpu for gpu in gpus() if gpu.ordinal == ordinal), None)
    )


def make_ready(runtime: Runtime) -> None:
    """Prepare to share memory on the GPU, if models run on one: to load CuPy takes longer than a
    client may wait."""
    gpu = runtime.gpu()
    if gpu is None:
        return
    try:
        device_of(gpu.uuid)
    except CudaError as error:
        _log.warning("clients' tensors on the GPU will travel through the host, since %s", error)


def refuse_host(device: str | None, runtime: Runtime) -> None:
    """Raise CallerError if a GPU was asked for and the framework finds none."""
    about = runtime.describe()
    has_any = runtime.gpu() is not None or any(name.startswith(CUDA) for name in about.devices)
    if device not in (None, CPU) and not has_any:
        raise CallerError(
            f"--device {device}, but {about.framework} finds {', '.join(about.devices)} only:"
            f" install a {about.framework} with CUDA in the worker's environment"
        )


def _limit(fraction: float, device: str | None) -> None:
    if device == CPU:
        raise CallerError(
            "--gpu-memory-fraction is about a GPU, and --device cpu about none; leave out one of"
            " them"
        )
    for name in _FRACTIONS:
        if os.environ.get(name) not in (None, "", str(fraction)):
            raise CallerError(
                f"both --gpu-memory-fraction {fraction} and the variable {name}={os.environ[name]}"
                " say how much memory XLA may take; leave out one of them"
            )
    if not any(os.environ.get(name) for name in _FRACTIONS):
        os.environ[_FRACTION] = str(fraction)


def _visible() -> list[tuple[str, str]]:
    """Return the UUID and the name of each GPU that this process may use."""
    # In a child: CUDA reads CUDA_VISIBLE_DEVICES when it is first used, once and for all.
    command = [sys.executable, "-m", "bridge_server.process.devices"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_CHILD_S
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CallerError(
            f"the NVIDIA driver does not tell which GPUs there are: {error}"
        ) from error
    return [
        (label, name) for label, _, name in (line.partition(" ") for line in found.splitlines())
    ]


def _ordinal(device: str, there: Sequence[tuple[str, str]]) -> int:
    """Return the number of a device among those that are there."""
    if device.startswith(CUDA):
        matching = [int(device.removeprefix(CUDA).removeprefix(":") or 0)]
    else:
        matching = [
            i for i, (label, _) in enumerate(there) if label.lower().startswith(device.lower())
        ]
    if len(matching) != 1 or matching[0] >= len(there):
        listed = ", ".join(f"cuda:{i} ({label}, {name})" for i, (label, name) in enumerate(there))
        raise CallerError(
            f"--device {device} is not here; this process may use {listed or 'no NVIDIA GPU'}"
        )
    return matching[0]


def _narrow_to(ordinal: int) -> None:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    # By the user's own words for it, since not all of what they can name, such as a part of a GPU,
    # has a UUID here.
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        str(ordinal) if chosen is None else chosen.split(",")[ordinal].strip()
    )


if __name__ == "__main__":
    for gpu in gpus():
        print(gpu.label, gpu.name)
