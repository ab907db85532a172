"""`python -m dlm`: the same as the command `dlm`."""

import sys

from dlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
