"""The directory in which JAX and Inductor keep compiled code between starts. Imports no framework.

Both load executables from it, so it must be this user's alone.
"""

import contextlib
import hashlib
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

from bridge_wire.errors import CallerError

_log = logging.getLogger(__name__)

_JAX = "JAX_COMPILATION_CACHE_DIR"
_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
# To read even a small program takes a few milliseconds; to compile it takes tens.
_SHORTEST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_ENABLED = "JAX_ENABLE_COMPILATION_CACHE"
_OFF = ("0", "false", "no", "off", "n", "f")
_MOST_BYTES = 2 << 30  # of JAX's entries, when a worker starts


def keep(directory: str | None) -> None:
    """Have the frameworks keep compiled code in a directory; call before they are imported.

    None is the user's cache, unless JAX_COMPILATION_CACHE_DIR names another directory; an empty
    text is none at all.

    Raises:
      CallerError: the directory is given, and cannot be used or is not this user's alone.
    """
    if directory == "" or _is_disabled():
        return
    if directory is None and _JAX in os.environ:
        return
    try:
        found = _usable(Path(directory) if directory else default())
    except (CallerError, OSError, RuntimeError) as error:
        reason = f"compiled code is not kept for later starts: {error}"
        if directory:
            raise CallerError(f"--compilation-cache {directory}: {reason}") from error
        _log.info("%s", reason)
        return
    os.environ[_JAX] = str(found / "jax")
    os.environ.setdefault(_SHORTEST, "0")
    os.environ.setdefault(_INDUCTOR, str(found / "inductor"))


def described() -> str:
    """Return where a worker with the variables of this process would keep compiled code."""
    named = os.environ.get("BRIDGE_COMPILATION_CACHE")
    if named == "" or _is_disabled() or _is_on("BRIDGE_NO_COMPILATION_CACHE"):
        return "off"
    if named is None and _JAX in os.environ:
        return f"{os.environ[_JAX]}, from {_JAX}"
    try:
        return str(Path(named) if named else default())
    except RuntimeError as error:
        return f"off: {error}"


def default() -> Path:
    """Return the directory in the user's cache.

    Raises:
      RuntimeError: this user has no home directory.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification ignores relative paths.
    parent = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    return parent / "torch-jax-bridge" / "compiled"


def _is_disabled() -> bool:
    return os.environ.get(_ENABLED, "").lower() in _OFF


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on")


def _usable(directory: Path) -> Path:
    """Make the directory of this machine's processor, with mode 0700, and return it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A home directory can be shared by hosts whose processors lack each other's instructions.
    found = directory.resolve() / _processor()
    for part in (found, found / "jax", found / "inductor"):
        part.mkdir(mode=0o700, exist_ok=True)
        _refuse_others(part)
    _refuse_others(directory.resolve())
    if not os.access(found / "jax", os.W_OK | os.X_OK):
        raise CallerError(f"{found} cannot be written to")
    _shorten(found / "jax")
    return found


def _refuse_others(directory: Path) -> None:
    status = directory.lstat()
    if (
        not stat.S_ISDIR(status.st_mode)
        or status.st_uid != os.geteuid()
        or status.st_mode & 0o022
    ):
        raise CallerError(
            f"{directory} is not a directory of this user that others cannot write to, and code is"
            " loaded from it; correct that, or name another directory"
        )


def _processor() -> str:
    """Return a digest of the processor's instructions."""
    told = os.uname().machine
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = ("flags", "Features", "model name")
        told += "\n".join(sorted({x for x in lines if x.startswith(names)}))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _shorten(directory: Path) -> None:
    """Remove the entries that were read longest ago, if there are too many bytes."""
    entries = [(path, path.stat()) for path in directory.iterdir()]
    nbytes = sum(status.st_size for _, status in entries)
    read: Callable[[tuple[Path, os.stat_result]], float] = lambda x: x[1].st_atime  # noqa: E731
    for path, status in sorted(entries, key=read):
        if nbytes <= _MOST_BYTES:
            return
        with contextlib.suppress(OSError):  # another worker has removed it
            path.unlink()
        nbytes -= status.st_size
