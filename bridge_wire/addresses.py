"""Addresses of workers: loopback hosts, sockets' directories and paths. Resolves no names."""

import ipaddress
import os
import tempfile
from pathlib import Path

LONGEST_SOCKET_PATH = 107  # sun_path of sockaddr_un, less the final NUL
DEFAULT_SOCKET = "bridge.sock"  # of a worker without --listen


def socket_directories() -> list[Path]:
    """Return the directories in which this user's workers may have their sockets, best first."""
    # After su and in containers, XDG_RUNTIME_DIR may name a missing directory; on clusters TMPDIR
    # may be very long.
    parents = [os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]
    name = f"torch-jax-bridge-{os.geteuid()}"
    return [Path(parent, name) for parent in parents if parent]


def is_loopback(host: str) -> bool:
    """Whether a host, the part of an address before the port, is this host's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
