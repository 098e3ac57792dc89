"""Experiments that switch once: SGD up to some epoch and something else from there, or the reverse.

For each setting and seed there are two trunks, each trained to the end: one of SGD, and one of what
is studied (SAM, or attacked examples), called *full*. From the SGD trunk branch the runs that
switch late, from the full trunk those that had it early and go back to SGD. So all runs of a
setting share their weights up to the switch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from sam_lab.experiments.lab.claims import Claim, NotApplicable
from sam_lab.experiments.lab.cost import measurement
from sam_lab.experiments.lab.experiment import Cell
from sam_lab.experiments.lab.result import Result, Run, SeedRuns
from sam_lab.experiments.lab.statistics import Ratio
from sam_lab.experiments.recipe import Recipe
from sam_lab.training import (
    Phase,
    Schedule,
    Training,
    constant,
    cosine,
    early,
    late,
    step_decay,
)

__all__ = [
    "IN_STEPS",
    "SCHEDULES",
    "against_share",
    "branches",
    "clock",
    "cost",
    "ends",
    "off_the_clock",
    "reached",
    "scheduled",
    "summed_lr",
    "unless_in_steps",
]

IN_STEPS = "With a learning rate that falls in steps, "
"""How a claim on the runs with the schedule "steps" begins."""

SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    # the schedule of the paper's code for its wide networks
    "steps": step_decay({0.3: 0.2, 0.6: 0.04}),
    # what a practitioner would do: the late phase at the full rate, then a short one at a small
    "drop": step_decay({0.9: 0.1}),
    # what a short training wants: it ends near zero
    "cosine": cosine,
}


def branches(
    start: Training,
    late_at: tuple[float, ...],
    early_at: tuple[float, ...],
    how: dict[str, Any],
    cell: Cell,
) -> Iterator[tuple[dict[str, float], Training | None, Training]]:
    """Train all runs of one setting.

    Args:
        start: the training before its first epoch.
        late_at, early_at: at which share of the epochs runs switch to what is studied, or away
            from it.
        how: what is studied, as `training.late` takes it.
        cell: told how many epochs are done, and of how many; and keeps where the trainings stand,
            so that an interrupted run goes on from there.

    Yields:
        For each run, `switched_on` and `switched_off`: what is studied ran in the epochs
        [on, off), an empty interval is SGD throughout; the training at the switch, None where
        nothing switches; and the training at its end.

    Raises:
        ValueError: shares of the epochs that fall on one epoch, or on none that can be switched at.
    """
    epochs = start.epochs
    switches = {
        late: _epochs("late", late_at, epochs),
        early: _epochs("early", early_at, epochs),
    }
    total = 2 * epochs + sum(epochs - at for times in switches.values() for at in times)
    done = 0

    def go_on(training: Training, until: int, name: str) -> Training:
        nonlocal done
        begun, state = training.epoch, cell.checkpoints.load(name, cell.device)
        if state is not None:
            training.load_state_dict(state)
        before = done - begun

        def on_epoch() -> None:
            cell.tick(before + training.epoch, total)
            cell.checkpoints.save(name, training.state_dict)

        training.run(until, on_epoch=on_epoch)
        done = before + until
        return training

    # a switch at the end is no switch: SGD throughout, and the other throughout
    for switch_at, times in switches.items():
        trunk = start.branch(switch_at(epochs, epochs, **how))
        for at in times:
            go_on(trunk, at, f"{switch_at.__name__}.trunk{at}")
            branch = trunk.branch(switch_at(at, epochs, **how))
            end = go_on(branch, epochs, f"{switch_at.__name__}.branch{at}")
            yield _interval(end), trunk, end
        go_on(trunk, epochs, f"{switch_at.__name__}.trunk{epochs}")
        yield _interval(trunk), None, trunk


def cost(
    recipe: Recipe,
    late_at: tuple[float, ...],
    early_at: tuple[float, ...],
    studied: int,
    hessians: int,
    judged: float = 0,
) -> float:
    """FLOPs of all runs of one setting with one seed.

    Args:
        late_at, early_at: as `branches` takes them.
        studied: gradients that a step of what is studied takes, where one of SGD takes one.
        hessians: measurements of a Hessian at the end of a run.
        judged: gradients of single examples that attacks take at the end of a run.
    """
    late_epochs = recipe.epochs * (1 + sum(1 - at for at in late_at))
    sgd_epochs = recipe.epochs * (1 + sum(1 - at for at in early_at))
    gradient, runs = recipe.gradient_flops(), 2 + len(late_at) + len(early_at)
    training = recipe.train * (studied * late_epochs + sgd_epochs) * gradient
    return training + runs * (
        hessians * measurement(recipe.measured * gradient) + judged * gradient
    )


def _epochs(name: str, shares: tuple[float, ...], epochs: int) -> list[int]:
    """The epochs of the switches, in ascending order."""
    switches = sorted({round(share * epochs) for share in shares})
    if len(switches) < len(shares) or any(not 0 < at < epochs for at in switches):
        raise ValueError(
            f"{name} must be shares of the {epochs} epochs that fall on different ones, "
            f"neither the first nor the end, got {shares}"
        )
    return switches


def _interval(training: Training) -> dict[str, float]:
    """The epochs of the phase that is more than the optimizer."""
    (on, off) = next(
        (
            (phase.start, phase.stop)
            for phase in training.phases
            if phase != Phase(phase.start, phase.stop)
        ),
        (training.epochs, training.epochs),
    )
    return {"switched_on": float(on), "switched_off": float(off)}


# --- what has been run ----------------------------------------------------------------------------


def ends(run: Run, name: str, method: str, share: float | None = None) -> float:
    """A column's value at the end of one run.

    Args:
        method: "sgd" or "full" throughout; "late", what is studied from `share` of the epochs on;
            or "early", up to there.

    Raises:
        ValueError: an unknown method.
        NotApplicable: no run at this scale switches there.
    """
    on, off = run["switched_on"], run["switched_off"]
    epochs = off.max()
    at = round((share or 0) * epochs)
    spans = {"sgd": (epochs, epochs), "full": (0, epochs), "late": (at, epochs), "early": (0, at)}
    if method not in spans:
        raise ValueError(f"method must be one of {', '.join(spans)}, got {method!r}")
    rows = np.flatnonzero((on == spans[method][0]) & (off == spans[method][1]))
    if len(rows) != 1:
        phases = ", ".join(f"{start:g} to {stop:g}" for start, stop in zip(on, off, strict=True))
        raise NotApplicable(
            f"no run with {method} at {share} of the epochs; the phases at this scale are {phases}"
        )
    return float(run[name][rows[0]])


def reached(run: Run, name: str, method: str, share: float, *, log: bool = False) -> Ratio:
    """How far a run is from SGD (0) to what is studied throughout (1), in a column.

    Args:
        log: measure in the logarithm of the column.

    Returns:
        The run's distance from SGD, and the whole distance, which is positive where what is studied
        makes the column smaller.
    """
    sgd, full, other = (ends(run, name, *which) for which in (("sgd",), ("full",), (method, share)))
    if log:
        sgd, full, other = (float(np.log(value)) for value in (sgd, full, other))
    return Ratio(sgd - other, sgd - full)


def scheduled(runs: SeedRuns, schedule: str) -> Run:
    """The run with the base's settings and this schedule.

    Raises:
        NotApplicable: no run at this scale has the schedule.
    """
    there = {run.settings["schedule"] for run in runs.runs}
    if schedule not in there:
        raise NotApplicable(
            f"no run at this scale has the schedule {schedule!r}; they have "
            f"{', '.join(sorted(there))}"
        )
    return runs.base(schedule=schedule)


def unless_in_steps(claim: Claim) -> Claim:
    """The claim at a scale whose base has another schedule than "steps"; where it has that one, the
    runs belong to the claim that begins with `IN_STEPS`."""

    def statistic(runs: SeedRuns) -> float | Ratio:
        if runs.runs[0].settings["schedule"] == "steps":
            raise NotApplicable("the learning rate falls in steps in all runs at this scale")
        return claim(runs)

    return replace(claim, statistic=statistic)


def against_share(
    result: Result, name: str, method: str, **changed: Any
) -> tuple[np.ndarray, np.ndarray]:
    """A column at the end, against the share of the epochs that had what is studied.

    Args:
        method: "late", at the end of training; or "early", at its beginning.
        changed: the factor in which the setting differs from the base.

    Returns:
        Shares (T,), ascending, from SGD throughout (0) to the other throughout (1); values
        (seeds, T).
    """
    runs = [seed.base(**changed) for seed in result.by_seed()]
    on, off = runs[0]["switched_on"], runs[0]["switched_off"]
    chosen = off == off.max() if method == "late" else (on == 0) | (on == off)
    shares = ((off - on) / off.max())[chosen]
    order = np.argsort(shares)
    return shares[order], np.array([run[name][chosen][order] for run in runs])


def summed_lr(runs: SeedRuns, name: str, **changed: Any) -> tuple[np.ndarray, np.ndarray]:
    """How long the late phase has had, and a column at its end.

    Args:
        changed: the factor in which the setting differs from the base.

    Returns:
        The learning rate summed over the epochs of the late phase (T,), ascending, for each late
        switch; the column there, (T,).
    """
    run = runs.base(**changed)
    on, off = run["switched_on"], run["switched_off"]
    chosen = (off == off.max()) & (on < off) & (on > 0)
    sums = clock(runs, run)[chosen]
    order = np.argsort(sums)
    return sums[order], run[name][chosen][order]


def clock(runs: SeedRuns, run: Run) -> np.ndarray:
    """The learning rate summed over the epochs of what is studied, for each row of a run."""
    on, off = (run[name].astype(int) for name in ("switched_on", "switched_off"))
    schedule, epochs = SCHEDULES[run.settings["schedule"]], off.max()
    rates = runs.config["recipe"]["lr"] * np.array([schedule(e / epochs) for e in range(epochs)])
    return np.array([rates[begin:end].sum() for begin, end in zip(on, off, strict=True)])


def off_the_clock(
    runs: SeedRuns, course: Callable[[str], tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """How far other schedules lie above the constant one after equal summed learning rates.

    Args:
        course: gives summed learning rates (T,), ascending, and values (T,) of a schedule.

    Returns:
        The difference at every late switch of another schedule whose sum the constant one has
        reached too; values are interpolated in the logarithm of the sum.

    Raises:
        NotApplicable: there is no such switch, or no run at a constant rate.
    """
    scheduled(runs, "constant")
    sums, values = course("constant")
    differences: list[float] = []
    for schedule in sorted({run.settings["schedule"] for run in runs.runs} - {"constant"}):
        other_sums, other = course(schedule)
        shared = (sums.min() <= other_sums) & (other_sums <= sums.max())
        expected = np.interp(np.log(other_sums[shared]), np.log(sums), values)
        differences += (other[shared] - expected).tolist()
    if not differences:
        raise NotApplicable("no schedule has a late phase as long as one at the constant rate")
    return np.array(differences)
