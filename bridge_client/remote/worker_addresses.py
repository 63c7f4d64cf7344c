"""Addresses of workers as users give them, and the reasons for which no worker answers at one."""

import os
import re
import socket
import stat
from pathlib import Path

from bridge_wire.addresses import DEFAULT_SOCKET, is_loopback, socket_directories
from bridge_wire.errors import CallerError, WorkerUnavailable

_LAST_PORT = 65_535
_UNIX = "unix:"
# Forms that gRPC resolves itself.
_OF_GRPC = ("unix-abstract:", "dns:", "ipv4:", "ipv6:", "vsock:")
_PATH = re.compile(r"[~./].*|.*\.sock")
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # read by gRPC
_CLOSED = (
    "it closed the connection, since it ends, or since it has TLS and this client has none; give"
    " its authority with tls= or --tls-ca"
)
# The reasons by words of gRPC's details, which name them in the middle of its own.
_REASONS = {
    "No such file": "there is no such socket; start the worker, or give the address of its ready"
    " line",
    "Permission denied": "this user may not use the socket, or enter its directory",
    "Connection refused": "nothing listens there; start the worker, or give the address of its"
    " ready line",
    "CERTIFICATE_VERIFY_FAILED": "the worker's certificate is not of the given authority, or not"
    " for this host name; name the right one with tls= or --tls-ca",
    "handshake": "the TLS handshake failed; the worker may have no TLS, or the authority given by"
    " tls= or --tls-ca is not its own",
    "root_certificates": "the authority given by tls= or --tls-ca is no PEM certificate",
    "Socket closed": _CLOSED,
    "reset by peer": _CLOSED,
    "resolution": "the host's name is unknown; look for a misspelling",
    "hostname lookup": "the host's name is unknown; look for a misspelling",
    "timed out": "the host does not answer; look for a firewall or a wrong host",
    "unreachable": "the network does not reach the host",
}


def resolved(address: object) -> str:
    """Return an address in gRPC's form; None is the default endpoint of this user's workers.

    A path, such as "/run/bridge/bridge.sock", means "unix:PATH".

    Raises:
      CallerError: the address has another form.
      WorkerUnavailable: no address is given, and there is no socket at the default endpoint.
    """
    if address is None:
        return _default()
    if not isinstance(address, str):
        raise CallerError(f"address={address!r}; expected 'unix:PATH' or 'HOST:PORT'")
    if address.startswith(("http://", "https://")):
        rest = address.partition("://")[2].strip("/")
        raise CallerError(
            f"address={address!r} is a URL; expected 'unix:PATH' or 'HOST:PORT', such as {rest!r}"
        )
    if address.startswith(_OF_GRPC):
        return address
    if _PATH.fullmatch(address) and ":" not in address:
        return f"{_UNIX}{os.path.abspath(os.path.expanduser(address))}"
    host, _, port = address.rpartition(":")
    is_path = address.startswith(_UNIX) and address != _UNIX
    is_port = host and port.isdecimal() and 0 < int(port) <= _LAST_PORT
    if not (address.isprintable() and (is_path or is_port)):
        raise CallerError(
            f"address={address!r}; expected 'unix:PATH' or 'HOST:PORT' with a port from 1 to"
            f" {_LAST_PORT}"
        )
    return address


def default_sockets() -> list[Path]:
    """Return the sockets of this user's workers without --listen."""
    folders = filter(_is_private, socket_directories())
    return [
        path
        for path in (folder / DEFAULT_SOCKET for folder in folders)
        if path.exists()
    ]


def _default() -> str:
    found = default_sockets()
    if found:
        # A dead worker may have left its socket.
        return f"{_UNIX}{next(filter(_accepts, found), found[0])}"
    looked = socket_directories()[0] / DEFAULT_SOCKET
    raise WorkerUnavailable(
        f"no worker answers: no address was given, and the default socket {looked} does not exist;"
        " start `bridge_server` without --listen, or give the address of its ready line"
    )


def _accepts(path: Path) -> bool:
    """Whether a process listens at a socket."""
    with socket.socket(socket.AF_UNIX) as trial:
        return trial.connect_ex(str(path)) == 0


def _is_private(folder: Path) -> bool:
    """Whether only this user can have made sockets in a directory."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return is_own and not status.st_mode & 0o077


def unavailable(address: str, details: str) -> WorkerUnavailable:
    """Return the error of an address at which no worker answers; gRPC's details are a note."""
    reason = next(
        (text for words, text in _REASONS.items() if words.lower() in details.lower()),
        "",
    )
    if not reason:
        return WorkerUnavailable(f"no worker answers at {address}: {details}")
    error = WorkerUnavailable(
        f"no worker answers at {address}: {reason}{_proxy(address)}"
    )
    error.add_note(f"gRPC: {details}")
    return error


def _proxy(address: str) -> str:
    host = address.rpartition(":")[0]
    if address.startswith("unix") or is_loopback(host):
        return ""
    names = [name for name in _PROXIES if os.environ.get(name)]
    excluded = os.environ.get("no_proxy", "")
    if not names or any(
        host.endswith(each.strip()) for each in excluded.split(",") if each
    ):
        return ""
    return (
        f". The proxy in {names[0]} is in between; set no_proxy={host} to go around it"
    )
