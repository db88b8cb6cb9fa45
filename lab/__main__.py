"""``python -m lab``: what scripts/lab calls."""

import sys

from lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
