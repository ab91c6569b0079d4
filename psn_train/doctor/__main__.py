"""`accelerate launch [flags] -m psn_train.doctor [RECIPE key=value ...]`: all processes compared."""

import sys

from psn_train.cli import main

if __name__ == "__main__":
    sys.exit(main(["doctor", "--distributed", *sys.argv[1:]]))
