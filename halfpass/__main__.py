"""`python -m halfpass` is the `halfpass` command."""

import sys

from halfpass.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
