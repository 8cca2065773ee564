"""Two hosts with a cable between them, imitated by network namespaces."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

# Two hosts with a cable between them, each of which takes its own name for a loopback address, as Debian does.
NETWORK = """
set -euo pipefail
printf '127.0.0.1 localhost\\n127.0.1.1 nodea\\n10.77.0.2 nodeb\\n' >hosts.a
printf '127.0.0.1 localhost\\n127.0.1.1 nodeb\\n10.77.0.1 nodea\\n' >hosts.b
: >resolv.conf
mount --bind resolv.conf /etc/resolv.conf
unshare --net --mount --uts sleep 300 &
b=$!
trap 'kill $b' EXIT
until [ "$(readlink /proc/$b/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
on_b() { nsenter --target $b --net --mount --uts "$@"; }
ip link set lo up
ip link add v0 type veth peer name v1 netns $b
ip addr add 10.77.0.1/24 dev v0
ip link set v0 up
hostname nodea
mount --bind hosts.a /etc/hosts
on_b ip link set lo up
on_b ip addr add 10.77.0.2/24 dev v1
on_b ip link set v1 up
on_b hostname nodeb
on_b mount --bind "$PWD/hosts.b" /etc/hosts
"""
NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--uts", "bash", "-c"]


def networked(directory: Path) -> None:
    """Skips the test where no two hosts can be imitated."""
    probe = subprocess.run([*NAMESPACES, NETWORK], cwd=directory, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no network namespaces here: {probe.stderr.strip()}")
