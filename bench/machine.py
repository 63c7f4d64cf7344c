"""Description of the measured machine in general terms. Imports no framework."""

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

from bench import ROOT

_VERSIONS = (
    "import platform; from importlib.metadata import version; print(platform.python_version(),"
    " version('{}'))"
)


def describe() -> dict[str, str]:
    """Return the machine's relevant facts by name."""
    client_python, torch = _versions("torch")
    worker_python, jax = _versions("jax")
    return {
        "CPU": f"{_field('/proc/cpuinfo', 'model name')}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) / (1 << 20):.0f} GiB",
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "client": f"Python {client_python}, torch {torch}",
        "worker": f"Python {worker_python}, jax {jax}",
        "date": datetime.date.today().isoformat(),
    }


def _versions(framework: str) -> list[str]:
    python = ROOT / f".venv-{framework}/bin/python"
    code = _VERSIONS.format(framework)
    return subprocess.run(
        [python, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.split()


def _field(path: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.+)$", Path(path).read_text(), re.MULTILINE)
    return found[1] if found else "unknown"
