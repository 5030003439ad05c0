"""``python -m lightning_quartet``."""

import sys

from lightning_quartet.cli import main

if __name__ == "__main__":
    sys.exit(main())
