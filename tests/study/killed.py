"""`topkapi study` in forked processes, with small blocks, of which one kills itself before its n-th operation.

Called by `tests.fork_server`; see tests/study/test_writer.py. An operation is one on a file of the study, or a block
that is harvested.
"""

import os
import signal
import sys
import time
from pathlib import Path

from topkapi.cli import main
from topkapi.errors import TopkapiError
from topkapi.study import invert, writer

WATCHED = ("open", "os.rename", "os.remove", "os.truncate", "mmap.__new__")


def study(run: str, folder: str, disturbance: str, rank: str, at: str, *options: str) -> int:
    """Write a study, in which rank `rank` is disturbed before its operation number `at`; 0: it is not.

    The last line of a log that comes to it is the number of operations. A disturbance is "kill" or "raise".
    """
    writer.BLOCK_TOKENS, writer.SAVE_SECONDS = 160, 0.0
    invert.ENTRIES_AT_ONCE, invert.CHUNK_ENTRIES = 500, 300
    count, harvest = 0, writer.harvest

    def watch(event: str, details: tuple) -> None:
        nonlocal count
        if event not in WATCHED or not (event.startswith("mmap") or folder in str(details[0])):
            return
        count += 1
        if count != int(at) or os.environ.get("RANK", "0") != rank:
            return
        if disturbance == "raise":
            raise TopkapiError("something is wrong here.")
        os.write(2, f"killed before {event} {details[0]}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def watched_harvest(*arguments: object) -> object:
        watch("open", (f"a block for {folder}",))
        return harvest(*arguments)

    writer.harvest = watched_harvest
    sys.addaudithook(watch)
    status = main(["study", run, "--out", str(Path(folder)), *options])
    print(count)
    return status
