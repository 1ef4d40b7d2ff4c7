"""`python -m baleen.launch_router` = `baleen route`: the router between prefill and decode servers."""

from __future__ import annotations

import sys

from baleen.__main__ import main

if __name__ == "__main__":
    sys.exit(main("route"))
