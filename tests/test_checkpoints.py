"""Long runs that are interrupted go on from their last checkpoint and end as if they had not been.

`every=0` saves wherever a run may; what is compared are columns, bit for bit.
"""

import dataclasses

import numpy as np
import pytest
import torch
from toy_experiment import Config, toy

from sam_lab import experiments
from sam_lab.experiments import Cell
from sam_lab.experiments.inputs import late_adversarial
from sam_lab.experiments.lab.checkpoints import Checkpoints
from sam_lab.experiments.late import late_images, late_phase
from sam_lab.experiments.sam import sam_edge_cnn, sam_edge_transformer

RECIPE = {"data": "digits", "hidden": (4,), "train": 60, "test": 40, "batch": 20, "measured": 50}
RECIPE |= {"epochs": 4, "tol": 1e-2}
TIMES = {"late": (0.5, 0.75), "early": (0.5,)}
CASES = {
    "full batch": (
        sam_edge_cnn.run,
        dataclasses.replace(
            sam_edge_cnn.LAPTOP, images=20, widths=(2, 3), chunk=20, steps=9, every=3
        ),
        {"lr": 0.05, "rho": 0.1},
    ),
    "minibatches": (
        sam_edge_transformer.run,
        sam_edge_transformer.Config(
            layers=1, width=8, heads=2, key=3, length=6, batch=4, fixed=16, steps=9, every=3
        ),
        {"lr": 0.4, "rho": 0.1},
    ),
    "late SAM": (
        late_phase.run,
        dataclasses.replace(
            late_images.LAPTOP,
            recipe=late_images.LAPTOP.recipe.but(**RECIPE),
            points=3,
            trace_tol=0.5,
            **TIMES,
        ),
        {"schedule": "steps", "rho": 0.1, "smoothing": 0.1, "carried": True},
    ),
    "late attacks": (
        late_adversarial.run,
        dataclasses.replace(
            late_adversarial.LAPTOP,
            recipe=late_adversarial.LAPTOP.recipe.but(**RECIPE),
            attack_steps=2,
            n_autoattack=5,
            n_all_attacks=0,
            **TIMES,
        ),
        {"schedule": "steps"},
    ),
}


def assert_same(one, two):
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])  # NaN equals NaN


def stopped(run, config, setting, after, folder):
    """A run whose progress raises when it has been told so often; the ticks it was told."""
    ticks = []

    def tick(*progress):
        ticks.append(progress)
        if len(ticks) == after:
            raise KeyboardInterrupt

    cell = Cell(setting, 1, tick=tick, checkpoints=Checkpoints(folder, every=0))
    with pytest.raises(KeyboardInterrupt):
        run(config, cell)
    return ticks


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_as_one_that_was_not(case, tmp_path):
    run, config, setting = CASES[case]
    whole, ticks = run(config, Cell(setting, 1)), []
    last = 0
    for after in (2, 3, 4):  # after each stop the run must be further
        seen = stopped(run, config, setting, after, tmp_path)
        assert seen[0][0] == last + 1 or last == 0
        last = seen[-1][0] - 1  # the checkpoint of the step that was stopped was not made
    cell = Cell(
        setting,
        1,
        tick=lambda *progress: ticks.append(progress),
        checkpoints=Checkpoints(tmp_path, 0),
    )
    assert_same(run(config, cell), whole)
    assert ticks[0][0] == last + 1 and ticks[-1][0] == ticks[-1][1]


@pytest.mark.parametrize("case", ["full batch", "minibatches"])
def test_a_run_that_diverges_ends(case, tmp_path):
    """Steps that are skipped, as their gradient is not finite, count as steps of the run."""
    run, config, setting = CASES[case]
    config = dataclasses.replace(config, every=config.steps)
    cell = Cell({**setting, "lr": 1e30}, 1, checkpoints=Checkpoints(tmp_path, every=0))
    with pytest.raises(FloatingPointError, match="not finite"):
        run(config, cell)


def test_a_finished_training_is_taken_up_too_and_only_measured_again(tmp_path):
    run, config, setting = CASES["late SAM"]
    first = run(config, Cell(setting, 1, checkpoints=Checkpoints(tmp_path, 0)))
    ticks = []
    cell = Cell(setting, 1, tick=lambda *p: ticks.append(p), checkpoints=Checkpoints(tmp_path, 0))
    assert_same(run(config, cell), first)
    assert ticks == []


# --- the states themselves ------------------------------------------------------------------------


def test_states_are_kept_by_name_and_the_last_one_counts(tmp_path):
    kept = Checkpoints(tmp_path / "run", every=0)
    assert kept.load("a") is None and not (tmp_path / "run").exists()
    for step in range(3):
        kept.save("a", lambda step=step: {"step": step, "w": torch.full((2,), float(step))})
    kept.save("b", lambda: {"text": "other"})
    again = Checkpoints(tmp_path / "run")
    state = again.load("a")
    assert state["step"] == 2 and state["w"].tolist() == [2.0, 2.0]
    assert again.load("b") == {"text": "other"}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["a.pt", "b.pt"]


def test_without_a_folder_nothing_is_kept_and_no_state_is_made():
    kept = Checkpoints(every=0)
    kept.save("a", lambda: pytest.fail("made a state that goes nowhere"))
    assert kept.load("a") is None


def test_states_are_made_no_more_often_than_they_are_wanted(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    kept, made = Checkpoints(tmp_path, every=60), []
    for second in (30, 59, 60, 70, 119, 121):
        clock[0] = 100.0 + second
        kept.save("a", lambda second=second: made.append(second) or {"second": second})
    assert made == [60, 121]
    # time before an interruption counts up to the last state, and what was lost does not
    clock[0] = 1000.0
    again = Checkpoints(tmp_path)
    assert again.load("a") == {"second": 121}
    clock[0] = 1007.0
    assert again.seconds == 128


@pytest.mark.parametrize("damage", [b"", b"no checkpoint", None])
def test_a_damaged_state_is_none(tmp_path, damage):
    kept = Checkpoints(tmp_path, every=0)
    kept.save("a", lambda: {"w": torch.zeros(1000)})
    path = tmp_path / "a.pt"
    path.write_bytes(path.read_bytes()[:-500] if damage is None else damage)
    assert kept.load("a") is None


# --- in a run of an experiment --------------------------------------------------------------------


def _counting(steps_made, stop_at):
    """A toy of which each run has ten steps, with a checkpoint after each."""

    def run(config, cell):
        state = cell.checkpoints.load("steps") or {"step": 0}
        cell.checkpoints.every = 0
        for step in range(state["step"], 10):
            if len(steps_made) == stop_at[0]:
                raise KeyboardInterrupt
            steps_made.append((cell["lr"], cell.seed, step))
            cell.checkpoints.save("steps", lambda step=step: {"step": step + 1})
        return {"x": [cell["lr"]]}

    return toy(run=run)


def test_the_run_that_was_interrupted_goes_on_and_leaves_nothing(tmp_path):
    made, stop_at = [], [25]
    experiment = _counting(made, stop_at)
    with pytest.raises(KeyboardInterrupt, match="stopped after 2 of 6 runs"):
        experiments.run(experiment, out=tmp_path, progress=False)
    partial = tmp_path / ".toy.laptop.partial"
    assert len([path for path in partial.iterdir() if path.is_dir()]) == 1
    stop_at[0] = -1
    experiments.run(experiment, out=tmp_path, progress=False)
    assert len(made) == len(set(made)) == 60
    assert [path.name for path in tmp_path.iterdir()] == ["toy.laptop.json"]


def test_a_checkpoint_of_the_first_run_is_kept_though_no_run_is_finished(tmp_path):
    made, stop_at = [], [5]
    experiment = _counting(made, stop_at)
    with pytest.raises(KeyboardInterrupt, match="stopped after 0 of 6 runs"):
        experiments.run(experiment, out=tmp_path, progress=False)
    stop_at[0] = -1
    experiments.run(experiment, out=tmp_path, progress=False)
    assert len(made) == len(set(made)) == 60


def test_a_checkpoint_of_other_code_or_config_is_removed(tmp_path, monkeypatch):
    made, stop_at = [], [5]
    experiment = _counting(made, stop_at)
    for steps in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            experiments.run(experiment, Config(steps=steps), out=tmp_path, progress=False)
        stop_at[0] += 5
    assert [step for *_, step in made] == [0, 1, 2, 3, 4] * 2
    monkeypatch.setattr("sam_lab.experiments.lab.runner._source_digest", lambda experiment: "new")
    stop_at[0] = -1
    experiments.run(experiment, Config(steps=2), out=tmp_path, progress=False)
    assert len(made) == 10 + 60
    assert [path.name for path in tmp_path.iterdir()] == ["toy.custom.json"]
