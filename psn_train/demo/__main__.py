"""`python -m psn_train.demo PUBLISHED SHARDS PICTURE`: what a demo does in a fresh process with what it published."""

import sys

from psn_train.demo.fresh import load_and_draw

if __name__ == "__main__":
    load_and_draw(*sys.argv[1:])
