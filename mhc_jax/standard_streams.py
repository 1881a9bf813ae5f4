"""What a command prints: streams that are closed, that nobody reads, or whose disk is full.

Imports nothing of jax, like all that a command needs before its options are read.
"""

import contextlib
import errno
import os
import select
import signal
import sys
from collections.abc import Iterator


def open_closed() -> None:
    """Gives a program that was started with closed standard streams (`>&- 2>&-`) ones that go nowhere.

    Python has None for them, to which many a package writes, and the next file would be taken for them.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for fd, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, "w"))


@contextlib.contextmanager
def whole_output() -> Iterator[None]:
    """Raises OSError at its end where what was printed cannot be written, which Python says too late."""
    try:
        yield
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def end_without_output(error: Exception) -> None:
    """Ends a program that cannot write: nobody reads its output any more, or a disk is full.

    As in `sample ... | head -c 100`, without a word, and in `sample ... > /mnt/full/text`, with one line.
    Does nothing for any other error. A worker or a connection that breaks off raises BrokenPipeError too.
    """
    if isinstance(error, BrokenPipeError):
        gone = [fd for fd in (1, 2) if _has_no_reader(fd)]
        for fd in gone:
            _to_nowhere(fd)
        if gone:
            sys.exit(128 + signal.SIGPIPE)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        try:
            sys.stdout.flush()
        except OSError:
            _to_nowhere(1)
        sys.exit(f"cannot write {error.filename or 'the output'}: {error.strerror}")


def _to_nowhere(fd: int) -> None:
    """What Python still has for a stream is not written: it flushes both at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def _has_no_reader(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
