"""`python -m metattn`."""

import sys

from metattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
