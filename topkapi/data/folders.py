"""A folder that is either whole or absent, as `topkapi.files.write_atomic` does for a file."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from topkapi.console import say
from topkapi.files import lock, remove_leftovers, sync


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, flushed and renamed to it at the end, removed on an error.

    One process at a time fills the folder above; what a killed one left half-made there is cleared away. Where
    another process has made `folder` meanwhile, that one stays.

    Raises:
        OSError: disk full, or the folder above is read-only.
    """
    with lock(folder.parent, lambda: say(f"waiting for another process that fills {folder.parent} ...")):
        remove_leftovers(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            yield temporary
            for path in temporary.rglob("*"):
                sync(path)
            if not folder.exists():
                temporary.rename(folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
