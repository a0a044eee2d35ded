"""`python -m halfpass` is the `halfpass` command."""

import sys

from halfpass.run.cli import main

if __name__ == "__main__":
    sys.exit(main())
