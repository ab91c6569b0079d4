"""`accelerate launch [flags] -m psn_train.train RECIPE [key=value ...]`: train on as many processes as are launched."""

import sys

from psn_train.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
