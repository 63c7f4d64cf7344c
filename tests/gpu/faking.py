"""A machine with GPUs that are none: for this process, and for those that it starts."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from bridge_wire.memory import cuda
from bridge_wire.memory.cuda_memory import end_what_is_left

FAKE = Path(__file__).resolve().parent / "fake"
ROOT = FAKE.parent.parent.parent
_VARIABLES = (
    "PYTHONPATH",
    "CUDA_VISIBLE_DEVICES",
    "FAKE_CUDA_DIR",
    "FAKE_CUDA_GPUS",
    "FAKE_CUDA_BYTES",
    "FAKE_CUDA_FAILS",
)
_MODULES = ("fake_cuda", "cupy", "cupy.cuda")


def environment(
    directory: Path, *gpus: str, nbytes: int | None = None
) -> dict[str, str]:
    """Return the variables of a process that is to see the GPUs of the machine in this directory;
    by default it has one.
    """
    machine = directory / "gpus"
    machine.mkdir(exist_ok=True)
    paths = [str(FAKE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"FAKE_CUDA_DIR": str(machine), "PYTHONPATH": os.pathsep.join(paths)}
    if gpus:
        variables["FAKE_CUDA_GPUS"] = ",".join(gpus)
    if nbytes is not None:
        variables["FAKE_CUDA_BYTES"] = str(nbytes)
    return variables


@contextlib.contextmanager
def installed(directory: Path, *gpus: str, nbytes: int | None = None) -> Iterator[Any]:
    """Let this process, and those that it starts, see the GPUs of the machine in this directory.

    Gives `fake_cuda`.
    """
    variables = environment(directory, *gpus, nbytes=nbytes)
    before = {name: os.environ.pop(name, None) for name in _VARIABLES}
    modules = {name: sys.modules.pop(name) for name in _MODULES if name in sys.modules}
    os.environ.update(variables)
    sys.path.insert(0, str(FAKE))
    _forget()
    fake = importlib.import_module("fake_cuda")
    fake.install()
    try:
        yield fake
    finally:
        end_what_is_left()
        _forget()
        fake.uninstall()
        if "cupy" in sys.modules:
            sys.modules["cupy"].undo()
        sys.path.remove(str(FAKE))
        _replace(modules)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _forget() -> None:
    cuda.driver.cache_clear()
    cuda.device_of.cache_clear()


def _replace(modules: dict[str, ModuleType]) -> None:
    for name in _MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(modules)
