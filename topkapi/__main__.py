"""`python -m topkapi` is the command `topkapi`."""

import sys

from topkapi.cli import main

sys.exit(main())
