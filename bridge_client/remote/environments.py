"""Virtual environments of workers, made by uv, one per content, in the user's cache.

An environment is made below a temporary name and renamed, so that it is whole or absent. A lock
file beside it is locked exclusively while it is made or removed, and shared while it is in use.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bridge_client.remote.own_wheel import own_wheel
from bridge_client.remote.script_headers import headers_of
from bridge_wire.errors import CallerError, WorkerCrashed

_log = logging.getLogger(__name__)

_FORMAT = "1"  # of the folders; a change makes new ones
_RECORD = "bridge.json"
_PART = ".part"
_LAST_LINES = 15
_VERSION = re.compile(r"\d+(\.\d+){0,2}|[<>=!~].*")
# Variables of uv that choose packages and interpreters: others make the same environment.
_CHOOSING = re.compile(
    r"UV_.*(INDEX|FIND_LINKS|PRERELEASE|RESOLUTION|EXCLUDE_NEWER|CONSTRAINT|OVERRIDE|BACKEND|CONFIG)"
)
# A name with extras, then versions or a URL, then markers; or a URL alone. No paths, no options.
_VERSIONS = r"[<>=!~]=?=?\s*[\w.*+-]+(![\w.*+-]+)?"
_REQUIREMENT = re.compile(
    r"[A-Za-z0-9][\w.-]*\s*(\[[\w\s,.-]*\])?"
    rf"\s*(\(?({_VERSIONS}\s*,?\s*)*\)?|@\s*\S+)"
    r"(\s*;((?! -).)*)?"
    r"|[a-z+]+://\S+"
)
# Variables that would direct uv to this process's own environment.
_NOT_FOR_UV = {"VIRTUAL_ENV", "CONDA_PREFIX", "UV_PROJECT_ENVIRONMENT"}
_INSTALL = 'pip install "torch-jax-bridge[uv]"'


@dataclass(frozen=True, slots=True)
class Recipe:
    """The content of an environment: requirements, and a Python version or interpreter."""

    requirements: tuple[str, ...]
    python: str

    def key(self) -> str:
        """Return a name that is the same for the same content."""
        chosen = {
            name: value for name, value in os.environ.items() if _CHOOSING.match(name)
        }
        content = (
            _FORMAT,
            self.requirements,
            self.python,
            own_wheel().digest,
            platform.machine(),
            sorted(chosen.items()),
        )
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


class Environment:
    """An environment in use: it is not removed before `close`, or before the process ends."""

    def __init__(self, folder: Path, lock: IO[str]) -> None:
        self.python = str(folder / "bin" / "python")
        self._lock = lock

    def close(self) -> None:
        """Allow the environment to be removed. Idempotent."""
        self._lock.close()


@dataclass(frozen=True, slots=True)
class Listed:
    """A row of `bridge_client envs`; `used` is seconds since the epoch."""

    path: Path
    nbytes: int
    used: float
    python: str
    requirements: tuple[str, ...]
    in_use: bool


def recipe_for(
    targets: Iterable[str],
    requirements: Sequence[str] | None,
    python: str | None,
    cwd: str | os.PathLike[str] | None,
) -> Recipe | None:
    """Return the environment that a worker needs; None if an existing interpreter runs it.

    Arguments come before the headers of the targets' files. An interpreter without requirements is
    used as it is.

    Raises:
      CallerError: a requirement or a header is malformed, or there are no requirements.
    """
    is_version = python is not None and bool(_VERSION.fullmatch(python))
    if requirements is None and python is not None and not is_version:
        return None
    headers = headers_of(targets, cwd)
    if requirements is None and not headers:
        if is_version:
            raise CallerError(
                f"python={python!r} is a version, for which an environment is made, but its"
                ' packages are unknown: pass requirements=["jax"], write them into a `# /// script`'
                " header of the model's file, or pass python= the path of an interpreter"
            )
        return None
    if requirements is None:
        requirements = [each for header in headers for each in header.dependencies]
    versions = ",".join(filter(None, (header.requires_python for header in headers)))
    chosen = python or versions or os.path.realpath(sys.executable)
    return Recipe(_checked(requirements), chosen)


def _checked(requirements: Sequence[str]) -> tuple[str, ...]:
    if isinstance(requirements, str):
        raise CallerError(
            f"requirements={requirements!r}; expected a list, such as ['jax', 'equinox']"
        )
    for each in requirements:
        if (
            not isinstance(each, str)
            or not each.isprintable()
            or not _REQUIREMENT.fullmatch(each)
        ):
            raise CallerError(
                f"requirement {each!r}; expected a package as for pip, such as 'jax>=0.8', and no"
                " option or path: for code of your own use cwd=, PYTHONPATH in env=, or a wheel"
            )
        if "file:" in each and not each.endswith(".whl"):
            raise CallerError(
                f"requirement {each!r} is a folder, whose changes would not be noticed; build a"
                " wheel of it"
            )
    return tuple(sorted(set(requirements)))


def environment(recipe: Recipe) -> Environment:
    """Return an environment with the recipe's packages and the bridge; make it if it is missing.

    Raises:
      CallerError: uv is missing, or the cache cannot be written to.
      WorkerCrashed: uv failed; the message has its last lines.
    """
    folder = folder_of_environments() / recipe.key()
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_others(folder.parent)
        lock = _lock_file(folder)
    except OSError as error:
        raise CallerError(
            f"cannot write to the folder of environments {folder.parent}: {error.strerror}; set"
            " XDG_CACHE_HOME to another one"
        ) from error
    try:
        _wait_for(lock, fcntl.LOCK_SH, folder)
        while not _is_whole(folder):
            _wait_for(lock, fcntl.LOCK_EX, folder)
            # Another process may have made it meanwhile.
            if not _is_whole(folder):
                _make(recipe, folder, lock)
            fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(folder / _RECORD)
    except BaseException:
        lock.close()
        raise
    return Environment(folder, lock)


def folder_of_environments() -> Path:
    """Return the folder of all environments of this user."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification ignores relative paths.
    try:
        parent = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    except RuntimeError as error:
        raise CallerError(
            "this user has no home directory for the cache of environments; set XDG_CACHE_HOME"
        ) from error
    return parent / "torch-jax-bridge" / "envs"


def listed() -> list[Listed]:
    """Return the environments, the last used first."""
    found = []
    for folder in _folders():
        content = _content_of(folder)
        if content is not None and _is_whole(folder):
            found.append(_listed(folder, content))
        elif content is None and (folder / _RECORD).exists():
            _say(
                f"{folder / _RECORD} is malformed, so its environment is not used; remove it with"
                " `bridge_client envs --prune`, or let spawn make it again"
            )
    return sorted(found, key=lambda each: -each.used)


def prune(days: float) -> Iterator[Path]:
    """Remove environments that no worker uses, and none has used for some days; yield their paths.

    Also removes the remains of those that were not finished.
    """
    for folder in _folders():
        whole = folder.with_name(folder.name.removesuffix(_PART))
        with _lock_file(whole) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # in use
                continue
            record = folder / _RECORD
            is_young = (
                _is_whole(folder)
                and time.time() - record.stat().st_mtime < days * 86_400
            )
            if folder.exists() and not is_young:
                _remove(folder)
                yield folder


def _folders() -> list[Path]:
    root = folder_of_environments()
    return [path for path in sorted(root.glob("*")) if _is_own(path)]


def _listed(folder: Path, content: Mapping[str, Any]) -> Listed:
    record = folder / _RECORD
    with _lock_file(folder) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            in_use = False
        except BlockingIOError:
            in_use = True
    files = (path.lstat() for path in folder.rglob("*"))
    return Listed(
        folder,
        sum(file.st_size for file in files),
        record.stat().st_mtime,
        content["python"],
        tuple(content["requirements"]),
        in_use,
    )


def _content_of(folder: Path) -> dict[str, Any] | None:
    """Return an environment's record; None if it is missing or malformed."""
    try:
        content: dict[str, Any] = json.loads((folder / _RECORD).read_text())
        texts = [content["python"], *content["requirements"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return content if all(isinstance(each, str) for each in texts) else None


def _is_whole(folder: Path) -> bool:
    """Whether the environment is complete, and its base interpreter still exists."""
    if folder.name.endswith(_PART) or not _is_own(folder):
        return False
    if not os.access(folder / "bin" / "python", os.X_OK):
        return False
    return _content_of(folder) is not None


def _is_own(folder: Path) -> bool:
    """Whether this is a directory of this user, and no link to one."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _refuse_others(folder: Path) -> None:
    """Raise CallerError for a folder in which another user could make an environment."""
    if not _is_own(folder) or folder.stat().st_mode & 0o022:
        raise CallerError(
            f"the folder of environments {folder} belongs to another user, or others can write to"
            " it: their programs would run as this user; correct it, or set XDG_CACHE_HOME to"
            " another one"
        )


def _lock_file(folder: Path) -> IO[str]:
    return open(folder.with_name(f"{folder.name}.lock"), "a")


def _wait_for(lock: IO[str], how: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        _say(f"waiting for another process, which makes the environment {folder}")
        fcntl.flock(lock, how)


def _make(recipe: Recipe, folder: Path, lock: IO[str]) -> None:
    uv = _find_uv()
    packages = ", ".join(recipe.requirements) or "no packages"
    _say(f"making an environment with {packages}, once: {folder}")
    begun = time.monotonic()
    part = folder.with_name(f"{folder.name}{_PART}")
    _remove(part)
    _remove(folder)
    part.mkdir(mode=0o700)
    wheel = own_wheel()
    files = part / wheel.name, part / "requirements.txt"
    files[0].write_bytes(wheel.content)
    files[1].write_text("".join(f"{each}\n" for each in recipe.requirements))
    python = str(part / "bin" / "python")
    venv = ["venv", "--relocatable", "--no-project", "--allow-existing"]
    install = ["pip", "install", "--python", python]
    try:
        _run([uv, *venv, "--python", recipe.python, str(part)], lock)
        _run([uv, *install, str(files[0]), "-r", str(files[1])], lock)
        for file in files:
            file.unlink()
        content = {"requirements": recipe.requirements, "python": recipe.python}
        (part / _RECORD).write_text(json.dumps(content))
        part.rename(folder)
    finally:
        _remove(part)
    _say(f"the environment is ready after {time.monotonic() - begun:.1f} s")


def _find_uv() -> str:
    with contextlib.suppress(ImportError, FileNotFoundError):
        from uv import find_uv_bin

        return str(find_uv_bin())
    found = shutil.which("uv")
    if found is None:
        raise CallerError(
            "an environment is made by uv, which is neither installed here nor on PATH: run"
            f" `{_INSTALL}`, or make the environment yourself and pass python= its interpreter"
        )
    return found


def _run(command: list[str], lock: IO[str]) -> None:
    """Run uv, which holds the lock too, should this process be killed before."""
    variables = {
        name: value for name, value in os.environ.items() if name not in _NOT_FOR_UV
    }
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=variables | {"UV_NO_PROGRESS": "1"},
            pass_fds=[lock.fileno()],
        )
    except OSError as error:
        raise WorkerCrashed(
            f"uv cannot be started: {command[0]}: {error.strerror}; reinstall it with `{_INSTALL}`"
        ) from error
    if done.returncode:
        lines = done.stdout.strip().splitlines()[-_LAST_LINES:] or ["(no output)"]
        raise WorkerCrashed(
            f"uv could not make the worker's environment: `uv {command[1]}` exited with status"
            f" {done.returncode}; its last lines:\n  " + "\n  ".join(lines)
        )


def _remove(folder: Path) -> None:
    if not folder.exists():
        return
    # An environment that is half removed must not look whole.
    (folder / _RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _say(text: str) -> None:
    """Tell the user, by the log or else on stderr."""
    if _log.isEnabledFor(logging.INFO) and _log.hasHandlers():
        _log.info("%s", text)
    else:
        print(f"[bridge] {text}", file=sys.stderr, flush=True)
