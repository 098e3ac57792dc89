"""The cost of the family: every method is there, counts its passes, and runs on every network."""

from dataclasses import replace

import pytest
import torch

from benchmarks import common
from benchmarks import family as bench
from benchmarks import sam as one
from sam_lab import methods

OURS = [method for method in bench.METHODS if method.tool == "sam_lab"]
# A pass is a forward and a backward; a forward alone is a third of one.
PASSES = {
    "every 5th step": 1.2,
    "Momentum-SAM": 1.0,
    "LookSAM, k = 5": 1.2,
    "GraphSAM, k = 5": 1.2,
    "ESAM, 1/2 and 1/2": 1 + 1 / 3 + 1 / 2,
    "2 ascents": 3.0,
    "Frob-SAM": 3.0,
}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def problem_of(method: one.Method) -> one.Problem:
    network = bench.QUICK[0]
    if method.how == "SAM-ON":
        build = network.build
        network = replace(
            network, build=lambda: torch.nn.Sequential(torch.nn.LayerNorm(4), build())
        )
    return one.make_problem(network, torch.device("cpu"))


@pytest.mark.parametrize("method", OURS, ids=lambda m: m.how)
def test_a_method_has_the_passes_that_its_docstring_says(method) -> None:
    assert bench.passes(method, problem_of(method)) == pytest.approx(PASSES.get(method.how, 2.0))


def test_looksam_of_the_peer_saves_none() -> None:
    pytest.importorskip("pytorch_optimizer")
    (theirs,) = [m for m in bench.METHODS if m.tool != "sam_lab" and m.how == "LookSAM, k = 5"]
    assert bench.passes(theirs, problem_of(theirs)) == 2.0


def test_every_method_of_the_library_is_measured() -> None:
    bound = [getattr(m.make, "keywords", {}).get("method") for m in OURS]
    measured = {getattr(method, "func", method) for method in bound}
    public = {
        value
        for name, value in vars(methods).items()
        if name in methods.__all__ and "look" in getattr(value, "__annotations__", {})
    }
    assert public <= measured and len(public) == 15


def test_sam_on_is_left_out_where_there_is_no_norm_layer() -> None:
    (sam_on,) = [m for m in OURS if m.how == "SAM-ON"]
    assert [bench.fits(sam_on, network) for network in one.QUICK] == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("missing", [set(), {"pytorch-optimizer"}])
def test_quick_run_writes_a_table_with_or_without_peers(
    missing, tmp_path, monkeypatch, capsys
) -> None:
    original = one.version_of
    for module in (one, bench):
        monkeypatch.setattr(module, "version_of", lambda p: None if p in missing else original(p))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["--quick", "--out", str(tmp_path / "b.json")]
    assert common.main({"family": bench.BENCHMARK}, arguments) == 0
    result = bench.BENCHMARK.load(tmp_path / "b.json")
    assert len(result["steps"]) == 2 * (len(bench.METHODS) - 1)
    there = original("pytorch-optimizer") is not None and not missing
    for row in result["steps"]:
        assert row["missing"] == (row["tool"] == "pytorch_optimizer" and not there)
        if not row["missing"]:
            assert row["passes"] >= 1 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert "Momentum-SAM" in capsys.readouterr().out
    table = one.chapter_table(result)
    assert table.header == ["Method", "Passes", "MLP: time", "memory", "CNN: time", "memory"]
    assert len(table.rows) == len(OURS) - 1 + 5
    with pytest.raises(ValueError, match="device must be one of cpu, got 'tpu'"):
        one.chapter_table(result, "tpu")


def test_the_stored_result_has_every_method_on_every_network() -> None:
    result = bench.BENCHMARK.load(common.RESULTS / bench.BENCHMARK.file)
    expected = [
        (network.name, method.tool, method.how)
        for network in bench.NETWORKS
        for method in bench.METHODS
        if method.how != "SAM-ON" or network.name == "ResNet-18"
    ]
    found = [(r["network"], r["tool"], r["how"]) for r in result["steps"] if r["device"] == "cpu"]
    assert found == expected and not any(row["missing"] for row in result["steps"])
    plain = [r for r in result["steps"] if (r["tool"], r["how"]) == ("sam_lab", "SAM")]
    assert all(row["memory"] <= 1.1 for row in plain)
