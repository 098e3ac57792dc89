"""Running an experiment: every setting with every seed, interrupted and taken up again at will."""

from __future__ import annotations

import hashlib
import inspect
import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sam_lab import _optional
from sam_lab.experiments.lab.checkpoints import Checkpoints
from sam_lab.experiments.lab.device import device_name
from sam_lab.experiments.lab.experiment import Cell, Experiment, check_config, config_dict
from sam_lab.experiments.lab.progress import Progress
from sam_lab.experiments.lab.registry import ExperimentError, get, names
from sam_lab.experiments.lab.result import Result, ResultError, Run, Setting, command, plain
from sam_lab.experiments.lab.store import Store

__all__ = ["check_overwrite", "run"]


def run(
    experiment: Experiment | str,
    scale: Any = "laptop",
    seeds: int | Iterable[int] = 3,
    device: str | torch.device = "auto",
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    workers: int = 1,
) -> Result:
    """Run every setting of an experiment with every seed.

    Args:
        experiment: an :class:`Experiment` or its name.
        scale: name of a preset, or a config of the presets' class (called ``"custom"`` unless it
            equals a preset).
        seeds: a number of seeds, counted from 0, or the seeds themselves.
        device: ``"auto"`` (CUDA when there is one), or a torch device.
        out: folder for ``NAME.SCALE.json``. While the experiment is under way, its finished runs
            are kept there in ``.NAME.SCALE.partial/``, and the same call takes them up again; of
            long experiments also the run that was interrupted, from its last checkpoint on.
        progress: show progress on stderr.
        workers: processes that share the runs. More than one pays where a run leaves the machine
            idle: small networks on a GPU, one thread a run on many cores. They share the threads of
            this process, and know the experiment by its name.

    Returns:
        The result; with ``out`` it has been written when the call returns.

    Raises:
        ExperimentError: unknown name or scale, config of another class, bad seeds or device,
            ``out`` that cannot be written, or whose file has seeds that are not asked for; several
            workers for an experiment that the registry does not have.
        ImportError: a package that the experiment needs is not installed; nothing has been run.
        Busy: another process runs the same experiment into the same folder.
        KeyboardInterrupt: on Ctrl-C; with ``out``, its message says what is kept.
    """
    chosen = get(experiment) if isinstance(experiment, str) else experiment
    config, label = _resolve_scale(chosen, scale)
    seed_list = _resolve_seeds(seeds)
    place = _resolve_device(device)
    settings = _resolve_settings(chosen, config)
    tasks = [(setting, seed) for setting in settings for seed in seed_list]
    shares = _resolve_workers(workers, chosen)
    for package in chosen.needs:
        _optional.require(package, extra="book")

    store = None
    if out is not None:
        target = Path(out) / f"{chosen.name}.{label}.json"
        check_overwrite(target, seed_list)
        store = Store(Path(out), f"{chosen.name}.{label}", _key(chosen, config, place))
        try:
            store.open()
        except OSError as error:
            raise ExperimentError(f"cannot write to out={str(out)!r}: {error.strerror}") from None

    found: list[tuple[Run, float] | None] = [None] * len(tasks)
    bar = Progress(f"{chosen.name}, {label}", len(tasks), shown=progress)
    try:
        for number, (setting, seed) in enumerate(tasks):
            found[number] = store.get(setting, seed) if store else None
            if found[number] is not None:
                bar.skip(_task(setting, seed))
        missing = [number for number, kept in enumerate(found) if kept is None]
        wanted = [
            (*tasks[number], store.begun(*tasks[number]) if store else None) for number in missing
        ]
        if shares > 1:
            made = _side_by_side(chosen.name, config, wanted, place, bar, shares)
        else:
            made = _one_by_one(chosen, config, wanted, place, bar)
        for which, run_made, seconds in made:
            if store:
                store.put(run_made, seconds)
            found[missing[which]] = run_made, seconds
            bar.finish(seconds)
        runs, times = zip(*(each for each in found if each is not None), strict=True)
        origin = _provenance(chosen, label, seed_list, place, sum(times), shares)
        result = Result(chosen.name, label, config_dict(config), list(runs), [origin])
        if store:
            result.save(target)
            store.clear()
    except KeyboardInterrupt:
        done = sum(each is not None for each in found)
        message = f"stopped after {done} of {len(tasks)} runs"
        if store:
            message += f"; they are kept in {store.folder}, and the same command goes on from there"
        raise KeyboardInterrupt(message) from None
    finally:
        bar.close()
        if store:
            store.close()
    return result


def check_overwrite(path: Path, seeds: Iterable[int]) -> None:
    """ExperimentError where the result at ``path`` has seeds that ``seeds`` would not replace."""
    try:
        there = Result.load(path).seeds
    except (ResultError, OSError):  # nothing there, or nothing that could be lost
        return
    lost = sorted(set(there) - set(seeds))
    if lost:
        raise ExperimentError(
            f"{path} has seed {', '.join(map(str, lost))}, which would be lost: write to another "
            "folder and merge the two, or remove the file"
        )


_Task = tuple[Setting, int, Path | None]  # setting, seed, folder for checkpoints
_Tick = Callable[[int, int], None]
_Made = tuple[int, Run, float]  # number of the task, what it gave, seconds


def _measure(
    experiment: Experiment,
    config: Any,
    task: _Task,
    device: torch.device,
    tick: _Tick | None = None,
) -> tuple[Run, float]:
    setting, seed, folder = task
    checkpoints = Checkpoints(folder)
    told = {} if tick is None else {"tick": tick}
    cell = Cell(dict(setting), seed, device, checkpoints=checkpoints, **told)
    try:
        columns = experiment.run(config, cell)
        return Run(setting, seed, columns), checkpoints.seconds  # type: ignore[arg-type]
    except Exception as error:
        error.add_note(f"in experiment {experiment.name!r}, {_task(setting, seed)}")
        raise


def _one_by_one(
    experiment: Experiment, config: Any, tasks: list[_Task], device: torch.device, bar: Progress
) -> Iterator[_Made]:
    for number, task in enumerate(tasks):
        bar.start(_task(*task[:2]))
        yield number, *_measure(experiment, config, task, device, bar.update)


def _side_by_side(
    name: str, config: Any, tasks: list[_Task], device: torch.device, bar: Progress, workers: int
) -> Iterator[_Made]:
    """The runs in processes of their own, each as it is finished.

    Where one of them fails, those under way are still waited for, and no more are begun.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers,
        # a process that has used a GPU cannot be forked
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_worker,
        initargs=(max(1, torch.get_num_threads() // workers),),
    )
    try:
        futures: dict[Future[tuple[Run, float]], int] = {
            pool.submit(_work, name, config, task, device): number
            for number, task in enumerate(tasks)
        }
        failure: BaseException | None = None
        for future in as_completed(futures):
            number = futures[future]
            if future.cancelled():
                continue
            if failed := future.exception():
                failure = failure or failed
                for each in futures:
                    each.cancel()
                continue
            bar.start(_task(*tasks[number][:2]))
            yield number, *future.result()
        if failure is not None:
            raise failure
    except BaseException:
        # what is under way is lost in any case: do not wait for it
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    torch.set_num_threads(threads)


def _work(name: str, config: Any, task: _Task, device: torch.device) -> tuple[Run, float]:
    return _measure(get(name), config, task, device)


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
    check_config(scale, "scale")
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


def _resolve_workers(workers: int, experiment: Experiment) -> int:
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ExperimentError(f"workers must be a whole number >= 1, got {workers!r}")
    if workers > 1 and (experiment.name not in names() or get(experiment.name) is not experiment):
        raise ExperimentError(
            f"workers must be 1 for {experiment.name!r}: several find an experiment by its name, "
            "and the registry has none that is this one"
        )
    return workers


def _resolve_settings(experiment: Experiment, config: Any) -> list[Setting]:
    settings = [plain(setting, "settings") for setting in experiment.settings(config)]
    if not settings or not all(isinstance(setting, dict) for setting in settings):
        raise ExperimentError(f"experiment {experiment.name!r}: settings(config) must list dicts")
    if any(setting in settings[:i] for i, setting in enumerate(settings)):
        raise ExperimentError(f"experiment {experiment.name!r}: settings(config) lists one twice")
    return settings


def _task(setting: Setting, seed: int) -> str:
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
    root = Path(__file__).resolve().parents[2]
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
    experiment: Experiment,
    label: str,
    seeds: list[int],
    device: torch.device,
    seconds: float,
    workers: int,
) -> dict[str, Any]:
    import sam_lab

    # The canonical command, not sys.argv: it can be repeated anywhere and holds no local path.
    call = f'sam_lab.experiments.run("{experiment.name}", config, seeds={seeds})'
    return {
        "seeds": seeds,
        "sam_lab": sam_lab.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": device_name(device),
        "threads": max(1, torch.get_num_threads() // workers),
        "command": command(experiment.name, label, seeds) if label in experiment.presets else call,
        "seconds": round(seconds, 1),
        **({"workers": workers} if workers > 1 else {}),
        "date": datetime.now(UTC).date().isoformat(),
    }
