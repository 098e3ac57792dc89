"""``python -m sam_lab.experiments list | run NAME ... | merge FILE FILE ... | show FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from sam_lab.experiments.lab.experiment import SCALES
from sam_lab.experiments.lab.registry import ExperimentError, broken, get, names, table
from sam_lab.experiments.lab.result import Result, ResultError, merge
from sam_lab.experiments.lab.runner import check_overwrite, run
from sam_lab.experiments.lab.store import Busy

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for what the user can mend, 130 on Ctrl-C)."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "list":
            return _list()
        if args.command == "show":
            return _show(args.file)
        if args.command == "merge":
            return _merge(args.files, args.out)
        return _run(args)
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped'}", file=sys.stderr)
        return _INTERRUPTED
    except (ExperimentError, ResultError, Busy, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sam_lab.experiments", description="Run the experiments behind the book."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the experiments")
    show = commands.add_parser("show", help="judge the claims on a result file")
    show.add_argument("file", type=Path)
    both = commands.add_parser(
        "merge", help="make one result of several with the same config and other seeds"
    )
    both.add_argument("files", type=Path, nargs="+", metavar="FILE")
    both.add_argument("--out", type=Path, default=Path("results"), help="folder (default: results)")
    go = commands.add_parser("run", help="run an experiment and store its result")
    go.add_argument("name")
    go.add_argument(
        "--scale",
        default="laptop",
        help=f"preset, of those that the experiment has: {', '.join(SCALES)} (default: laptop)",
    )
    go.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    go.add_argument("--seeds", default="3", help="how many (default 3), or which: 0,1,2")
    go.add_argument("--out", type=Path, default=Path("results"), help="folder (default: results)")
    go.add_argument(
        "--workers", type=int, default=1, help="processes that share the runs (default: 1)"
    )
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
    print(f"{result.experiment}, {result.scale} scale, seeds {_listed(result.seeds)}")
    for origin in result.provenance:
        facts = {**origin, "seeds": _listed(origin.get("seeds", ()))}
        print(", ".join(f"{name} {value}" for name, value in facts.items() if name != "command"))
        if "command" in origin:
            print(origin["command"])
    print(f"\n{table(result)}")
    return 0


def _merge(files: Sequence[Path], out: Path) -> int:
    result = merge([Result.load(file) for file in files])
    target = _target(out, result)
    check_overwrite(target, result.seeds)
    out.mkdir(parents=True, exist_ok=True)
    result.save(target)
    print(f"seeds {_listed(result.seeds)} in {target}")
    return 0


def _run(args: argparse.Namespace) -> int:
    result = run(
        args.name,
        scale=args.scale,
        seeds=_seeds(args.seeds),
        device=args.device,
        out=args.out,
        progress=not args.quiet,
        workers=args.workers,
    )
    try:
        verdicts = str(table(result))
    except ImportError as error:  # the runs are made and kept; they can be judged elsewhere
        verdicts = f"no verdicts: {error}"
    print(f"{verdicts}\n\nwritten to {_target(args.out, result)}")
    return 0


def _target(out: Path, result: Result) -> Path:
    return out / f"{result.experiment}.{result.scale}.json"


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _seeds(text: str) -> int | list[int]:
    try:
        return [int(part) for part in text.split(",") if part] if "," in text else int(text)
    except ValueError:
        raise ExperimentError(
            f"--seeds must be a number such as 3 or a list such as 0,1,2, got {text!r}"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
