"""Experiments: what one is, how they are found, and how one is run.

An experiment is one module of this package with one constant ``EXPERIMENT``, named as the module.
Adding one touches no other file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import os
import pkgutil
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sam_lab.experiments.claims import Claim, ClaimError, Criterion, Verdict
from sam_lab.experiments.progress import Progress
from sam_lab.experiments.result import Result, ResultError, Run, plain
from sam_lab.experiments.store import Busy, Store

__all__ = [
    "Busy",
    "Claim",
    "ClaimError",
    "Criterion",
    "Experiment",
    "ExperimentError",
    "Result",
    "ResultError",
    "Run",
    "Verdict",
    "broken",
    "get",
    "names",
    "run",
]

REQUIRED = ("laptop", "paper")
SCALES = ("laptop", "desktop", "paper")
"""The presets that the ledger sets side by side, from small to large: minutes on two CPU cores; the
largest run on the papers' own data that two cores finish in about an hour; the papers' own scale.
"""


class ExperimentError(ValueError):
    """An experiment that does not exist, or was asked for something that it cannot do."""


@dataclass(frozen=True)
class Experiment:
    """One claim or figure of a paper, as code that decides it.

    Args:
        name: name of its module.
        title: one line for a reader.
        source: paper, figure or section.
        presets: a frozen dataclass instance for ``"laptop"`` (minutes on two cores) and one for
            ``"paper"``, and for ``"desktop"`` where there is something between (see `SCALES`);
            more presets are allowed.
        settings: ``settings(config)`` lists what is compared, each a dict such as ``{"lr": 0.1}``.
        run: ``run(config, setting, seed, device, progress)`` measures one setting with one seed and
            returns columns, ``{"loss": [...], ...}``; ``progress(done, total)`` may be called along
            the way. All randomness comes from ``seed``.
        claims: what the runs decide.

    Raises:
        ValueError, TypeError: when a part is missing or of the wrong kind.
    """

    name: str
    title: str
    source: str
    presets: Mapping[str, Any]
    settings: Callable[[Any], list[dict[str, Any]]] = field(repr=False)
    run: Callable[..., Mapping[str, Any]] = field(repr=False)
    claims: Sequence[Claim] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"experiment name must be a module name, got {self.name!r}")
        missing = [scale for scale in REQUIRED if scale not in self.presets]
        if missing:
            raise ValueError(f"experiment {self.name!r} needs a preset {missing[0]!r}")
        for scale, config in self.presets.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", scale):
                raise ValueError(f"experiment {self.name!r}: a preset cannot be called {scale!r}")
            _check_config(config, f"experiment {self.name!r}, preset {scale!r}")
        ids = [claim.id for claim in self.claims]
        if len(set(ids)) < len(ids):
            raise ValueError(f"experiment {self.name!r}: claim ids must differ, got {ids}")

    def judge(self, result: Result) -> list[Verdict]:
        """The verdicts that ``result``'s runs give on the claims as they stand now.

        A claim whose statistic breaks its contract is inconclusive here, with the reason.
        """
        verdicts = []
        for claim in self.claims:
            try:
                verdicts.append(claim.judge(result))
            except ClaimError as error:
                verdicts.append(claim.undecided(str(error)))
        return verdicts

    def command(self, scale: str, seeds: Iterable[int] = (0, 1, 2), out: str = "") -> str:
        """The command line that makes the result of a preset, in the folder ``out`` if given."""
        seeds = list(seeds)
        chosen = str(len(seeds)) if seeds == list(range(len(seeds))) else ",".join(map(str, seeds))
        line = f"python -m sam_lab.experiments run {self.name} --scale {scale} --seeds {chosen}"
        return f"{line} --out {out}" if out else line


# --- the registry --------------------------------------------------------------------------------


def names() -> list[str]:
    """Names of the experiments that can be imported."""
    return sorted(_registry()[0])


def broken() -> dict[str, str]:
    """Experiments whose module cannot be imported, and why."""
    return _registry()[1]


def get(name: str) -> Experiment:
    """The experiment of this name.

    Raises:
        ExperimentError: when there is none, or when its module cannot be imported.
    """
    found, failed = _registry()
    if name in found:
        return found[name]
    if name in failed:
        raise ExperimentError(f"experiment {name!r} cannot be imported: {failed[name]}")
    raise ExperimentError(f"no experiment {name!r}; there are {', '.join(sorted(found)) or 'none'}")


def _registry() -> tuple[dict[str, Experiment], dict[str, str]]:
    package = importlib.import_module("sam_lab.experiments")
    found: dict[str, Experiment] = {}
    failed: dict[str, str] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("_"):
            continue
        try:
            imported = importlib.import_module(f"{package.__name__}.{module.name}")
            experiment = getattr(imported, "EXPERIMENT", None)
            if experiment is None:
                continue
            if not isinstance(experiment, Experiment):
                raise TypeError(f"EXPERIMENT must be an Experiment, got {experiment!r:.100}")
            if experiment.name != module.name:
                raise ValueError(f"its name is {experiment.name!r}, which is not its module's")
            found[module.name] = experiment
        except Exception as error:  # one experiment that is broken must not hide the others
            failed[module.name] = f"{type(error).__name__}: {error}"
    return found, failed


# --- running -------------------------------------------------------------------------------------


def run(
    experiment: Experiment | str,
    scale: Any = "laptop",
    seeds: int | Iterable[int] = 3,
    device: str | torch.device = "auto",
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Run every setting of an experiment with every seed and judge its claims.

    Args:
        experiment: an :class:`Experiment` or its name.
        scale: name of a preset, or a config of the presets' class (called ``"custom"`` unless it
            equals a preset).
        seeds: a number of seeds, counted from 0, or the seeds themselves.
        device: ``"auto"`` (CUDA when there is one), or a torch device.
        out: folder for ``NAME.SCALE.json``. While the experiment is under way, its finished runs
            are kept there in ``.NAME.SCALE.partial/``, and the same call takes them up again.
        progress: show progress on stderr.

    Returns:
        The result; with ``out`` it has been written when the call returns.

    Raises:
        ExperimentError: unknown name or scale, config of another class, bad seeds or device,
            ``out`` that cannot be written.
        Busy: another process runs the same experiment into the same folder.
        ClaimError: a statistic does not give one number per seed. With ``out``, the file stands
            nevertheless, that claim inconclusive.
        KeyboardInterrupt: on Ctrl-C; with ``out``, its message says what is kept.
    """
    chosen = get(experiment) if isinstance(experiment, str) else experiment
    config, label = _resolve_scale(chosen, scale)
    seed_list = _resolve_seeds(seeds)
    place = _resolve_device(device)
    settings = _resolve_settings(chosen, config)
    tasks = [(setting, seed) for setting in settings for seed in seed_list]

    store = None
    if out is not None:
        store = Store(Path(out), f"{chosen.name}.{label}", _key(chosen, config, place))
        try:
            store.open()
        except OSError as error:
            raise ExperimentError(f"cannot write to out={str(out)!r}: {error.strerror}") from None

    runs: list[Run] = []
    seconds = 0.0
    bar = Progress(f"{chosen.name}, {label}", len(tasks), shown=progress)
    try:
        for setting, seed in tasks:
            kept = store.get(setting, seed) if store else None
            if kept is None:
                kept = _measure(chosen, config, setting, seed, place, bar)
                if store:
                    store.put(*kept)
                bar.finish(kept[1])
            else:
                bar.skip(_task(setting, seed))
            runs.append(kept[0])
            seconds += kept[1]
        origin = _provenance(chosen, label, seed_list, place, seconds)
        result = Result(chosen.name, label, config_dict(config), runs, [], origin)
        result = dataclasses.replace(result, claims=chosen.judge(result))
        if store:
            result.save(Path(out or ".") / f"{chosen.name}.{label}.json")
            store.clear()
    except KeyboardInterrupt:
        message = f"stopped after {len(runs)} of {len(tasks)} runs"
        if store:
            message += f"; they are kept in {store.folder}, and the same command goes on from there"
        raise KeyboardInterrupt(message) from None
    finally:
        bar.close()
        if store:
            store.close()
    for claim in chosen.claims:
        claim.judge(result)  # a broken statistic is an error, but only once the runs are safe
    return result


def _measure(
    experiment: Experiment,
    config: Any,
    setting: dict[str, Any],
    seed: int,
    device: torch.device,
    bar: Progress,
) -> tuple[Run, float]:
    bar.start(_task(setting, seed))
    start = time.perf_counter()
    try:
        columns = experiment.run(config, dict(setting), seed, device, bar.update)
        return Run(setting, seed, columns), time.perf_counter() - start  # type: ignore[arg-type]
    except Exception as error:
        error.add_note(f"in experiment {experiment.name!r}, {_task(setting, seed)}")
        raise


def _resolve_scale(experiment: Experiment, scale: Any) -> tuple[Any, str]:
    if isinstance(scale, str):
        if scale not in experiment.presets:
            known = ", ".join(experiment.presets)
            raise ExperimentError(
                f"experiment {experiment.name!r} has no scale {scale!r}; it has {known}"
            )
        return experiment.presets[scale], scale
    expected = type(experiment.presets["laptop"])
    if not isinstance(scale, expected):
        raise ExperimentError(
            f"scale must be a preset's name or a {expected.__name__}, got {scale!r:.100}"
        )
    _check_config(scale, "scale")
    for label, preset in experiment.presets.items():
        if scale == preset:
            return scale, label
    return scale, "custom"


def _resolve_seeds(seeds: int | Iterable[int]) -> list[int]:
    wrong = (
        f"seeds must be a number of seeds >= 1 or different whole numbers >= 0, got {seeds!r:.100}"
    )
    if isinstance(seeds, bool | str) or not isinstance(seeds, int | Iterable):
        raise ExperimentError(wrong)
    found: list[Any] = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    found = [int(seed) if isinstance(seed, np.integer) else seed for seed in found]
    whole = all(
        isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in found
    )
    if not found or not whole or len(set(found)) < len(found):
        raise ExperimentError(wrong)
    return found


def _resolve_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ExperimentError(f"device {str(device)!r} cannot be used: {reason}") from None
    return chosen


def _resolve_settings(experiment: Experiment, config: Any) -> list[dict[str, Any]]:
    settings = [plain(setting, "settings") for setting in experiment.settings(config)]
    if not settings or not all(isinstance(setting, dict) for setting in settings):
        raise ExperimentError(f"experiment {experiment.name!r}: settings(config) must list dicts")
    if any(setting in settings[:i] for i, setting in enumerate(settings)):
        raise ExperimentError(f"experiment {experiment.name!r}: settings(config) lists one twice")
    return settings


def _check_config(config: Any, where: str) -> None:
    if isinstance(config, type) or not dataclasses.is_dataclass(config):
        raise TypeError(f"{where} must be an instance of a dataclass, got {config!r:.100}")
    if not getattr(type(config), "__dataclass_params__").frozen:  # noqa: B009 (typeshed omits it)
        raise TypeError(f"{where}: {type(config).__name__} must be a frozen dataclass")
    config_dict(config)


def config_dict(config: Any) -> dict[str, Any]:
    """The config as a result file holds it."""
    return plain(dataclasses.asdict(config), type(config).__name__)


def _task(setting: dict[str, Any], seed: int) -> str:
    return ", ".join(filter(None, [Run(setting, seed, {}).label, f"seed={seed}"]))


def _key(experiment: Experiment, config: Any, device: torch.device) -> str:
    """Says what a kept run depends on: the code, the config, the device and the versions."""
    parts = [
        experiment.name,
        repr(config_dict(config)),
        device.type,
        torch.__version__,
        np.__version__,
    ]
    parts += [_library_digest(), _source_digest(experiment)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def _library_digest() -> str:
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _source_digest(experiment: Experiment) -> str:
    # An experiment of the package is in the library's digest already; one that a reader wrote
    # elsewhere is known by the text of its own file, and one without a text is never resumed.
    module = inspect.getmodule(experiment.run)
    try:
        text = inspect.getsource(
            module if module and hasattr(module, "__file__") else experiment.run
        )
    except (OSError, TypeError):
        text = repr(time.time_ns())
    return hashlib.sha256(text.encode()).hexdigest()


def _provenance(
    experiment: Experiment, label: str, seeds: list[int], device: torch.device, seconds: float
) -> dict[str, Any]:
    import sam_lab

    # The canonical command, not sys.argv: it can be repeated anywhere and holds no local path.
    command = f'sam_lab.experiments.run("{experiment.name}", config, seeds={seeds})'
    return {
        "sam_lab": sam_lab.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "command": experiment.command(label, seeds) if label in experiment.presets else command,
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        try:
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
        model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        name = model[1].strip() if model else name
    return f"{device.type}: {name}"
