"""Lets `python -m wan22.cli` be the command line."""

from . import main

main()
