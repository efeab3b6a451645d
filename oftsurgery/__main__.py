"""``python -m oftsurgery``."""

import sys

from .cli.main import main

sys.exit(main())
