"""`python -m baleen.launch_server` = `baleen serve`: SGLang's launch lines with the name replaced."""

from __future__ import annotations

import sys

from baleen.__main__ import main

if __name__ == "__main__":
    sys.exit(main("serve"))
