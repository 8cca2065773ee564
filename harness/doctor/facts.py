"""What a host says of itself; its text goes through ssh to a Python that may have another version of the harness.

``python - FIRST`` in the checkout's root prints one line: :data:`MARK`, then JSON. FIRST is the first host's name.
"""

from __future__ import annotations

import json
import platform
import socket
import sys
from typing import Any

MARK = "harness-facts "


def facts(first: str) -> dict[str, Any]:
    """Returns versions, source and devices of this host, and which addresses it takes ``first`` for."""
    found: dict[str, Any] = {"python": platform.python_version(), "hostname": socket.gethostname()}
    try:
        found["addresses"] = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(first, None)})
    except OSError:
        found["addresses"] = []
    try:
        from harness.machine import device, snapshot

        found["packages"] = snapshot.package_versions()
        found["git"] = snapshot.code_state()
        found["code"] = snapshot.code_fingerprint()
        found["devices"] = device.cuda_devices()
    except Exception as error:  # a package that is missing there, or another harness
        found["error"] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    print(MARK + json.dumps(facts(sys.argv[1])))
