"""Whether a launcher started this process with others, as its variables tell. No torch: the command line asks first."""

import os


def launched() -> bool:
    """Whether torchrun, or another launcher that sets the same variables, started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks() -> bool:
    """Whether this process is the one to say what all of them would say."""
    return not launched() or os.environ.get("RANK", "0") == "0"
