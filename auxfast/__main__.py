"""`python -m auxfast`."""

import sys

from auxfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
