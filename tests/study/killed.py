"""`topkapi study` in a forked process, with small blocks, that kills itself before its n-th file operation.

Called by `tests.fork_server`; see tests/study/test_writer.py.
"""

import os
import signal
import sys
import time
from pathlib import Path

from topkapi.cli import main
from topkapi.study import invert, writer

WATCHED = ("open", "os.rename", "os.remove", "os.truncate", "mmap.__new__")


def study(run: str, folder: str, kill_at: str, *options: str) -> int:
    """Write a study; `kill_at` 0 kills nothing, and the last line of the log is then the number of operations."""
    writer.BLOCK_TOKENS, writer.SAVE_SECONDS = 160, 0.0
    invert.ENTRIES_AT_ONCE, invert.CHUNK_ENTRIES = 500, 300
    count = 0

    def watch(event: str, details: tuple) -> None:
        nonlocal count
        if event not in WATCHED or not (event.startswith("mmap") or folder in str(details[0])):
            return
        count += 1
        if count == int(kill_at):
            os.write(2, f"killed before {event} {details[0]}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    sys.addaudithook(watch)
    status = main(["study", run, "--out", str(Path(folder)), *options])
    print(count)
    return status
