"""Result files: what goes in comes out, damage is refused, shards are merged."""

import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_experiment import result_of

from sam_lab.experiments import Result, ResultError, Rows, Run, merge
from sam_lab.experiments.lab.experiment import config_dict, made_with
from sam_lab.experiments.lab.result import seal, write_whole

numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(10**15), 10**15)


@pytest.mark.slow
@given(
    columns=st.dictionaries(st.text(max_size=8), st.lists(numbers, max_size=20), max_size=4),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    seeds=st.lists(st.integers(0, 10**9), min_size=1, max_size=4, unique=True),
)
def test_a_result_reads_back_as_it_was(tmp_path_factory, columns, lr, seeds):
    runs = [Run({"lr": lr, "act": "tanh"}, seed, columns) for seed in seeds]
    origin = {"seeds": seeds, "python": "3"}
    made = Result("toy", "laptop", {"lr": lr, "sizes": (3, 2)}, runs, [origin])
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
    result = Result("toy", "laptop", {}, [Run({}, 0, columns)], [])
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
    assert run.value("c") == 2.0
    for look in (run.__getitem__, run.value):
        with pytest.raises(KeyError, match="no column 'z'; this run has a, b, c, d"):
            look("z")
    with pytest.raises(ValueError, match="column 'b' must hold one number here, it holds 3"):
        run.value("b")


def test_rows_become_columns_and_must_name_the_same_ones():
    rows = Rows()
    assert rows.columns == {}
    rows.add(step=0, loss=2.0)
    rows.add(loss=1.0, step=1)
    assert rows.columns == {"step": [0, 1], "loss": [2.0, 1.0]}
    for wrong in ({"step": 2}, {"step": 2, "loss": 0.5, "more": 1}):
        with pytest.raises(ValueError, match="a row must have step, loss, got step"):
            rows.add(**wrong)
    assert rows.columns == {"step": [0, 1], "loss": [2.0, 1.0]}


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
    result = Result("toy", "laptop", {}, runs, [])
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
        Result("toy", "laptop", {}, [Run({"lr": 0.1}, 0, {})] * 2, [])


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
        (lambda b: b.update(provenance={}), "'provenance' must be list"),
        (lambda b: b.update(provenance=["today"]), "'provenance' must be dict"),
    ],
)
def test_a_file_of_another_schema_or_type_is_refused(tmp_path, change, message):
    path = result_of().save(tmp_path / "toy.json")
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


# --- the runs of one seed -------------------------------------------------------------------------


def test_the_runs_of_a_seed_are_found_by_their_settings():
    runs = [
        Run({"lr": lr, "act": act}, seed, {"x": [lr]})
        for lr in (0.1, 0.2)
        for act in ("tanh", "relu")
        for seed in (4, 2)
    ]
    seeds = Result("toy", "laptop", {"steps": 3}, runs, []).by_seed()
    assert [one.seed for one in seeds] == [4, 2]
    one = seeds[1]
    assert one.config == {"steps": 3} and len(one.runs) == 4
    assert one.one(lr=0.2, act="relu") == runs[7]
    assert one.all(act="tanh") == [runs[1], runs[5]]
    assert one.base() == runs[1] and one.base(lr=0.2) == runs[5]
    assert one.where(act="relu").base() == runs[3] and one.where(act="relu").one(lr=0.2) == runs[7]
    with pytest.raises(ValueError, match=r"2 runs match, .*: lr=0.1, act=tanh; lr=0.2, act=tanh"):
        one.one(act="tanh")
    with pytest.raises(ValueError, match=r"no run with lr=0.3; lr is 0.1, 0.2"):
        one.one(lr=0.3)
    with pytest.raises(ValueError, match="no setting 'rho'; settings are lr, act"):
        one.base(rho=1)


# --- shards ---------------------------------------------------------------------------------------


def shard(*seeds, lrs=(0.1, 0.2), config=None, scale="laptop", experiment="toy"):
    runs = [Run({"lr": lr}, seed, {"x": [lr + seed]}) for lr in lrs for seed in seeds]
    origin = {"seeds": list(seeds), "torch": f"2.{seeds[0]}"}
    return Result(experiment, scale, config or {"steps": 3, "sub": {"a": 1}}, runs, [origin])


def test_shards_make_the_result_of_one_go_and_say_where_each_comes_from(tmp_path):
    paths = [shard(0, 1).save(tmp_path / "a.json"), shard(5).save(tmp_path / "b.json")]
    paths += [shard(3, 4).save(tmp_path / "c.json")]
    merged = merge([Result.load(path) for path in paths])
    assert merged.runs == shard(0, 1, 5, 3, 4).runs
    assert [part["seeds"] for part in merged.provenance] == [[0, 1], [5], [3, 4]]
    assert [part["torch"] for part in merged.provenance] == ["2.0", "2.5", "2.3"]
    assert merged.command.endswith("run toy --scale laptop --seeds 0,1,5,3,4")
    again = merge([merged, shard(7)])
    assert len(again.provenance) == 4 and again.seeds == (0, 1, 5, 3, 4, 7)


def test_settings_with_unlike_names_are_merged_by_what_they_are():
    """A setting may hold another and more: each keeps its own runs."""

    def part(seed):
        runs = [Run(s, seed, {"x": [seed]}) for s in ({"study": "a"}, {"study": "a", "lr": 1})]
        return Result("toy", "laptop", {}, runs, [])

    merged = merge([part(0), part(1)])
    assert [(run.settings, run.seed) for run in merged.runs] == [
        ({"study": "a"}, 0),
        ({"study": "a"}, 1),
        ({"study": "a", "lr": 1}, 0),
        ({"study": "a", "lr": 1}, 1),
    ]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (shard(1), "seed 1 stands in two results"),
        (shard(2, experiment="other"), "another experiment: it is toy in one and other in the"),
        (shard(2, scale="paper"), "result 2 has another scale: it is laptop in one and paper"),
        (
            shard(2, config={"steps": 3, "sub": {"a": 2}}),
            "another config: sub.a is 1 in one and 2 in the other",
        ),
        (
            shard(2, config={"steps": 3, "sub": {"a": 1}, "new": 0.5}),
            "another config: new is absent in one and 0.5 in the other",
        ),
        (shard(2, lrs=(0.1,)), "result 2 has other settings than result 1"),
        (shard(2, lrs=(0.1, 0.3)), "result 2 has other settings than result 1"),
    ],
)
def test_shards_that_do_not_belong_together_are_refused(other, message):
    with pytest.raises(ResultError, match=message):
        merge([shard(0, 1), other])


def test_one_result_is_nothing_to_merge():
    with pytest.raises(ResultError, match="at least two results are needed to merge, got 1"):
        merge([shard(0)])


# --- made with this config, or with another -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    groups: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    recipe: Inner
    steps: int = 3
    rhos: tuple[float, ...] = (0.0, 0.1)


@pytest.mark.parametrize(
    ("config", "change", "same"),
    [
        (Outer(Inner()), {}, True),
        (Outer(Inner(groups=(4,))), {}, False),  # a field that came later, and is used
        (Outer(Inner(lr=0.2)), {}, False),
        (Outer(Inner(lr=0.2)), {"recipe": {"lr": 0.2}}, True),
        (Outer(Inner(), rhos=(0.0,)), {}, False),
        (Outer(Inner()), {"steps": 4}, False),
        (Outer(Inner()), {"gone": 1}, False),
        (Outer(Inner()), {"recipe": "digits"}, False),
    ],
)
def test_a_field_that_came_after_a_result_must_have_its_default(config, change, same):
    stored = {"recipe": {"lr": 0.1}, "steps": 3, "rhos": [0.0, 0.1]}
    assert made_with(config, {**stored, **change}) == same
    assert made_with(config, config_dict(config))


def test_a_field_without_a_default_must_be_in_the_result():
    assert not made_with(Outer(Inner()), {"steps": 3, "rhos": [0.0, 0.1]})
