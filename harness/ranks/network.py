"""Where rank 0 is reached, and which network of this host leads there."""

from __future__ import annotations

import ipaddress
import os

import psutil


def place() -> tuple[str, int]:
    """Returns where rank 0 is to be found: ``MASTER_ADDR`` and ``MASTER_PORT``."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def use_interface(address: str | None) -> None:
    """Makes gloo use the network on which this host has ``address``, unless the user chose one.

    Left alone it takes the address of the host's own name, which on many systems is a loopback one.
    """
    wanted = _ip(address)
    if wanted is None or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    for name, entries in psutil.net_if_addrs().items():
        found = [_ip(entry.address) for entry in entries]
        if wanted in found or (wanted.is_loopback and any(ip is not None and ip.is_loopback for ip in found)):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def _ip(address: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address((address or "").split("%")[0])
    except ValueError:  # net_if_addrs() lists hardware addresses too
        return None
    return getattr(found, "ipv4_mapped", None) or found
