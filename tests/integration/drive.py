"""Drives one run in a process of its own, so that a test can SIGKILL it."""

import logging
import pickle
import sys
from pathlib import Path

import elastic


def main() -> None:
    """Train as ordered; write what is observed to standard error."""
    logging.basicConfig(level=logging.INFO)
    order: elastic.TrainOrder = pickle.loads(Path(sys.argv[1]).read_bytes())
    elastic.train(order, show)


def show(notice: elastic.Notice) -> None:
    """Write one notice to standard error."""
    sys.stderr.write(f"{notice}\n")


if __name__ == "__main__":
    main()
