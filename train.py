"""A YAML file and key=value words become a run, and it trains: `python train.py configs/quickstart.yaml`."""

import sys

from ldm.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
