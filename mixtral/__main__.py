"""`python -m mixtral` is the command `mixtral`."""

import sys

from mixtral.cli import main

if __name__ == "__main__":
    sys.exit(main())
