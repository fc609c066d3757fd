"""The container's health check: exit 0 if this container answers 200. Slim images have no curl.

python healthcheck.py PATH [PORT]      PORT defaults to TOKENRELAY_PORT, then 8000
"""

import os
import sys
from http.client import HTTPConnection  # unlike urllib, never goes through a proxy named in the environment


def main(path: str, port: str = os.environ.get("TOKENRELAY_PORT", "8000")) -> str | None:
    """None if healthy, else what to tell `docker inspect`."""
    try:
        connection = HTTPConnection("127.0.0.1", int(port), timeout=4)
        connection.request("GET", path)
        status = connection.getresponse().status
    except OSError as error:
        return f"{path} on port {port}: {error}"
    return None if status == 200 else f"{path} on port {port}: HTTP {status}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
