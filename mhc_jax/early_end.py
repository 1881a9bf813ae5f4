"""SIGTERM before a run has begun. Imports nothing that takes long, since it is there for the imports too."""

import os
import signal
import sys

# EX_TEMPFAIL: a scheduler may start the same command again; after other errors it may not.
TRY_AGAIN = 75


def install() -> None:
    """SIGTERM ends the program at once with `TRY_AGAIN`: nothing has been computed that could be lost."""
    signal.signal(signal.SIGTERM, _end)


def _end(number, frame) -> None:
    # Not through SystemExit, which a package that is being imported may catch.
    os.write(sys.stderr.fileno(), b"Interrupted: stopped before the run began, run again\n")
    os._exit(TRY_AGAIN)
