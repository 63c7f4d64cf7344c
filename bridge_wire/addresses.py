"""What the name or number of a host says. Looks nothing up."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host, as it stands before the port in an address, is this one, by a way that
    does not leave it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
