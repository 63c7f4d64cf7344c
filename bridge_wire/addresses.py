"""Addresses of workers: loopback hosts, lengths of socket paths. Resolves no names."""

import ipaddress

LONGEST_SOCKET_PATH = 107  # sun_path of sockaddr_un, less the final NUL


def is_loopback(host: str) -> bool:
    """Whether a host, the part of an address before the port, is this host's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
