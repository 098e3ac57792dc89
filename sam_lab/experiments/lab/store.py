"""Finished runs of an experiment under way, kept one file each until the result stands.

A run that is interrupted, even by ``kill -9``, loses at most what it was computing, and one that
saves checkpoints what it computed since the last. Runs and checkpoints are only taken up again when
they were made by the same code, config, device and library versions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from sam_lab.experiments.lab.result import (
    ResultError,
    Run,
    Setting,
    pack_run,
    plain,
    seal,
    unpack_run,
    unseal,
    write_whole,
)

SCHEMA = "sam-lab/partial/1"


class Busy(RuntimeError):
    """Another process is running the same experiment into the same folder."""


class Store:
    """Holds ``OUT/.NAME.SCALE.partial/`` alone, from ``open`` to ``close``.

    Args:
        out: folder of the result file.
        stem: ``NAME.SCALE``.
        key: says what made the runs; files with another key are removed, never reused.
    """

    def __init__(self, out: Path, stem: str, key: str) -> None:
        self.folder, self.key = out / f".{stem}.partial", key
        self._leftovers = out, f".{stem}.json.*.tmp"
        self._lock: IO[bytes] | None = None

    def open(self) -> Store:
        """Take the folder.

        Raises:
            Busy: when another process holds it.
            OSError: when it cannot be written.
        """
        path = self.folder / "lock"
        for _ in range(100):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                file = open(path, "ab")  # noqa: SIM115 (held until close)
            except FileNotFoundError:  # the holder has just finished and removed the folder
                continue
            try:
                _lock(file)
                # The lock counts only while its file is the one that others will find.
                if os.path.exists(path) and os.path.samestat(
                    os.fstat(file.fileno()), os.stat(path)
                ):
                    self._lock = file
            except BlockingIOError:
                raise Busy(
                    f"another process is writing {self.folder}; wait for it or stop it"
                ) from None
            finally:
                if self._lock is None:
                    file.close()
            if self._lock is not None:
                break
        else:
            raise Busy(f"{self.folder} appears and disappears; is another process writing it?")
        for folder, pattern in (self._leftovers, (self.folder, ".*.tmp")):
            for scratch in folder.glob(pattern):  # left by a process killed while it wrote
                scratch.unlink(missing_ok=True)
        for folder in self._begun():
            if not folder.name.endswith(self._mark):
                shutil.rmtree(folder)
        return self

    def get(self, settings: Setting, seed: int) -> tuple[Run, float] | None:
        """The finished run and its seconds, or None when there is none that may be used."""
        path = self._path(settings, seed)
        try:
            body = unseal(path.read_bytes(), SCHEMA)
            run, seconds = unpack_run(body["run"]), float(body["seconds"])
        except FileNotFoundError:
            return None
        except (ResultError, KeyError, TypeError, ValueError):
            path.unlink(missing_ok=True)
            return None
        if (
            body.get("key") != self.key
            or run.settings != plain(settings, "settings")
            or run.seed != seed
        ):
            path.unlink(missing_ok=True)
            return None
        return run, seconds

    def put(self, run: Run, seconds: float) -> None:
        """Keep a finished run."""
        body = {"schema": SCHEMA, "key": self.key, "seconds": seconds, "run": pack_run(run)}
        write_whole(self._path(run.settings, run.seed), seal(body))
        shutil.rmtree(self.begun(run.settings, run.seed), ignore_errors=True)

    def begun(self, settings: Setting, seed: int) -> Path:
        """The folder for the checkpoints of a run that is not finished."""
        return self._path(settings, seed).with_suffix(self._mark)

    def clear(self) -> None:
        """Remove the kept runs, once the result stands."""
        for path in self.folder.glob("*.json"):
            path.unlink(missing_ok=True)
        for folder in self._begun():
            shutil.rmtree(folder)

    def close(self) -> None:
        """Let go; the folder goes too when it holds nothing."""
        if self._lock is None:
            return
        if not any(self.folder.glob("*.json")) and not self._begun():
            try:  # an open file cannot be removed on Windows: there the empty folder stays
                (self.folder / "lock").unlink(missing_ok=True)
                self.folder.rmdir()
            except OSError:
                pass
        self._lock.close()
        self._lock = None

    @property
    def _mark(self) -> str:
        return f".{self.key[:12]}"

    def _begun(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_dir()]

    def _path(self, settings: Setting, seed: int) -> Path:
        text = json.dumps(plain(settings, "settings"), sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.seed{seed}.json"


def _lock(file: IO[bytes]) -> None:
    """Lock without waiting; the system lets go when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:
        _lock_windows(file)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_windows(file: IO[bytes]) -> None:  # pragma: no cover
    import importlib

    msvcrt: Any = importlib.import_module("msvcrt")
    try:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError(*error.args) from None
