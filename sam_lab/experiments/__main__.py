"""``python -m sam_lab.experiments list | run NAME ... | show FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sam_lab.experiments.core import Busy, ClaimError, ExperimentError, broken, get, names, run
from sam_lab.experiments.result import Result, ResultError

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for what the user can mend, 130 on Ctrl-C)."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "list":
            return _list()
        if args.command == "show":
            return _show(args.file)
        return _run(args)
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped'}", file=sys.stderr)
        return _INTERRUPTED
    except (ExperimentError, ResultError, ClaimError, Busy, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sam_lab.experiments", description="Run the experiments behind the book."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the experiments")
    show = commands.add_parser("show", help="show the claims of a result file")
    show.add_argument("file", type=Path)
    go = commands.add_parser("run", help="run an experiment and store its result")
    go.add_argument("name")
    go.add_argument(
        "--scale",
        default="laptop",
        help="preset: laptop (default), desktop where there is one, or paper",
    )
    go.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    go.add_argument("--seeds", default="3", help="how many (default 3), or which: 0,1,2")
    go.add_argument("--out", type=Path, default=Path("results"), help="folder (default: results)")
    go.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _list() -> int:
    for name in names():
        experiment = get(name)
        print(f"{name}  ({', '.join(experiment.presets)})")
        print(f"    {experiment.title}")
        print(f"    {experiment.source}")
    for name, why in broken().items():
        print(f"error: experiment {name!r} cannot be imported: {why}", file=sys.stderr)
    return 2 if broken() else 0


def _show(file: Path) -> int:
    result = Result.load(file)
    origin = result.provenance
    print(f"{result.experiment}, {result.scale} scale, seeds {', '.join(map(str, result.seeds))}")
    print(", ".join(f"{name} {value}" for name, value in origin.items() if name != "command"))
    if "command" in origin:
        print(origin["command"])
    print(f"\n{result.table()}")
    return 0


def _run(args: argparse.Namespace) -> int:
    result = run(
        args.name,
        scale=args.scale,
        seeds=_seeds(args.seeds),
        device=args.device,
        out=args.out,
        progress=not args.quiet,
    )
    print(f"{result.table()}\n\nwritten to {args.out / f'{result.experiment}.{result.scale}.json'}")
    return 0


def _seeds(text: str) -> int | list[int]:
    try:
        return [int(part) for part in text.split(",") if part] if "," in text else int(text)
    except ValueError:
        raise ExperimentError(
            f"--seeds must be a number such as 3 or a list such as 0,1,2, got {text!r}"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
