"""The command `bridge_client envs`: lists and removes the environments that `spawn` has made."""

import json
import time
from collections.abc import Iterable

from bridge_client.remote import environments
from bridge_client.remote.environments import Listed

_UNITS = ("B", "KiB", "MiB", "GiB")
_STEP = 1024
_DAY_S = 86_400


def show(is_json: bool) -> None:
    """Print the environments, the last used first."""
    rows = environments.listed()
    if is_json:
        print(json.dumps([_as_object(row) for row in rows]))
        return
    for row in rows:
        print(row.path)
        print(f"  {_size(row.nbytes)}, {_age(row)}, Python {row.python}")
        print(f"  {' '.join(row.requirements) or 'no requirements'}")
    if not rows:
        print(f"no environments in {environments.folder_of_environments()}")


def prune(days: float, is_json: bool) -> None:
    """Remove the environments that were not used for some days, and print their paths."""
    removed = map(str, environments.prune(days))
    if is_json:
        print(json.dumps({"removed": list(removed)}))
        return
    _print_each(removed)


def _print_each(paths: Iterable[str]) -> None:
    count = 0
    for path in paths:
        print(f"removed {path}", flush=True)
        count += 1
    print(f"{count} removed")


def _as_object(row: Listed) -> dict[str, object]:
    return {
        "path": str(row.path),
        "bytes": row.nbytes,
        "last_used": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(row.used)),
        "in_use": row.in_use,
        "python": row.python,
        "requirements": row.requirements,
    }


def _size(nbytes: float) -> str:
    for unit in _UNITS[:-1]:
        if nbytes < _STEP:
            return f"{nbytes:.0f} {unit}"
        nbytes /= _STEP
    return f"{nbytes:.1f} {_UNITS[-1]}"


def _age(row: Listed) -> str:
    if row.in_use:
        return "in use"
    days = int((time.time() - row.used) / _DAY_S)
    return f"last used {days} days ago" if days else "last used today"
