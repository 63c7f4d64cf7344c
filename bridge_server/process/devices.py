"""Choice of the device for a worker's models, made before any framework import.

Imports no framework. `python -m bridge_server.process.devices` prints the GPUs that a process with
this environment may use.
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
from bridge_wire.memory.cuda import device_of, gpus

_log = logging.getLogger(__name__)

CPU, CUDA = "cpu", "cuda"
_GPU = "gpu"
_ONE_OF_THEM = re.compile(r"cuda:\d+|GPU-[0-9A-Fa-f-]+")
_FRACTION = "XLA_CLIENT_MEM_FRACTION"
# XLA reads either variable; torch and this program read neither.
_FRACTIONS = (_FRACTION, "XLA_PYTHON_CLIENT_MEM_FRACTION")
_CHILD_S = 60.0  # deadline for the child process, which starts slowly on a busy machine


def parse_device(text: str) -> str:
    """Return the value of --device.

    Raises:
      ArgumentTypeError: the text is not a device.
    """
    # JAX calls them gpu, torch cuda.
    name, colon, number = text.partition(":")
    device = f"{CUDA}{colon}{number}" if name == _GPU else text
    if device in (CPU, CUDA) or _ONE_OF_THEM.fullmatch(device):
        return device
    hint = "; JAX takes a TPU without --device" if text.startswith("tpu") else ""
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a device; expected cpu, cuda, cuda:1 or GPU-5fc7c93e-...{hint}"
    )


def parse_fraction(text: str) -> float:
    """Return the value of --gpu-memory-fraction.

    Raises:
      ArgumentTypeError: the text is not a fraction.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a fraction; expected more than 0 and at most 1, such as 0.5"
        )
    return value


def choose(device: str | None, fraction: float | None, *, is_spread: bool) -> None:
    """Set this process's environment so that frameworks run models on the device.

    With None the frameworks choose the device. `is_spread`: the models span several devices. Unless
    the user has set otherwise, XLA's preallocation is disabled.

    Raises:
      CallerError: the device does not exist, or the options contradict each other or the
        environment.
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
                f"--device {device} is one device, but --mesh needs several; use --device cuda"
            )
        ordinal = _ordinal(device, there)
        if device != CUDA:
            _narrow_to(ordinal)
    # Child processes inherit the narrowed environment.
    os.environ.pop("BRIDGE_DEVICE", None)


def make_ready(runtime: Runtime) -> None:
    """Prepare to share GPU memory if models run on a GPU.

    Loading CuPy takes longer than a client may wait.
    """
    gpu = runtime.gpu()
    if gpu is None:
        return
    try:
        device_of(gpu.uuid)
    except CudaError as error:
        _log.warning(
            "clients' GPU tensors will be copied through host memory: %s", error
        )


def refuse_host(device: str | None, runtime: Runtime) -> None:
    """Raise CallerError if --device requires a GPU and the framework finds none."""
    about = runtime.describe()
    has_any = runtime.gpu() is not None or any(
        name.startswith(CUDA) for name in about.devices
    )
    if device not in (None, CPU) and not has_any:
        raise CallerError(
            f"--device {device}, but {about.framework} finds {', '.join(about.devices)} only;"
            f" install {about.framework} with CUDA in the worker's environment"
        )


def _limit(fraction: float, device: str | None) -> None:
    if device == CPU:
        raise CallerError(
            "--gpu-memory-fraction needs a GPU, but --device is cpu; remove one of the two options"
        )
    for name in _FRACTIONS:
        if os.environ.get(name) not in (None, "", str(fraction)):
            raise CallerError(
                f"--gpu-memory-fraction {fraction} and the variable {name}={os.environ[name]}"
                " both limit XLA's memory; remove one of the two"
            )
    if not any(os.environ.get(name) for name in _FRACTIONS):
        os.environ[_FRACTION] = str(fraction)


def _visible() -> list[tuple[str, str]]:
    """Return the UUID and the name of each GPU that this process may use."""
    # In a child process, since CUDA reads CUDA_VISIBLE_DEVICES only once, at its first use.
    command = [sys.executable, "-m", "bridge_server.process.devices"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_CHILD_S
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CallerError(
            f"cannot list the GPUs through the NVIDIA driver: {error}"
        ) from error
    return [
        (label, name)
        for label, _, name in (line.partition(" ") for line in found.splitlines())
    ]


def _ordinal(device: str, there: Sequence[tuple[str, str]]) -> int:
    """Return the ordinal of a device among the visible GPUs."""
    if device.startswith(CUDA):
        matching = [int(device.removeprefix(CUDA).removeprefix(":") or 0)]
    else:
        matching = [
            i
            for i, (label, _) in enumerate(there)
            if label.lower().startswith(device.lower())
        ]
    if len(matching) != 1 or matching[0] >= len(there):
        listed = ", ".join(
            f"cuda:{i} ({label}, {name})" for i, (label, name) in enumerate(there)
        )
        raise CallerError(
            f"--device {device} is not visible; this process may use {listed or 'no NVIDIA GPU'}"
        )
    return matching[0]


def _narrow_to(ordinal: int) -> None:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Keep the user's own entry, since some entries, such as a MIG slice, have no UUID here.
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        str(ordinal) if chosen is None else chosen.split(",")[ordinal].strip()
    )


if __name__ == "__main__":
    for gpu in gpus():
        print(gpu.label, gpu.name)
