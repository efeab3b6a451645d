"""This script runs ``oftsurgery export``: ``python tools/export.py --base BASE --adapter ADAPTER --output OUTPUT``."""

import sys

from oftsurgery.cli.main import export_main

if __name__ == "__main__":
    sys.exit(export_main())
