"""Experiments: the registry, running and resuming, the command line."""

import dataclasses
import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_experiment import TOY, Config, claim_of, result_of, toy

from sam_lab import experiments
from sam_lab.experiments import (
    Busy,
    Cell,
    Experiment,
    ExperimentError,
    Result,
    Studies,
    Study,
)
from sam_lab.experiments.__main__ import main
from sam_lab.experiments.lab.store import Store
from sam_lab.experiments.sam import sam_edge_mlp


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write toy modules into the experiments package, for the length of one test."""
    folder = tmp_path / "more_experiments"
    folder.mkdir()
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(folder)])
    before = set(sys.modules)

    def add(name, text=TOY):
        (folder / f"{name}.py").write_text(text.replace("NAME", name))
        return folder

    yield add
    for name in set(sys.modules) - before:
        if name.startswith("sam_lab.experiments."):
            del sys.modules[name]
            vars(experiments).pop(name.rpartition(".")[2], None)


# --- experiments and their registry ---------------------------------------------------------------


@dataclass
class Thawed:
    lr: float = 0.1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "No Module"}, ValueError, "must be a module name, got 'No Module'"),
        ({"presets": {"laptop": Config()}}, ValueError, "'toy' needs a preset 'paper'"),
        ({"presets": {"laptop": Thawed(), "paper": Config()}}, TypeError, "frozen dataclass"),
        ({"presets": {"laptop": Config, "paper": Config()}}, TypeError, "an instance of a datacl"),
        ({"presets": {"laptop": {"lr": 1}, "paper": Config()}}, TypeError, "an instance of a data"),
        (
            {"presets": {"laptop": Config(lr=math.nan), "paper": Config()}},
            TypeError,
            r"Config\.lr must be finite",
        ),
        (
            {"presets": {"laptop": Config(), "paper": Config(), "Big one": Config()}},
            ValueError,
            "cannot be called 'Big one'",
        ),
        ({"claims": [claim_of([1]), claim_of([1])]}, ValueError, "claim ids must differ"),
    ],
)
def test_an_experiment_is_checked_when_it_is_made(change, error, message):
    good = {
        "name": "toy",
        "title": "A toy",
        "source": "Nobody",
        "presets": {"laptop": Config(), "paper": Config()},
        "settings": lambda config: [{}],
        "run": lambda *args: {},
    }
    with pytest.raises(error, match=message):
        Experiment(**{**good, **change})


def test_the_registry_finds_modules_by_itself(package):
    package("toy_edge")
    package("not_an_experiment", "X = 1")
    assert "toy_edge" in experiments.names() and "not_an_experiment" not in experiments.names()
    assert experiments.get("toy_edge").title == "A toy that grows"
    with pytest.raises(ExperimentError, match=r"no experiment 'toy_edg'; there are .*toy_edge"):
        experiments.get("toy_edg")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        ("EXPERIMENT = 3", "EXPERIMENT must be an Experiment, got 3"),
        (TOY.replace('"NAME"', '"another"'), "its name is 'another'"),
    ],
)
def test_a_broken_experiment_is_named_and_hides_no_other(package, capsys, text, why):
    package("toy_edge")
    package("toy_broken", text)
    assert "toy_edge" in experiments.names()
    with pytest.raises(ExperimentError, match=f"'toy_broken' cannot be imported: .*{why}"):
        experiments.get("toy_broken")
    assert main(["list"]) == 2
    said = capsys.readouterr()
    assert "toy_edge  (laptop, paper)" in said.out
    assert "'toy_broken' cannot be imported" in said.err


def test_an_experiment_is_found_in_a_folder_and_its_name_stands_once(package):
    folder = package("toy_edge")
    (folder / "part").mkdir()
    (folder / "part" / "__init__.py").write_text("")
    (folder / "part" / "toy_inner.py").write_text(TOY.replace("NAME", "toy_inner"))
    (folder / "broken_part").mkdir()
    (folder / "broken_part" / "__init__.py").write_text("1 / 0")
    assert {"toy_edge", "toy_inner"} <= set(experiments.names())
    assert experiments.get("toy_inner").name == "toy_inner"
    assert experiments.broken() == {"broken_part": "ZeroDivisionError: division by zero"}
    (folder / "part" / "toy_edge.py").write_text(TOY.replace("NAME", "toy_edge"))
    assert "another folder has an experiment of this name" in experiments.broken()["toy_edge"]


def test_a_result_is_judged_by_the_experiment_of_its_name(package):
    package("toy_edge")
    result = experiments.run("toy_edge", seeds=2, progress=False)
    (verdict,) = experiments.judge(result)
    assert verdict.claim.id == "slope" and verdict.values == (1.0, 1.01)
    assert experiments.table(result).rows[0][0] == "x grows by lr a step"
    with pytest.raises(ExperimentError, match="no experiment 'toy'"):
        experiments.judge(result_of())


def test_every_registered_experiment_is_well_formed():
    assert experiments.broken() == {}
    for name in experiments.names():
        experiment = experiments.get(name)
        assert experiment.claims, f"{name} decides no claim"
        for config in experiment.presets.values():
            assert experiment.settings(config)


# --- running --------------------------------------------------------------------------------------


def test_a_run_has_every_setting_with_every_seed_and_its_origin():
    result = experiments.run(toy(claim_of([1, 1, 1])), progress=False)
    assert [(run.settings["lr"], run.seed) for run in result.runs] == [
        (lr, seed) for lr in (0.1, 0.2) for seed in (0, 1, 2)
    ]
    assert (result.experiment, result.scale, result.config) == (
        "toy",
        "laptop",
        {"steps": 3, "lr": 0.1},
    )
    (origin,) = result.provenance
    assert origin["seeds"] == [0, 1, 2]
    assert origin["torch"] == torch.__version__ and origin["threads"] == torch.get_num_threads()
    assert origin["command"] == "python -m sam_lab.experiments run toy --scale laptop --seeds 3"
    assert origin["device"].startswith(("cpu: ", "cuda: "))
    assert set(origin) >= {"sam_lab", "python", "numpy", "seconds", "date"}


def test_a_config_stands_for_a_scale():
    assert experiments.run(toy(), Config(steps=30), progress=False).scale == "paper"
    result = experiments.run(toy(), Config(steps=1), seeds=[5, 3], progress=False)
    assert (result.scale, result.seeds) == ("custom", (5, 3))
    assert result.provenance[0]["command"] == 'sam_lab.experiments.run("toy", config, seeds=[5, 3])'
    assert all(len(run["x"]) == 1 for run in result.runs)


def test_seeds_in_the_command_line_of_a_result():
    made = experiments.run(toy(), seeds=(np.int64(4), 2), progress=False)
    assert made.provenance[0]["command"].endswith("--seeds 4,2")
    one = experiments.run(toy(), seeds=[7], progress=False)
    assert one.provenance[0]["command"].endswith("--seeds 7,")  # 7 alone would be seven seeds
    assert one.command == one.provenance[0]["command"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experiment": "zzz"}, "no experiment 'zzz'"),
        ({"scale": "huge"}, "has no scale 'huge'; it has laptop, paper"),
        ({"scale": 3}, "scale must be a preset's name or a Config, got 3"),
        ({"scale": Thawed()}, "scale must be a preset's name or a Config"),
        ({"seeds": 0}, "seeds must be"),
        ({"seeds": -1}, "seeds must be"),
        ({"seeds": True}, "seeds must be"),
        ({"seeds": "3"}, "seeds must be"),
        ({"seeds": 2.5}, "seeds must be"),
        ({"seeds": []}, "seeds must be"),
        ({"seeds": [1, 1]}, "seeds must be"),
        ({"seeds": [0, -1]}, "seeds must be"),
        ({"seeds": [0.5]}, "seeds must be"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"workers": 0}, "workers must be a whole number >= 1, got 0"),
        ({"workers": 1.5}, "workers must be a whole number >= 1, got 1.5"),
        ({"workers": 2}, "workers must be 1 for 'toy': several find an experiment by its name"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_starts(arguments, message):
    def never(*args):
        raise AssertionError("it started")

    with pytest.raises(ExperimentError, match=message):
        experiments.run(**{"experiment": toy(run=never), "progress": False, **arguments})


@pytest.mark.parametrize("settings", [[], [3], [{"a": 1}, {"a": 1}]])
def test_settings_are_a_list_of_different_dicts(settings):
    with pytest.raises(ExperimentError, match=r"experiment 'toy': settings\(config\)"):
        experiments.run(toy(settings=lambda config: settings), progress=False)


def test_out_that_cannot_be_written_is_refused_before_it_starts(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match="cannot write to out="):
        experiments.run(toy(), out=tmp_path / "file", progress=False)


def test_a_package_that_is_not_there_is_missed_before_the_first_run(tmp_path):
    made = []
    lacking = dataclasses.replace(
        toy(run=lambda config, cell: made.append(cell)), needs=["no_such_package"]
    )
    with pytest.raises(ImportError, match="'no_such_package' is needed here, and it is not"):
        experiments.run(lacking, out=tmp_path / "out", device="cpu", progress=False)
    assert not made and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", experiments.names())
def test_experiments_that_end_in_autoattack_look_for_it_first(name):
    source = Path(inspect.getfile(experiments.get(name).run)).read_text(encoding="utf-8")
    judged = re.search(r"\b(two_judges|autoattack)\b", source) is not None
    assert ("pyautoattack" in experiments.get(name).needs) == judged


def test_an_exception_in_a_run_says_which(tmp_path):
    def fail(config, cell):
        if cell.seed == 1:
            raise RuntimeError("loss is not finite")
        return {"x": [1.0]}

    with pytest.raises(RuntimeError, match="loss is not finite") as caught:
        experiments.run(toy(run=fail), out=tmp_path, progress=False)
    assert caught.value.__notes__ == ["in experiment 'toy', lr=0.1, seed=1"]
    assert len(list((tmp_path / ".toy.laptop.partial").glob("*.json"))) == 1


def test_with_out_the_file_alone_is_left(tmp_path):
    result = experiments.run(toy(claim_of([1, 1, 1])), out=tmp_path / "new", progress=False)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["toy.laptop.json"]
    assert Result.load(tmp_path / "new" / "toy.laptop.json") == result


def test_a_claim_that_fails_does_not_cost_the_runs(tmp_path):
    experiment = toy(claim_of(lambda runs: runs.one(lr=0.1).value("absent")))
    result = experiments.run(experiment, out=tmp_path, progress=False)
    assert len(Result.load(tmp_path / "toy.laptop.json").runs) == 6
    (verdict,) = experiment.judge(result)
    assert verdict.verdict == "inconclusive" and "no column 'absent'" in verdict.reason


def test_a_result_with_other_seeds_is_not_overwritten(tmp_path):
    def never(config, cell):
        raise AssertionError("it started")

    experiments.run(toy(), seeds=[3, 4], out=tmp_path, progress=False)
    with pytest.raises(ExperimentError, match=r"toy.laptop.json has seed 4, which would be lost"):
        experiments.run(toy(run=never), seeds=[3, 5], out=tmp_path, progress=False)
    assert Result.load(tmp_path / "toy.laptop.json").seeds == (3, 4)
    experiments.run(toy(), seeds=[3, 4, 5], out=tmp_path, progress=False)
    assert Result.load(tmp_path / "toy.laptop.json").seeds == (3, 4, 5)


def test_studies_are_the_settings_and_the_run_of_one_experiment():
    studies = Studies(
        Study(
            "drift", lambda config: [{"lr": config.lr}], lambda config, cell: {"x": [cell["lr"]]}
        ),
        Study("edge", lambda config: [{}, {"k": 2}], lambda config, cell: {"y": [cell.seed]}),
    )
    experiment = toy(settings=studies.settings, run=studies.run)
    result = experiments.run(experiment, seeds=2, progress=False)
    assert result.settings == [
        {"study": "drift", "lr": 0.1},
        {"study": "edge"},
        {"study": "edge", "k": 2},
    ]
    assert [run.value("x") for run in result.select(study="drift")] == [0.1, 0.1]
    assert [run.value("y") for run in result.select(study="edge", k=2)] == [0, 1]


def test_a_cell_is_its_setting_and_stands_alone():
    cell = Cell({"lr": 0.1})
    assert cell["lr"] == 0.1 and cell.seed == 0 and cell.device == "cpu"
    cell.tick(1, 2)  # nobody is told
    with pytest.raises(KeyError, match="rho"):
        cell["rho"]


def test_progress_as_plain_lines_and_silent(capsys):
    def run(config, cell):
        cell.tick(1, 2)
        cell.tick(0, 0)
        return {}

    experiments.run(toy(run=run), seeds=1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition("  ")[0] for line in lines] == [
        "toy, laptop: 1/2  lr=0.1, seed=0",
        "toy, laptop: 2/2  lr=0.2, seed=0",
    ]
    experiments.run(toy(run=run), seeds=1, progress=False)
    assert capsys.readouterr() == ("", "")


def test_long_runs_report_along_the_way(capsys, monkeypatch):
    monkeypatch.setattr("sam_lab.experiments.lab.progress._LINE_EVERY", -1.0)

    def run(config, cell):
        cell.tick(1, 2)
        return {}

    experiments.run(toy(run=run), seeds=1)
    assert "toy, laptop: lr=0.1, seed=0: 1 of 2" in capsys.readouterr().err


def test_progress_is_a_bar_in_a_terminal(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    experiments.run(toy(), seeds=1)
    shown = capsys.readouterr().err
    assert "100%" in shown and "2.0/2" in shown and "seed=0" in shown


def test_progress_without_tqdm_is_lines_even_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    experiments.run(toy(), seeds=1)
    assert len(capsys.readouterr().err.splitlines()) == 2


# --- several workers ------------------------------------------------------------------------------

# Processes of their own find an experiment by its name, so these are runs of a shipped one.
NARROW = sam_edge_mlp.Config(images=40, hidden=(4,), lrs=(0.1, 0.2), rhos=(0.0,), steps=4, every=2)


@pytest.mark.slow
def test_several_workers_make_the_same_result(tmp_path):
    ways = {"seeds": 2, "device": "cpu", "progress": False}
    alone = experiments.run("sam_edge_mlp", NARROW, **ways)
    shared = experiments.run("sam_edge_mlp", NARROW, workers=2, out=tmp_path, **ways)
    assert shared.runs == alone.runs
    (origin,) = shared.provenance
    assert origin["workers"] == 2 and "workers" not in alone.provenance[0]
    assert origin["threads"] == max(1, torch.get_num_threads() // 2)
    assert [path.name for path in tmp_path.iterdir()] == ["sam_edge_mlp.custom.json"]


@pytest.mark.slow
def test_a_run_that_fails_does_not_cost_those_beside_it(tmp_path):
    diverging = dataclasses.replace(NARROW, lrs=(0.1, 1e30))
    with pytest.raises(FloatingPointError, match="not finite") as caught:
        experiments.run("sam_edge_mlp", diverging, 2, "cpu", tmp_path, progress=False, workers=4)
    assert any("lr=1e+30" in note for note in caught.value.__notes__)
    kept = (tmp_path / ".sam_edge_mlp.custom.partial").glob("*.json")
    assert len(list(kept)) == 2
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_an_interrupt_ends_the_workers(tmp_path, monkeypatch):
    put = Store.put

    def put_and_stop(self, *run):
        put(self, *run)
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "put", put_and_stop)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after \d of 4 runs; they are kept in"):
        experiments.run("sam_edge_mlp", NARROW, 2, "cpu", tmp_path, progress=False, workers=2)
    assert multiprocessing.active_children() == []


# --- interrupted and taken up again ---------------------------------------------------------------


def _stopping(after):
    """A toy that is interrupted in its run number `after`, and counts the runs it finishes."""
    made = []

    def run(config, cell):
        if len(made) == after[0]:
            raise KeyboardInterrupt
        made.append((cell["lr"], cell.seed))
        return {"x": [cell["lr"] + cell.seed]}

    return toy(run=run), made


def test_ctrl_c_keeps_what_is_finished_and_the_same_call_goes_on(tmp_path):
    after = [2]
    experiment, made = _stopping(after)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after 2 of 6 runs; they are kept in .*"):
        experiments.run(experiment, out=tmp_path, progress=False)
    assert not (tmp_path / "toy.laptop.json").exists()
    after[0] = -1
    result = experiments.run(experiment, out=tmp_path, progress=False)
    assert len(made) == len(set(made)) == 6
    assert [run["x"][0] for run in result.runs] == [0.1, 1.1, 2.1, 0.2, 1.2, 2.2]
    assert [path.name for path in tmp_path.iterdir()] == ["toy.laptop.json"]


def test_ctrl_c_without_out_says_so():
    with pytest.raises(KeyboardInterrupt, match="stopped after 1 of 6 runs$"):
        experiments.run(_stopping([1])[0], progress=False)


@pytest.mark.parametrize("change", ["config", "code", "damage", "swap"])
def test_kept_runs_that_are_stale_or_damaged_are_made_again(tmp_path, monkeypatch, change):
    after = [2]
    experiment, made = _stopping(after)
    with pytest.raises(KeyboardInterrupt):
        experiments.run(experiment, Config(steps=1), out=tmp_path, progress=False)
    kept = sorted((tmp_path / ".toy.custom.partial").glob("*.json"))
    assert len(kept) == 2
    config, lost = Config(steps=1), 2
    if change == "config":
        config = Config(steps=2)
    elif change == "code":
        monkeypatch.setattr(
            "sam_lab.experiments.lab.runner._source_digest", lambda experiment: "new"
        )
    elif change == "damage":
        kept[0].write_bytes(kept[0].read_bytes()[:-40])
        lost = 1
    else:
        kept[0].write_bytes(kept[1].read_bytes())
        lost = 1
    after[0] = -1
    result = experiments.run(experiment, config, out=tmp_path, progress=False)
    assert len(made) == 6 + lost
    assert [run["x"][0] for run in result.runs] == [0.1, 1.1, 2.1, 0.2, 1.2, 2.2]


def test_finished_seeds_serve_a_call_for_more(tmp_path):
    after = [3]
    experiment, made = _stopping(after)
    with pytest.raises(KeyboardInterrupt):
        experiments.run(experiment, seeds=2, out=tmp_path, progress=False)
    after[0] = -1
    experiments.run(experiment, seeds=4, out=tmp_path, progress=False)
    assert len(made) == len(set(made)) == 8


def test_two_processes_do_not_share_a_folder(tmp_path):
    holder = Store(tmp_path, "toy.laptop", "key").open()
    with pytest.raises(Busy, match="another process is writing"):
        experiments.run(toy(), out=tmp_path, progress=False)
    assert experiments.run(toy(), "paper", out=tmp_path, progress=False).scale == "paper"
    holder.close()
    holder.close()
    assert experiments.run(toy(), out=tmp_path, progress=False).scale == "laptop"


def test_a_folder_that_its_holder_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    """The holder finishes between our opening of its lock file and our locking of it."""
    from sam_lab.experiments.lab import store

    lock, removed = store._lock, []

    def finish_first(file):
        if not removed:
            removed.append((tmp_path / ".toy.laptop.partial" / "lock").unlink())
        lock(file)

    monkeypatch.setattr(store, "_lock", finish_first)
    held = Store(tmp_path, "toy.laptop", "key").open()
    assert (held.folder / "lock").exists()
    with pytest.raises(Busy):
        Store(tmp_path, "toy.laptop", "key").open()
    held.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_never_stays_is_an_error(tmp_path, monkeypatch):
    from sam_lab.experiments.lab import store

    monkeypatch.setattr(store, "_lock", lambda file: os.unlink(file.name))
    with pytest.raises(Busy, match="appears and disappears"):
        Store(tmp_path, "toy.laptop", "key").open()


def test_code_without_a_text_is_never_taken_up_again(tmp_path):
    """An experiment typed at a prompt may have changed without a trace."""
    made = []
    scope = {"made": made, "stop": [1]}
    exec(
        "def run(config, cell):\n"
        "    if len(made) == stop[0]: raise KeyboardInterrupt\n"
        "    made.append(cell.seed)\n"
        "    return {}\n",
        scope,
    )
    experiment = toy(run=scope["run"])
    with pytest.raises(KeyboardInterrupt):
        experiments.run(experiment, out=tmp_path, progress=False)
    scope["stop"][0] = -1
    experiments.run(experiment, out=tmp_path, progress=False)
    assert len(made) == 7


def _command(folder, *arguments, **environment):
    """The command line in a process of its own, with the toys of `folder` in the package."""
    code = f"""
        import sys
        from sam_lab import experiments
        from sam_lab.experiments.__main__ import main
        experiments.__path__.append({str(folder)!r})
        sys.exit(main({[str(argument) for argument in arguments]!r}))
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        # What starts the tests may have told all below it to ignore an interrupt.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_kill_9_loses_at_most_the_run_in_progress(package, tmp_path):
    folder, out, log = package("toy_killed"), tmp_path / "out", tmp_path / "log"
    partial = out / ".toy_killed.laptop.partial"
    arguments = ("run", "toy_killed", "--out", out)
    process = _command(folder, *arguments, TOY_SLOW="0.3", TOY_LOG=str(log))
    _wait_for(lambda: len(list(partial.glob("*.json"))) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = len(list(partial.glob("*.json")))
    assert 2 <= kept < 6 and not (out / "toy_killed.laptop.json").exists()
    (partial / ".half.json.0.tmp").write_text("cut sho")  # as if killed while it wrote
    (out / ".toy_killed.laptop.json.0.tmp").write_text("cut sho")
    before = log.read_text().splitlines()

    process = _command(folder, *arguments, TOY_LOG=str(log))
    said, progress = process.communicate()
    assert process.returncode == 0, progress
    assert progress.count("kept from before") == kept
    assert len(log.read_text().splitlines()) - len(before) == 6 - kept
    assert [path.name for path in out.iterdir()] == ["toy_killed.laptop.json"]
    assert len(Result.load(out / "toy_killed.laptop.json").runs) == 6
    assert "reproduced" in said


@pytest.mark.slow
def test_ctrl_c_on_the_command_line(package, tmp_path):
    folder, out = package("toy_stopped"), tmp_path / "out"
    partial = out / ".toy_stopped.laptop.partial"
    process = _command(folder, "run", "toy_stopped", "--out", out, TOY_SLOW="0.5")
    _wait_for(lambda: len(list(partial.glob("*.json"))) >= 1, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "the same command goes on from there" in said and "Traceback" not in said
    assert not (out / "toy_stopped.laptop.json").exists()
    for path in partial.glob("*.json"):
        json.loads(path.read_text())


# --- the command line -----------------------------------------------------------------------------


def test_run_and_show(package, tmp_path, capsys):
    package("toy_shown")
    out = tmp_path / "out"
    assert main(["run", "toy_shown", "--seeds", "0,1,2", "--quiet", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "Verdict    reproduced" in said.out and said.err == ""
    assert main(["show", str(out / "toy_shown.laptop.json")]) == 0
    shown = capsys.readouterr().out
    assert "toy_shown, laptop scale, seeds 0, 1, 2" in shown
    assert "python -m sam_lab.experiments run toy_shown --scale laptop --seeds 3" in shown
    assert "Statement  x grows by lr a step" in shown and "Verdict    reproduced" in shown


def test_merge_on_the_command_line(package, tmp_path, capsys):
    package("toy_shards")
    for name, seeds in (("a", "2"), ("b", "5,")):
        run = ["run", "toy_shards", "--seeds", seeds, "--quiet", "--out", str(tmp_path / name)]
        assert main(run) == 0
    shards = [str(tmp_path / name / "toy_shards.laptop.json") for name in "ab"]
    out = tmp_path / "new" / "both"
    assert main(["merge", *shards, "--out", str(out)]) == 0
    merged = out / "toy_shards.laptop.json"
    assert f"seeds 0, 1, 5 in {merged}" in capsys.readouterr().out
    assert Result.load(merged).seeds == (0, 1, 5)
    assert main(["show", str(merged)]) == 0
    shown = capsys.readouterr().out
    assert "seeds 0, 1, sam_lab" in shown and "seeds 5, sam_lab" in shown
    assert "run toy_shards --scale laptop --seeds 5," in shown and "(3 seeds, laptop)" in shown
    assert main(["merge", shards[0], shards[0], "--out", str(out)]) == 2
    assert "seed 0 stands in two results" in capsys.readouterr().err
    more = str(tmp_path / "c")
    assert main(["run", "toy_shards", "--seeds", "7,", "--quiet", "--out", more]) == 0
    third = str(tmp_path / "c" / "toy_shards.laptop.json")
    assert main(["merge", shards[1], third, "--out", str(out)]) == 2
    assert "has seed 0, 1, which would be lost" in capsys.readouterr().err
    assert Result.load(merged).seeds == (0, 1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "toy_edg"], "no experiment 'toy_edg'"),
        (["run", "toy_cli", "--scale", "huge"], "no scale 'huge'; it has laptop, paper"),
        (["run", "toy_cli", "--seeds", "0"], "seeds must be"),
        (["run", "toy_cli", "--seeds", "many"], "--seeds must be a number"),
        (["run", "toy_cli", "--seeds", "1,1"], "seeds must be"),
        (["run", "toy_cli", "--workers", "0"], "workers must be a whole number"),
        (["run", "toy_cli", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["show", "absent.json"], "absent.json"),
        (["merge", "absent.json"], "absent.json"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    package, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    package("toy_cli")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and len(said.splitlines()) == 1


def test_an_interrupt_anywhere_is_exit_code_130(monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sam_lab.experiments.__main__.run", interrupt)
    assert main(["run", "toy"]) == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_bad_out_and_bad_file_on_the_command_line(package, tmp_path, capsys):
    package("toy_cli")
    (tmp_path / "file.json").write_text("{")
    assert main(["run", "toy_cli", "--out", str(tmp_path / "file.json")]) == 2
    assert "cannot write to out=" in capsys.readouterr().err
    assert main(["show", str(tmp_path / "file.json")]) == 2
    assert "file.json: damaged or cut short" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_line_needs_torch_and_numpy_alone():
    code = textwrap.dedent("""
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {"tqdm", "matplotlib", "scipy", "sklearn", "ipywidgets",
                                          "mlxtend", "torchvision", "PIL", "IPython"}:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Absent())
        from sam_lab.experiments.__main__ import main
        sys.exit(main(["list"]))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_scipy_an_experiment_runs_and_says_what_verdicts_need(
    package, tmp_path, capsys, monkeypatch
):
    package("toy_bare")
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert main(["run", "toy_bare", "--out", str(tmp_path), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "no verdicts: 'scipy.stats' is needed here" in printed and "[book]" in printed
    path = tmp_path / "toy_bare.laptop.json"
    assert f"written to {path}" in printed and path.is_file()
    assert main(["show", str(path)]) == 2
    assert "'scipy.stats' is needed here" in capsys.readouterr().err
