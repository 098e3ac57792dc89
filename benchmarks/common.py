"""What all benchmarks share: how they time, what they record, their files and the command line."""

import argparse
import ctypes
import importlib.metadata
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sam_lab
from sam_lab.curvature import ConvergenceWarning
from sam_lab.experiments.lab.result import plain, seal, unseal, write_whole

RESULTS = Path("book") / "results"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: what it measures, and how its result is named and shown.

    Attributes:
        name: on the command line; the file is `bench_{name}.json`.
        about: what it measures, in a line.
        schema: names the form of its file.
        measure: `measure(quick)` makes the body of the file, all but schema and provenance; quick
            is seconds instead of minutes, and shows that everything runs, not what it costs.
        table: a result as text.
        packages: distributions whose versions belong to the provenance.
    """

    name: str
    about: str
    schema: str
    measure: Callable[[bool], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    packages: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        return f"bench_{self.name}.json"

    def run(self, quick: bool, command: str) -> dict[str, Any]:
        """The result, with the versions and the machine it was made with."""
        begin = time.perf_counter()
        body = self.measure(quick)
        provenance = {
            "sam_lab": sam_lab.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            **{package: version_of(package) for package in self.packages},
            "device": ", ".join(body.get("devices", ["cpu"])),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "command": command,
            "seconds": round(time.perf_counter() - begin, 1),
            "date": datetime.now(UTC).date().isoformat(),
        }
        whole = {"schema": self.schema, **body, "provenance": provenance}
        plain_body: dict[str, Any] = plain(whole, "benchmark")
        return plain_body

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read a result; `ResultError` if it is damaged, changed or of another schema."""
        return unseal(Path(path).read_bytes(), self.schema)


def save(result: dict[str, Any], path: Path) -> Path:
    """Write the result as one JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, seal(result))


def version_of(package: str) -> str | None:
    """The installed version, None where the package is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def seconds(action: Callable[[], object]) -> float:
    """Processor seconds, which do not count what other programs take in between."""
    start = time.process_time()
    action()
    return time.process_time() - start


def keep_memory() -> None:
    """Let freed memory stay with the process, as CUDA's allocator does.

    Otherwise glibc returns large blocks to the system at once, every pass faults its activations in
    again, and how much of that hits which method is chance: up to a fifth of a step of ResNet-18.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mmap_max, trim_threshold = -4, -1
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that peers cause in torch; ours go through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", ConvergenceWarning)
        yield


def say(what: str) -> None:
    """Progress, beside the tables on standard output."""
    print(f"{what} ...", file=sys.stderr, flush=True)


def main(benchmarks: Mapping[str, Benchmark], arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that are named, all if none is; print and save each as it is done."""
    listed = "\n".join(f"  {b.name:12}{b.about}" for b in benchmarks.values())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"Measurements against peers, on one thread:\n\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run (default: all)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the result files, or for one benchmark a file that ends in .json "
        f"(default: {RESULTS.as_posix()})",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny problems, to see that it runs; no default file"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in benchmarks]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(benchmarks)}")
    names = list(dict.fromkeys(options.names))
    chosen = [benchmarks[name] for name in names or benchmarks]
    out = options.out or (None if options.quick else RESULTS)
    single = out is not None and out.suffix == ".json"
    if single and len(chosen) > 1:
        parser.error("--out names one file, and there are several benchmarks: name a folder")
    torch.set_num_threads(1)
    command = " ".join(["python -m benchmarks", *names] + ["--quick"] * options.quick)
    for benchmark in chosen:
        result = benchmark.run(options.quick, command)
        print(benchmark.table(result), flush=True)
        if out is not None:
            path = save(result, out if single else out / benchmark.file)
            print(f"\nwritten to {path}\n", flush=True)
    return 0
