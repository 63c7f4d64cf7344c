"""The command `bridge_client ps`: this user's workers on this host, found in /proc."""

import contextlib
import ipaddress
import json
import os
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bridge_client.commands.health import health_of
from bridge_wire.errors import BridgeError

_PROC = Path("/proc")
_LISTENING = "0A"  # the state in /proc/net/tcp
_ACCEPTS = "00010000"  # the flag in /proc/net/unix
_LANE = ".lane"
_OTHER_COMMANDS = ("doctor", "token", "config")
_PROBE_S = 2.0
_PARENT_FIELD, _START_FIELD = 1, 19
_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Found:
    """A worker's process: its addresses, health, age in seconds, and arguments."""

    pid: int
    addresses: tuple[str, ...]
    status: str
    seconds: int
    arguments: tuple[str, ...]


def show(is_json: bool) -> None:
    """Print the workers, the oldest first."""
    found = sorted(workers(), key=lambda each: -each.seconds)
    if is_json:
        print(json.dumps([asdict(each) for each in found]))
        return
    for each in found:
        where = " ".join(each.addresses) or "no address yet"
        print(f"{each.pid:>8} {each.status:<12} {each.seconds:>7} s  {where}")
        print(f"{'':>8} {textwrap.shorten(' '.join(each.arguments), _WIDTH)}")
    if not found:
        print("no worker of this user runs here")


def workers() -> Iterator[Found]:
    """Yield the workers of this user that this process can see."""
    sockets = _sockets()
    found: list[tuple[Path, list[str], list[str]]] = []
    parents = set[str]()
    for folder in _PROC.glob("[0-9]*"):
        # A process may end at any time, and those of others hide their descriptors.
        with contextlib.suppress(OSError):
            arguments = _arguments(folder)
            if arguments is not None and folder.stat().st_uid == os.geteuid():
                inodes = _inodes(folder)
                names = [name for inode, name in sockets.items() if inode in inodes]
                found.append((folder, arguments, names))
                parents.add(_numbers(folder)[_PARENT_FIELD])
    for folder, arguments, names in found:
        is_supervisor = not names and folder.name in parents  # of --reload
        if not is_supervisor:
            with contextlib.suppress(OSError):
                yield _found(folder, arguments, names)


def _found(folder: Path, arguments: list[str], listening: list[str]) -> Found:
    answers = {name: _status(name) for name in listening}
    # Others, such as that of --metrics, speak no gRPC.
    addresses = tuple(name for name, status in answers.items() if status)
    status = answers[addresses[0]] if addresses else "starting"
    if listening and not addresses:  # it is busy or stopped, or needs TLS
        addresses, status = tuple(listening), "no answer"
    return Found(int(folder.name), addresses, status, _age(folder), tuple(arguments))


def _age(folder: Path) -> int:
    """Return the seconds since a process's start, which its file has in ticks after the boot."""
    started_s = int(_numbers(folder)[_START_FIELD]) / os.sysconf("SC_CLK_TCK")
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)


def _numbers(folder: Path) -> list[str]:
    """Return the fields after the process's name, see proc(5)."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def _status(address: str) -> str:
    with contextlib.suppress(BridgeError), health_of(address) as health:
        return health.status(_PROBE_S)
    return ""


def _arguments(folder: Path) -> list[str] | None:
    """Return the arguments of a process that is `bridge_server`, else None."""
    words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    for i, word in enumerate(words[:4]):
        is_script = os.path.basename(word) == "bridge_server" and i < 2
        is_module = word == "bridge_server" and words[i - 1] == "-m"
        if is_script or is_module:
            rest = words[i + 1 :]
            return None if rest[:1] and rest[0] in _OTHER_COMMANDS else rest
    return None


def _inodes(folder: Path) -> set[str]:
    links = set[str]()
    for descriptor in (folder / "fd").iterdir():
        with contextlib.suppress(OSError):
            links.add(os.readlink(descriptor))
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def _sockets() -> dict[str, str]:
    """Return the addresses of this host's listening sockets by inode, without local lanes."""
    found: dict[str, str] = {}
    for line in _lines("unix"):
        words = line.split(maxsplit=7)
        is_named = len(words) == 8 and not words[7].endswith(_LANE)
        if is_named and words[3] == _ACCEPTS:
            found[words[6]] = f"unix:{words[7]}"
    for line in [*_lines("tcp"), *_lines("tcp6")]:
        words = line.split()
        if words[3] == _LISTENING:
            found[words[9]] = _host_and_port(words[1])
    return found


def _lines(name: str) -> list[str]:
    with contextlib.suppress(OSError):
        return (_PROC / "net" / name).read_text().splitlines()[1:]
    return []


def _host_and_port(text: str) -> str:
    """Return an address of /proc/net/tcp: words of four bytes in the host's order, in hex."""
    host, port = text.split(":")
    words = (bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8))
    address = ipaddress.ip_address(b"".join(words))
    shown = f"[{address}]" if address.version == 6 else str(address)
    return f"{shown}:{int(port, 16)}"
