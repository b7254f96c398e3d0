"""Folders of the cache, made by one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from topkapi.console import say
from topkapi.files import lock, remove_leftovers, whole_folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """`topkapi.files.whole_folder`, while no other process fills the folder above.

    What a killed process left half-made there is cleared away. Where another one has made `folder` while this one
    waited, that one stays.

    Raises:
        OSError: disk full, or the folder above is read-only.
    """
    with lock(folder.parent, lambda: say(f"waiting for another process that fills {folder.parent} ...")):
        remove_leftovers(folder.parent)
        with whole_folder(folder) as temporary:
            yield temporary
