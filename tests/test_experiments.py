"""Experiments: results on disk, claims and verdicts, the registry, running, the command line."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sam_lab import experiments
from sam_lab.experiments import (
    Busy,
    Claim,
    ClaimError,
    Criterion,
    Experiment,
    ExperimentError,
    Result,
    ResultError,
    Run,
    ledger,
    side_by_side,
)
from sam_lab.experiments.__main__ import main
from sam_lab.experiments.claims import t_interval, t_quantile
from sam_lab.experiments.result import write_whole
from sam_lab.experiments.store import Store

# A toy experiment as a reader would write one: `slow` seconds a step, a line in `log` per run made.
TOY = '''
"""A toy."""
import os, time
from dataclasses import dataclass
from sam_lab.experiments.core import Claim, Criterion, Experiment

@dataclass(frozen=True)
class Config:
    steps: int = 4
    lrs: tuple[float, ...] = (0.1, 0.2)

def settings(config):
    return [{"lr": lr} for lr in config.lrs]

def run(config, setting, seed, device, progress):
    xs = []
    for step in range(config.steps):
        time.sleep(float(os.environ.get("TOY_SLOW", 0)))
        xs.append(setting["lr"] * (1 + 0.01 * seed) * (step + 1))
        progress(step + 1, config.steps)
    if "TOY_LOG" in os.environ:
        with open(os.environ["TOY_LOG"], "a") as log:
            print(setting["lr"], seed, file=log)
    return {"x": xs}

EXPERIMENT = Experiment(
    "NAME", "A toy that grows", "Nobody (2020), Figure 1",
    {"laptop": Config(), "paper": Config(steps=8)}, settings, run,
    [Claim("slope", "x grows by lr a step", "Nobody (2020), Figure 1", "",
           lambda result: [r["x"][0] / 0.1 for r in result.select(lr=0.1)], Criterion(0.9, 1.1))],
)
'''


@dataclass(frozen=True)
class Config:
    steps: int = 3
    lr: float = 0.1


def toy(*claims, run=None, settings=None, name="toy"):
    def grow(config, setting, seed, device, progress):
        return {"x": [setting["lr"] * step + seed for step in range(config.steps)]}

    return Experiment(
        name,
        "A toy",
        "Nobody (2020)",
        {"laptop": Config(), "paper": Config(steps=30)},
        settings or (lambda config: [{"lr": config.lr}, {"lr": 2 * config.lr}]),
        run or grow,
        claims,
    )


def claim(values, low=0.9, high=1.1, **changes):
    given = {"id": "c", "statement": "It holds", "source": "Fig. 1", "unit": "", **changes}
    statistic = values if callable(values) else lambda result: values
    return Claim(**given, statistic=statistic, criterion=Criterion(low, high))


def result_of(seeds=3, **columns):
    columns = columns or {"x": [1.0]}
    runs = [Run({"lr": 0.1}, seed, columns) for seed in range(seeds)]
    return Result("toy", "laptop", {"lr": 0.1}, runs, [], {"python": "3"})


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


# --- results on disk -----------------------------------------------------------------------------

numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(10**15), 10**15)


@given(
    columns=st.dictionaries(st.text(max_size=8), st.lists(numbers, max_size=20), max_size=4),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    seeds=st.lists(st.integers(0, 10**9), min_size=1, max_size=4, unique=True),
)
def test_a_result_reads_back_as_it_was(tmp_path_factory, columns, lr, seeds):
    runs = [Run({"lr": lr, "act": "tanh"}, seed, columns) for seed in seeds]
    made = Result("toy", "laptop", {"lr": lr, "sizes": (3, 2)}, runs, [], {"python": "3"})
    verdict = claim([1.0] * len(seeds)).judge(made)
    made = Result("toy", "laptop", made.config, runs, [verdict], made.provenance)
    path = made.save(tmp_path_factory.mktemp("r") / "toy.laptop.json")
    read = Result.load(path)
    assert read == made
    assert list(read.seeds) == seeds
    for name, values in columns.items():
        stored = read.runs[0][name]
        assert stored.dtype == np.float64
        np.testing.assert_allclose(stored, np.array(values, dtype=float), rtol=5e-6)


def test_the_file_is_strict_json_with_six_digits_and_whole_integers(tmp_path):
    columns = {"x": [1 / 3, math.nan, math.inf, -math.inf], "step": [12345678]}
    result = Result("toy", "laptop", {}, [Run({}, 0, columns)], [], {})
    text = result.save(tmp_path / "r.json").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    stored = json.loads(text, parse_constant=refuse)["runs"][0]["columns"]
    assert stored == {"x": [0.333333, "NaN", "Infinity", "-Infinity"], "step": [12345678]}


def test_columns_come_from_lists_arrays_tensors_and_single_numbers():
    run = Run(
        {"lr": np.float64(0.5), "k": np.int64(2), "sizes": (1, 2)},
        0,
        {"a": torch.ones(2), "b": np.arange(3), "c": 2.0, "d": [torch.tensor(1.5), np.float32(2)]},
    )
    assert run.columns == {"a": [1.0, 1.0], "b": [0, 1, 2], "c": [2.0], "d": [1.5, 2.0]}
    assert run.settings == {"lr": 0.5, "k": 2, "sizes": [1, 2]}
    assert run.label == "lr=0.5, k=2, sizes=[1, 2]"
    assert "a" in run and "z" not in run
    with pytest.raises(KeyError, match="no column 'z'; this run has a, b, c, d"):
        run["z"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, 0, {"x": torch.ones(2, 2)}), "column 'x' must hold numbers only"),
        (({}, 0, {"x": "text"}), "column 'x' must be a list of numbers"),
        (({}, 0, [1.0]), "columns must be a dict"),
        (({}, True, {}), "seed must be an int, got True"),
        (({}, 1.0, {}), "seed must be an int, got 1.0"),
        (([1], 0, {}), "settings must be a dict"),
        (({"lr": math.inf}, 0, {}), r"settings\.lr must be finite, got inf"),
        (({"lr": object()}, 0, {}), r"settings\.lr must hold numbers, text"),
    ],
)
def test_a_run_refuses_what_a_file_cannot_hold(arguments, message):
    with pytest.raises(TypeError, match=message):
        Run(*arguments)


def test_select_finds_runs_and_names_what_there_is():
    runs = [
        Run({"lr": lr, "act": act}, seed, {"x": [lr, seed]})
        for lr in (0.1, 0.2)
        for act in ("tanh", "relu")
        for seed in (4, 2)
    ]
    result = Result("toy", "laptop", {}, runs, [], {})
    assert result.seeds == (4, 2)
    assert result.settings[0] == {"lr": 0.1, "act": "tanh"} and len(result.settings) == 4
    assert [run.seed for run in result.select(lr=0.1, act="relu")] == [4, 2]
    assert result.select(lr=0.1 + 1e-12, act="tanh", seed=2) == [runs[1]]
    assert result.select() == runs
    with pytest.raises(ValueError, match=r"no run with lr=0.3; lr is 0.1, 0.2"):
        result.select(lr=0.3)
    with pytest.raises(ValueError, match="no setting 'rho'; settings are lr, act"):
        result.select(rho=0.3)
    with pytest.raises(ValueError, match="no run with seed=7; seeds are 4, 2"):
        result.select(seed=7)


def test_a_setting_and_seed_can_stand_only_once():
    with pytest.raises(ValueError, match=r"two runs with lr=0\.1 and seed 0"):
        Result("toy", "laptop", {}, [Run({"lr": 0.1}, 0, {})] * 2, [], {})


@given(st.data())
def test_a_damaged_file_is_refused(tmp_path_factory, data):
    """Cut short anywhere, or with any one byte changed: an error that names the file."""
    folder = tmp_path_factory.mktemp("r")
    whole = result_of(x=[0.5, math.nan]).save(folder / "toy.laptop.json").read_bytes()
    at = data.draw(st.integers(0, len(whole) - 3))
    if data.draw(st.booleans()):
        damaged = whole[:at]
    else:
        damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    path = folder / "bad.json"
    path.write_bytes(damaged)
    try:
        read = Result.load(path)
    except ResultError as error:
        assert str(error).startswith("bad.json: ")
    else:  # white space may change and nothing is lost
        assert read == Result.load(folder / "toy.laptop.json")


def _resealed(path, change):
    """The file at `path` with a change in its body and a digest that fits."""
    from sam_lab.experiments.result import seal

    body = json.loads(path.read_text())
    del body["digest"]
    change(body)
    path.write_text(seal(body))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(schema="sam-lab/result/9"), "has schema 'sam-lab/result/9'; this"),
        (lambda b: b.pop("schema"), "does not name its schema"),
        (lambda b: b.pop("runs"), "'runs' is missing"),
        (lambda b: b.update(runs={}), "'runs' must be list"),
        (lambda b: b.update(runs=[3]), "'columns' is missing"),
        (lambda b: b.update(experiment=3), "'experiment' must be str"),
        (lambda b: b.update(seeds=[7]), "'seeds' does not list the seeds"),
        (lambda b: b["runs"][0].update(seed=True), "'seed' must be int"),
        (lambda b: b["runs"][0].update(seed="0"), "'seed' must be int"),
        (lambda b: b["runs"].append(b["runs"][0]), "two runs with"),
        (lambda b: b["runs"][0]["columns"].update(x=3), "'x' must be list"),
        (lambda b: b["runs"][0]["columns"].update(x=["nan"]), "a number was expected, got 'nan'"),
        (lambda b: b["runs"][0]["columns"].update(x=[None]), "a number was expected, got None"),
        (lambda b: b["claims"][0].update(verdict="true"), "verdict 'true' is none of"),
        (lambda b: b["claims"][0].update(criterion=[1]), "need two bounds"),
        (lambda b: b["claims"][0].update(criterion=[2, 1]), "needs low <= high"),
        (lambda b: b["claims"][0].update(mean=None), "a number was expected"),
    ],
)
def test_a_file_of_another_schema_or_type_is_refused(tmp_path, change, message):
    result = experiments.run(toy(claim([1, 1, 1])), progress=False)
    path = result.save(tmp_path / "toy.json")
    _resealed(path, change)
    with pytest.raises(ResultError, match=message):
        Result.load(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged or cut short"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "does not name its schema"),
        (b'{"schema": NaN}', "holds NaN"),
        (b"[" * 100_000, "nested too deeply|damaged or cut short"),
    ],
)
def test_what_is_no_result_file_is_refused(tmp_path, data, message):
    path = tmp_path / "toy.json"
    path.write_bytes(data)
    with pytest.raises(ResultError, match=message):
        Result.load(path)
    with pytest.raises(FileNotFoundError):
        Result.load(tmp_path / "absent.json")


@pytest.mark.parametrize("fault", ["fsync", "replace"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, fault):
    path = tmp_path / "toy.json"
    write_whole(path, "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, fault, fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["toy.json"]


# --- claims --------------------------------------------------------------------------------------


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 10, 29, 30, 100, 1001])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_t_quantiles_equal_scipys(df, confidence):
    expected = stats.t.ppf((1 + confidence) / 2, df)
    assert t_quantile(df, confidence) == pytest.approx(expected, rel=1e-10)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12))
def test_the_interval_equals_scipys(values):
    low, high = t_interval(values)
    scale = stats.sem(values)
    expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), scale or 1e-300)
    np.testing.assert_allclose((low, high), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("call", [lambda: t_quantile(0), lambda: t_quantile(2, 1.0)])
def test_quantiles_refuse_what_has_none(call):
    with pytest.raises(ValueError, match="must"):
        call()


def test_an_interval_needs_two_values():
    with pytest.raises(ValueError, match="at least two values, got 1"):
        t_interval([1.0])


@pytest.mark.parametrize(
    ("values", "verdict", "reason"),
    [
        ([1.00, 1.01, 0.99], "reproduced", ""),
        ([1.0, 1.0, 1.0], "reproduced", ""),
        ([0.9, 0.9, 0.9], "reproduced", ""),  # the bounds belong to the criterion
        ([2.00, 2.01, 1.99], "not reproduced", ""),
        ([0.1, 0.2, 0.15], "not reproduced", ""),
        ([1.00, 1.09, 0.91], "inconclusive", "the interval crosses the criterion's bound"),
        ([0.0, 1.0, 2.0], "inconclusive", "the interval crosses the criterion's bound"),
        ([1.0, 1.0], "inconclusive", "at least 3 seeds are needed"),
        ([1.0], "inconclusive", "at least 3 seeds are needed"),
        ([1.0, math.nan, 1.0], "inconclusive", "1 of 3 values are not finite"),
        ([1.0, math.inf, math.nan], "inconclusive", "2 of 3 values are not finite"),
    ],
)
def test_the_verdict_follows_from_the_interval(values, verdict, reason):
    judged = claim(values).judge(result_of(seeds=len(values)))
    assert (judged.verdict, judged.reason) == (verdict, reason)


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=8), st.floats(-10, 10), st.floats(0, 5))
def test_verdicts_agree_with_their_definition(values, low, width):
    judged = claim(values, low, low + width).judge(result_of(seeds=len(values)))
    assert judged.interval is not None
    a, b = judged.interval
    inside = low <= a and b <= low + width
    outside = b < low or a > low + width
    expected = "reproduced" if inside else "not reproduced" if outside else "inconclusive"
    assert judged.verdict == expected
    assert judged.mean == pytest.approx(np.mean(judged.values), abs=1e-9)
    assert judged.median == pytest.approx(np.median(judged.values), abs=1e-9)


def test_one_sided_criteria():
    result = result_of()
    assert claim([5, 5, 5], low=1, high=math.inf).judge(result).verdict == "reproduced"
    assert claim([5, 5, 5], low=-math.inf, high=1).judge(result).verdict == "not reproduced"
    assert [str(Criterion(low=1)), str(Criterion(high=2)), str(Criterion(1, 2))] == [
        "≥ 1",
        "≤ 2",
        "1 to 2",
    ]


@pytest.mark.parametrize("bounds", [(2, 1), (math.nan, 1), (0, math.nan), ()])
def test_a_criterion_without_sense_is_refused(bounds):
    with pytest.raises(ValueError, match="criterion needs"):
        Criterion(*bounds)


def test_a_statistic_that_fails_is_inconclusive_with_its_reason():
    def divide(result):
        return [1 / 0]

    def late(result):
        yield 1.0
        raise KeyError("loss")

    for statistic, reason in (
        (divide, "ZeroDivisionError: division by"),
        (late, "KeyError: 'loss'"),
    ):
        judged = claim(statistic).judge(result_of())
        assert judged.verdict == "inconclusive" and reason in judged.reason
        assert judged.values == () and judged.measured == "no value"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "claim 'c': the statistic gave 2 values for 3 seeds"),
        (1.0, "claim 'c': the statistic must give one number per seed, got 1.0"),
        (["a", "b", "c"], "claim 'c': the statistic must give one number per seed"),
    ],
)
def test_a_statistic_that_breaks_its_contract_is_named(values, message):
    with pytest.raises(ClaimError, match=message):
        claim(values).judge(result_of())


@pytest.mark.parametrize("change", [{"id": ""}, {"id": " x"}])
def test_a_claim_needs_an_id(change):
    with pytest.raises(ValueError, match="claim id"):
        claim([1], **change)
    with pytest.raises(TypeError, match="criterion must be a Criterion"):
        Claim("c", "s", "s", "", lambda result: [1], (0, 1))


@pytest.mark.parametrize(
    ("values", "unit", "words"),
    [
        ([1.0, 1.01, 1.02], "", "1.010 [0.985, 1.035]"),
        ([100, 200, 300], "steps", "200 [-48, 448] steps"),
        ([2.0, 2.0, 2.0], "", "2 [2, 2]"),
        ([1e-9, 2e-9, 3e-9], "", "2e-09 [-4.84e-10, 4.48e-09]"),
        ([2.0], "", "2"),
    ],
)
def test_measured_values_in_words(values, unit, words):
    assert claim(values, unit=unit).judge(result_of(seeds=len(values))).measured == words


def test_the_table_of_claims_in_markdown_and_text():
    judged = claim([1.0, 1.01, 1.02], statement="Norm $\\|g\\|$ and $|x|$, a | b", unit="u")
    result = result_of()
    result = Result("toy", "laptop", {}, result.runs, [judged.judge(result)], {})
    table = result.table()
    assert table._repr_markdown_() == (
        "| Statement | Source | Measured | Criterion | Verdict |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| Norm $\\Vert{}g\\Vert{}$ and $\\vert{}x\\vert{}$, a \\| b | Fig. 1 "
        "| 1.010 [0.985, 1.035] u (3 seeds, laptop) | 0.9 to 1.1 u | reproduced |"
    )
    assert "Verdict    reproduced" in str(table) and repr(table) == str(table)
    assert str(result_of().table()) == "nothing to show"


# --- experiments and their registry --------------------------------------------------------------


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
        ({"claims": [claim([1]), claim([1])]}, ValueError, "claim ids must differ"),
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


def test_every_registered_experiment_is_well_formed():
    assert experiments.broken() == {}
    for name in experiments.names():
        experiment = experiments.get(name)
        assert experiment.claims, f"{name} decides no claim"
        for config in experiment.presets.values():
            assert experiment.settings(config)


# --- running -------------------------------------------------------------------------------------


def test_a_run_has_every_setting_with_every_seed_and_its_origin():
    result = experiments.run(toy(claim([1, 1, 1])), progress=False)
    assert [(run.settings["lr"], run.seed) for run in result.runs] == [
        (lr, seed) for lr in (0.1, 0.2) for seed in (0, 1, 2)
    ]
    assert (result.experiment, result.scale, result.config) == (
        "toy",
        "laptop",
        {"steps": 3, "lr": 0.1},
    )
    assert [verdict.verdict for verdict in result.claims] == ["reproduced"]
    origin = result.provenance
    assert origin["torch"] == torch.__version__ and origin["threads"] == torch.get_num_threads()
    assert origin["command"] == "python -m sam_lab.experiments run toy --scale laptop --seeds 3"
    assert origin["device"].startswith(("cpu: ", "cuda: "))
    assert set(origin) >= {"sam_lab", "python", "numpy", "seconds", "date"}


def test_a_config_stands_for_a_scale():
    assert experiments.run(toy(), Config(steps=30), progress=False).scale == "paper"
    result = experiments.run(toy(), Config(steps=1), seeds=[5, 3], progress=False)
    assert (result.scale, result.seeds) == ("custom", (5, 3))
    assert result.provenance["command"] == 'sam_lab.experiments.run("toy", config, seeds=[5, 3])'
    assert all(len(run["x"]) == 1 for run in result.runs)


def test_seeds_in_the_command_line_of_a_result():
    made = experiments.run(toy(), seeds=(np.int64(4), 2), progress=False)
    assert made.provenance["command"].endswith("--seeds 4,2")


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


def test_an_exception_in_a_run_says_which(tmp_path):
    def fail(config, setting, seed, device, progress):
        if seed == 1:
            raise RuntimeError("loss is not finite")
        return {"x": [1.0]}

    with pytest.raises(RuntimeError, match="loss is not finite") as caught:
        experiments.run(toy(run=fail), out=tmp_path, progress=False)
    assert caught.value.__notes__ == ["in experiment 'toy', lr=0.1, seed=1"]
    assert len(list((tmp_path / ".toy.laptop.partial").glob("*.json"))) == 1


def test_with_out_the_file_alone_is_left(tmp_path):
    result = experiments.run(toy(claim([1, 1, 1])), out=tmp_path / "new", progress=False)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["toy.laptop.json"]
    assert Result.load(tmp_path / "new" / "toy.laptop.json") == result


def test_a_statistic_that_breaks_its_contract_does_not_cost_the_runs(tmp_path):
    with pytest.raises(ClaimError, match="claim 'c': the statistic gave 1 values for 3 seeds"):
        experiments.run(toy(claim([1.0])), out=tmp_path, progress=False)
    stored = Result.load(tmp_path / "toy.laptop.json")
    assert len(stored.runs) == 6
    assert stored.claims[0].verdict == "inconclusive" and "1 values" in stored.claims[0].reason


def test_progress_as_plain_lines_and_silent(capsys):
    def run(config, setting, seed, device, progress):
        progress(1, 2)
        progress(0, 0)
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
    monkeypatch.setattr("sam_lab.experiments.progress._LINE_EVERY", -1.0)

    def run(config, setting, seed, device, progress):
        progress(1, 2)
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


# --- interrupted and taken up again --------------------------------------------------------------


def _stopping(after):
    """A toy that is interrupted in its run number `after`, and counts the runs it finishes."""
    made = []

    def run(config, setting, seed, device, progress):
        if len(made) == after[0]:
            raise KeyboardInterrupt
        made.append((setting["lr"], seed))
        return {"x": [setting["lr"] + seed]}

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
        monkeypatch.setattr("sam_lab.experiments.core._source_digest", lambda experiment: "new")
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
    from sam_lab.experiments import store

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
    from sam_lab.experiments import store

    monkeypatch.setattr(store, "_lock", lambda file: os.unlink(file.name))
    with pytest.raises(Busy, match="appears and disappears"):
        Store(tmp_path, "toy.laptop", "key").open()


def test_code_without_a_text_is_never_taken_up_again(tmp_path):
    """An experiment typed at a prompt may have changed without a trace."""
    made = []
    scope = {"made": made, "stop": [1]}
    exec(
        "def run(config, setting, seed, device, progress):\n"
        "    if len(made) == stop[0]: raise KeyboardInterrupt\n"
        "    made.append(seed)\n"
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
    )


def _wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.005)


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


# --- the command line ----------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "toy_edg"], "no experiment 'toy_edg'"),
        (["run", "toy_cli", "--scale", "huge"], "no scale 'huge'; it has laptop, paper"),
        (["run", "toy_cli", "--seeds", "0"], "seeds must be"),
        (["run", "toy_cli", "--seeds", "many"], "--seeds must be a number"),
        (["run", "toy_cli", "--seeds", "1,1"], "seeds must be"),
        (["run", "toy_cli", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["show", "absent.json"], "absent.json"),
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


# --- the ledger ----------------------------------------------------------------------------------


def _only(monkeypatch, **found):
    """Let the registry hold these experiments."""
    monkeypatch.setattr("sam_lab.experiments.report.names", lambda: sorted(found))
    monkeypatch.setattr("sam_lab.experiments.report.get", found.__getitem__)
    monkeypatch.setattr("sam_lab.experiments.report.broken", lambda: {})


def test_the_ledger_sets_both_scales_side_by_side(tmp_path, monkeypatch):
    experiment = toy(claim([1.0, 1.01, 1.02], statement="It holds"))
    _only(monkeypatch, toy=experiment)
    experiments.run(experiment, out=tmp_path, progress=False)
    book = ledger(tmp_path)
    assert book._repr_markdown_() == (
        f"**{experiment.title}**\n\n"
        "| Statement | Source | Criterion | Laptop | Paper |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| It holds | Fig. 1 | 0.9 to 1.1 | 1.010 [0.985, 1.035] (3 seeds): reproduced "
        "| not yet run |\n\n"
        "Not yet run:\n\n"
        "- `python -m sam_lab.experiments run toy --scale paper --seeds 3 --out book/results`"
    )
    assert "Paper      not yet run" in str(book) and repr(book) == str(book)
    experiments.run(experiment, "paper", out=tmp_path, progress=False)
    complete = ledger(tmp_path)
    assert "not yet run" not in complete._repr_markdown_().lower() and complete.problems == []


def test_a_scale_between_the_two_has_its_column_where_an_experiment_has_it(tmp_path, monkeypatch):
    wide = dataclasses.replace(
        toy(claim([1.0, 1.01, 1.02]), name="wide"),
        presets={"paper": Config(steps=30), "laptop": Config(), "desktop": Config(steps=12)},
        title="Three scales",
    )
    _only(monkeypatch, toy=toy(claim([1.0, 1.01, 1.02])), wide=wide)
    experiments.run(wide, "desktop", out=tmp_path, progress=False)
    tables = dict(ledger(tmp_path).tables())
    assert tables["A toy"].header[3:] == ["Laptop", "Paper"]
    assert tables["Three scales"].header[3:] == ["Laptop", "Desktop", "Paper"]
    found = "1.010 [0.985, 1.035] (3 seeds): reproduced"
    assert tables["Three scales"].rows[0][3:] == ["not yet run", found, "not yet run"]


def test_results_stand_side_by_side_claim_by_claim(monkeypatch):
    experiment = toy(claim([1.0, 1.01, 1.02], statement="It holds"))
    _only(monkeypatch, toy=experiment)
    small = experiments.run(experiment, progress=False)
    large = experiments.run(experiment, "paper", progress=False)
    table = side_by_side({"small": small, "large": large})
    cell = "1.010 [0.985, 1.035]: reproduced"
    assert table.header == ["Statement", "small", "large"]
    assert table.rows == [["It holds (criterion: 0.9 to 1.1)", cell, cell]]


def test_the_ledger_computes_verdicts_anew(tmp_path, monkeypatch):
    experiments.run(toy(claim([1, 1, 1])), out=tmp_path, progress=False)
    stricter = toy(claim([1, 1, 1], low=2, high=3))
    _only(monkeypatch, toy=stricter)
    verdict = ledger(tmp_path).entries[0][2]["laptop"]
    assert verdict is not None and verdict.verdict == "not reproduced"


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: path.write_text("{"), "toy.laptop.json: damaged or cut short"),
        (
            lambda path: Result("other", "laptop", {}, [], [], {}).save(path),
            "toy.laptop.json: holds other at scale laptop",
        ),
        (
            lambda path: Result("toy", "laptop", {"steps": 9}, [], [], {}).save(path),
            "toy.laptop.json: made with another config",
        ),
    ],
)
def test_the_ledger_names_files_it_cannot_use(tmp_path, monkeypatch, spoil, problem):
    _only(monkeypatch, toy=toy(claim([1, 1, 1])))
    spoil(tmp_path / "toy.laptop.json")
    book = ledger(tmp_path)
    assert len(book.problems) == 1 and book.problems[0].startswith(problem)
    assert f"- {problem}" in book._repr_markdown_()
    assert book.entries[0][2]["laptop"] is None
