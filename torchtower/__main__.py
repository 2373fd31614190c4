"""`python -m torchtower` is the same as `torchtower`."""

import sys

from torchtower.cli import main

if __name__ == "__main__":
    sys.exit(main())
