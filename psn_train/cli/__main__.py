"""`python -m psn_train.cli`."""

import sys

from psn_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
