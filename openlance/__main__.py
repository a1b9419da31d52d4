"""`python -m openlance` does what the command `openlance` does."""

import sys

from openlance.cli import main

if __name__ == "__main__":
    sys.exit(main())
