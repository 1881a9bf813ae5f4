"""Handles SIGTERM before a run has begun, even during imports; so this module imports nothing slow."""

import contextlib
import os
import signal

# EX_TEMPFAIL: tells a scheduler to start the same command again. Other codes mean that it must not.
TRY_AGAIN = 75


def install() -> None:
    """Lets SIGTERM end the program at once with `TRY_AGAIN`, since nothing can be lost yet."""
    signal.signal(signal.SIGTERM, _end)


def _end(number, frame) -> None:
    # SystemExit would not do: a package that is being imported may catch it.
    with contextlib.suppress(OSError):  # closed, or a full disk
        os.write(2, b"Interrupted: stopped before the run began, run again\n")
    os._exit(TRY_AGAIN)
