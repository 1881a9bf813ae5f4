"""Keeps a workdir to one run: a file `run.lock` names who trains there and shows that it lives.

It is written only if nobody wrote it meanwhile: tensorstore ensures this by a lock of its own beside a
file, and by generation match in a bucket. A lock whose process is gone is taken over: at once on the same
machine, else after a minute without a heartbeat.
"""

import contextlib
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from typing import Any

import tensorstore
from etils import epath

from mhc_jax import paths

_log = logging.getLogger(__name__)

NAME = "run.lock"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0


class Locked(ValueError):
    """Another run has the workdir; the message names it."""


class WorkdirLock:
    """Holds `workdir/run.lock` from its making until `release`; a thread renews it every 10 s.

    Raises:
      Locked: another run holds it.
    """

    def __init__(self, workdir: epath.PathLike):
        self._workdir = workdir
        self._store = _store(workdir)
        self._mine = _this_process() | {"token": uuid.uuid4().hex}
        self._guard = threading.Lock()
        self._lost: str | None = None
        self._generation = self._acquire()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()

    def _acquire(self) -> bytes:
        while True:
            found = self._store.read(NAME).result()
            if found.state == "value":
                self._wait_until_stale(found)
            written = self._write(found.stamp.generation)
            if written:
                return written

    def _write(self, expected: bytes) -> bytes:
        """Returns the generation of the new lock; empty if the present one is not the expected one."""
        value = json.dumps(self._mine | {"heartbeat": time.time()})
        return self._store.write(NAME, value, if_equal=expected).result().generation

    def _wait_until_stale(self, found) -> None:
        holder = _parse(found.value)
        here = _lives(holder)
        if here:
            raise Locked(self._line(holder))
        if here is not None:
            _log.info("took over the lock of %s: its process is gone", self._workdir)
            return
        # The clocks of two machines may differ, so watch whether the lock is renewed.
        age = time.time() - holder.get("heartbeat", 0)
        least = min(2 * HEARTBEAT_SECONDS, STALE_SECONDS)
        patience = max(STALE_SECONDS - age, least) if age >= 0 else STALE_SECONDS
        _log.warning("%s; waiting %.0f s for a sign of life", self._line(holder), patience)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(min(1.0, patience / 10))
            now = self._store.read(NAME).result()
            if now.state == "missing":
                return
            if now.value != found.value:
                raise Locked(self._line(_parse(now.value)))
        _log.warning("took over the lock of %s: no sign of life", self._workdir)

    def _line(self, holder: dict[str, Any]) -> str:
        seen = max(time.time() - holder.get("heartbeat", 0), 0)
        who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"
        return (
            f"{self._workdir} is in use by another run ({who}, last sign of life {seen:.0f} s ago): end it, "
            "or give another --workdir"
        )

    def _renew(self) -> None:
        while not self._end.wait(HEARTBEAT_SECONDS):
            # A full disk or a lost network must not end the run; the next try may work.
            with contextlib.suppress(Exception):
                self.renew()

    def renew(self) -> None:
        """Renews the lock now.

        Raises:
          Locked: another run has taken the workdir over, because this process stood still for a minute.
        """
        with self._guard:
            if self._lost is None and not self._end.is_set():
                written = self._write(self._generation)
                if written:
                    self._generation = written
                else:
                    self._look_who_wrote()
        self.check()

    def _look_who_wrote(self) -> None:
        found = self._store.read(NAME).result()
        holder = _parse(found.value) if found.state == "value" else {}
        if holder and holder.get("token") != self._mine["token"]:
            self._lost = self._line(holder)
        else:  # someone removed it by hand, or our own write was answered late
            self._generation = found.stamp.generation

    def check(self) -> None:
        """Raises Locked if another run has taken the workdir over. Costs nothing."""
        if self._lost is not None:
            raise Locked(self._lost)

    def release(self) -> None:
        """Gives the workdir back; a second call does nothing."""
        self._end.set()
        with self._guard:
            generation, self._generation = self._generation, b""
            if generation and self._lost is None:
                with contextlib.suppress(Exception):
                    self._store.write(NAME, None, if_equal=generation).result()


def _store(workdir: epath.PathLike) -> tensorstore.KvStore:
    if paths.is_bucket(workdir):
        bucket, _, folder = os.fspath(workdir).removeprefix("gs://").partition("/")
        spec = {"driver": "gcs", "bucket": bucket, "path": folder.rstrip("/") + "/"}
        if spec["path"] == "/":
            spec["path"] = ""
    else:
        spec = {"driver": "file", "path": os.path.abspath(workdir) + "/"}
    return tensorstore.KvStore.open(spec).result()


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _read("/etc/machine-id"),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _namespace(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _lives(holder: dict[str, Any]) -> bool | None:
    """Returns whether the process of a lock exists; None if it ran where this process cannot see it."""
    here = _this_process()
    if any(holder.get(name) != here[name] for name in ("host", "machine")):
        return None
    if holder.get("boot") != here["boot"]:
        return False
    if holder.get("pid_namespace") != here["pid_namespace"]:
        return None
    # The number may by now belong to another process that began later.
    return _exists(holder.get("pid")) and holder.get("started") == _started(holder["pid"])


def _exists(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    # A process that has ended stays visible until its parent asks for it.
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[:1] != ["Z"]


def _started(pid: int) -> int | None:
    """Returns when a process began, in clock ticks since boot; None without /proc."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 else None


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _read(path: str) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return pathlib.Path(path).read_text().strip()
    return ""


def _parse(value: bytes) -> dict[str, Any]:
    """Returns the content of a lock; {} if it is not a lock, which then counts as another machine's."""
    with contextlib.suppress(ValueError):
        found = json.loads(value)
        if isinstance(found, dict):
            return found
    return {}
