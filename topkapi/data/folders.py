"""A folder that is either whole or absent, as `topkapi.files.write_atomic` does for a file."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from topkapi.files import sync


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, flushed and renamed to it at the end, removed on an error.

    Where another process has made `folder` meanwhile, that one stays.

    Raises:
        OSError: disk full, or the folder above is read-only.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        if not folder.exists():
            temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
