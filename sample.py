"""A model and prompts become image files: `python sample.py "a green ring" --model runs/quickstart`."""

import sys

from ldm.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
