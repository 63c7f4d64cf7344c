#!/usr/bin/env python3
"""Writes docker/jax.lock and docker/torch.lock: exact versions with the hashes of their files.

They are for images with `--build-arg LOCKED=1`. uv, pinned below and installed into the user's
cache, resolves the requirements of pyproject.toml for Python 3.11 on Linux. Each lock names the
hash of the requirements that it was made from; a test compares it with pyproject.toml.

    python -m tools.lock
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

from tools.containers import CACHE, ROOT, ContainersFailed, execute, folder_of_torch

UV = "uv==0.13.9"
# PyPI's torch for Linux comes with CUDA; this index has the same version for the CPU.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# Which docker/Dockerfile installs beside those of the extra.
ALSO = {"jax": ["jax"], "torch": ["numpy"]}
_LIMIT_S = 300.0


def requirements(target: str) -> list[str]:
    """Return what the image of a target requires, by pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = project["optional-dependencies"][target]
    return sorted({*project["dependencies"], *own, *ALSO[target]})


def lock_of(target: str) -> Path:
    return ROOT / "docker" / f"{target}.lock"


def header(target: str) -> str:
    """Return the lines above a lock, which name its requirements' hash."""
    text = "\n".join(requirements(target))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"# Made by `make lock`, for Python 3.11 on Linux. Requirements: sha256:{digest}\n"


def resolved(uv: Path, target: str) -> str:
    """Return the pinned packages of a target, with hashes.

    Raises:
      ContainersFailed: uv found no versions, or no index.
    """
    options = ["--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
    options += ["--python-version=3.11", "--python-platform=linux", "--no-config"]
    if target == "torch":
        options += _source_of_torch()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "requirements.in")
        source.write_text("\n".join(requirements(target)))
        command = [str(uv), "pip", "compile", *options, str(source)]
        return execute(command, _settings(), timeout_s=_LIMIT_S).stdout


def _settings() -> dict[str, str]:
    """Return this process's variables; uv trusts the certificates that pip is told to."""
    certificates = os.environ.get("PIP_CERT")
    return os.environ | ({"SSL_CERT_FILE": certificates} if certificates else {})


def _source_of_torch() -> Sequence[str]:
    """Return uv's options for torch without CUDA: this machine's wheel, or PyTorch's index."""
    folder = folder_of_torch()
    if folder is not None:
        return [f"--find-links={folder}"]
    return [f"--extra-index-url={TORCH_INDEX}", "--index-strategy=unsafe-best-match"]


def main() -> int:
    folder = CACHE / "uv"
    python = folder / "bin" / "python"
    try:
        venv.create(folder, clear=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", UV]
        execute(pip, os.environ, timeout_s=_LIMIT_S)
        for target in ALSO:
            text = header(target) + resolved(folder / "bin" / "uv", target)
            lock_of(target).write_text(text)
            print(f"lock: wrote {lock_of(target).relative_to(ROOT)}")
    except ContainersFailed as failure:
        print(f"lock: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
