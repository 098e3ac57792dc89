"""The benchmarks run, count what they say they count, and write files that can be trusted."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import common
from benchmarks import curvature as bench
from sam_lab import Hessian
from sam_lab.experiments.lab.result import ResultError

CHECKOUT = Path(__file__).parents[1]
RESULTS = CHECKOUT / "book" / "results"
PEERS = {m.package for m in bench.METHODS if m.package}


@pytest.fixture(scope="module")
def problem() -> bench.Problem:
    problem = bench.make_problem(bench.QUICK, "MSE", seed=0)
    for _ in range(10):
        problem.step(0.15)
    return problem


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The command line sets how many; the other tests have their own again."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench, "version_of", lambda package: None if package in PEERS else "1.0 (assumed)"
    )


@pytest.mark.slow
def test_the_truth_is_that_of_dense_linear_algebra(problem) -> None:
    wide = problem.copy(torch.float64)
    H = Hessian(wide.closure, wide.params)
    dense = torch.linalg.eigvalsh(H @ torch.eye(H.shape[0], dtype=torch.float64)).numpy()
    np.testing.assert_allclose(bench.truth(problem, 5), dense[::-1][:5], rtol=1e-9)


def test_the_squared_error_is_half_the_sum_over_outputs(problem) -> None:
    outputs = torch.zeros(4, 10)
    assert bench.HalfSquaredError()(outputs, torch.arange(4)).item() == 0.5


@pytest.mark.parametrize("method", bench.METHODS, ids=lambda m: f"{m.tool}, {m.setting}")
def test_every_method_finds_the_same_spectrum_and_says_what_it_spent(method, problem) -> None:
    if method.package and bench.version_of(method.package) is None:
        pytest.skip(f"{method.package} is not installed")
    own = problem.copy()
    with bench.quiet():
        answer = method.solve(own, 3, 0)
    exact = bench.truth(problem, 3)
    assert answer.hvps >= 3
    stopped_early = answer.converged is False  # and says so
    assert stopped_early or np.abs(answer.values - exact).max() < 0.05 * exact[0]
    # What it leaves behind does not reach the next method.
    for mine, theirs in zip(problem.params, own.params, strict=True):
        assert torch.equal(mine, theirs) and theirs.grad is None


def test_products_of_all_tools_agree(problem) -> None:
    v = torch.randn(len(Hessian(problem.closure, problem.params).gradient()))
    wanted = Hessian(problem.closure, problem.params) @ v
    for tool, _how, package, make in bench.PRODUCTS:
        if package and bench.version_of(package) is None:
            continue
        with bench.quiet():
            got = make(problem.copy())(v)
        flat = got if isinstance(got, torch.Tensor) else torch.cat([part.flatten() for part in got])
        torch.testing.assert_close(flat.detach(), wanted, rtol=1e-4, atol=1e-5, msg=tool)


@pytest.mark.parametrize("module", ["pyhessian.hessian"])
def test_counting_is_taken_off_again_after_an_error(module, problem, monkeypatch) -> None:
    pyhessian = pytest.importorskip(module)
    original = pyhessian.hessian_vector_product
    monkeypatch.setattr(pyhessian.hessian, "eigenvalues", lambda self, top_n: 1 / 0)
    with bench.quiet(), pytest.raises(ZeroDivisionError):
        bench._pyhessian(problem.copy(), 1, 0)
    assert pyhessian.hessian_vector_product is original


@pytest.mark.slow
def test_quick_run_without_peers_reports_them_missing(no_peers, tmp_path, capsys) -> None:
    out = tmp_path / "results" / "bench.json"
    assert common.main({"curvature": bench.BENCHMARK}, ["--quick", "--out", str(out)]) == 0
    result = bench.BENCHMARK.load(out)
    assert result["peers"] == dict.fromkeys(PEERS)
    assert result["provenance"]["command"] == "python -m benchmarks --quick"
    assert result["provenance"]["scipy"] and result["provenance"]["device"] == "cpu"
    for table in ("products", "cold"):
        for row in result[table]:
            assert row["missing"] == (row["tool"] != "sam_lab")
    mine = [row for row in result["cold"] if not row["missing"]]
    assert {(row["loss"], row["k"]) for row in mine} == {
        (loss, k) for loss in ("CE", "MSE") for k in (1, 5)
    }
    for row in mine:
        assert row["converged"] == 1 and row["residual_max"] <= 1e-2
        assert row["hvps_min"] <= row["hvps"] <= row["hvps_max"] and row["error"] < 0.05
    for row in result["tracking"]:
        assert row["converged"] == 1 and row["residual_max"] <= 1e-2
        assert row["k"] <= row["hvps"] <= row["hvps_with_audits"] and row["error_max"] < 0.05
    printed = capsys.readouterr().out
    assert printed.count("missing") == 3 + 3 + 4 * 5 and "sam_lab" in printed
    assert [path.name for path in out.parent.iterdir()] == ["bench.json"]


# --- what all benchmarks share ----------------------------------------------------------------


def stand_in(name: str) -> common.Benchmark:
    """A benchmark that measures nothing, at once."""
    return common.Benchmark(
        name=name,
        about=f"nothing, {name}",
        schema=f"test.{name}/1",
        measure=lambda quick: {"quick": quick, "rows": [1, 2]},
        table=lambda result: f"table of {name}",
        packages=("pytest", "no-such-package"),
    )


TWO = {name: stand_in(name) for name in ("one", "two")}


@pytest.mark.parametrize(
    ("arguments", "files", "command"),
    [
        ([], ["bench_one.json", "bench_two.json"], "python -m benchmarks"),
        (["two", "one"], ["bench_one.json", "bench_two.json"], "python -m benchmarks two one"),
        (["two"], ["bench_two.json"], "python -m benchmarks two"),
        (["two", "--quick"], ["bench_two.json"], "python -m benchmarks two --quick"),
    ],
)
def test_all_benchmarks_run_or_those_named(arguments, files, command, tmp_path, capsys) -> None:
    assert common.main(TWO, [*arguments, "--out", str(tmp_path / "new" / "folder")]) == 0
    written = sorted((tmp_path / "new" / "folder").iterdir())
    assert [path.name for path in written] == files
    for path in written:
        benchmark = TWO[path.stem.removeprefix("bench_")]
        result = benchmark.load(path)
        assert result["quick"] == ("--quick" in arguments)
        assert result["provenance"]["command"] == command
        assert result["provenance"]["torch"] == torch.__version__
        assert result["provenance"]["pytest"] == pytest.__version__
        assert result["provenance"]["no-such-package"] is None
        assert result["provenance"]["threads"] == 1
        assert benchmark.table(result) in capsys.readouterr().out or len(files) > 1


def test_without_a_place_named_a_quick_run_writes_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert common.main(TWO, ["--quick"]) == 0
    assert "table of one" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert common.main(TWO, []) == 0
    written = sorted(path.name for path in (tmp_path / "book" / "results").iterdir())
    assert written == ["bench_one.json", "bench_two.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["three"], "no benchmark 'three'; there are one, two"),
        (["--out", "file.json"], "name a folder"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        common.main(TWO, arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and "table of" not in captured.out


def test_a_benchmark_that_fails_leaves_those_before_it_written(tmp_path) -> None:
    def fail(quick: bool) -> dict[str, Any]:
        raise ZeroDivisionError

    broken = common.Benchmark("two", "", "test.two/1", fail, str)
    with pytest.raises(ZeroDivisionError):
        common.main({"one": TWO["one"], "two": broken}, ["--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["bench_one.json"]


def test_a_changed_or_foreign_file_is_refused(tmp_path) -> None:
    one = TWO["one"]
    path = common.save(one.run(True, "command"), tmp_path / "bench.json")
    assert one.load(path)["rows"] == [1, 2]
    with pytest.raises(ResultError, match="schema"):
        TWO["two"].load(path)
    text = path.read_text()
    for damaged in (text.replace("[1, 2]", "[1, 3]"), text[:-20], ""):
        path.write_text(damaged)
        with pytest.raises(ResultError):
            one.load(path)


def test_a_missing_package_has_no_version() -> None:
    assert common.version_of("no-such-package") is None
    assert common.version_of("pytest") == pytest.__version__


def test_the_command_is_one_thread_before_anything_is_imported(monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    monkeypatch.delitem(sys.modules, "benchmarks.__main__", raising=False)
    importlib.import_module("benchmarks.__main__")
    assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == ("1", "2")


def test_the_shipped_results_are_whole_and_their_commands_name_benchmarks(monkeypatch) -> None:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    known = importlib.import_module("benchmarks.__main__").BENCHMARKS
    shipped = sorted(RESULTS.glob("bench_*.json"))
    assert [path.name for path in shipped] == sorted(b.file for b in known.values())
    for path in shipped:
        name = path.stem.removeprefix("bench_")
        result = known[name].load(path)
        command = result["provenance"]["command"].split()
        assert command[:3] == ["python", "-m", "benchmarks"] and "--quick" not in command
        assert command[3:] == [] or (name in command[3:] and set(command[3:]) <= set(known))
        assert "missing" not in known[name].table(result)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_freed_memory_stays_with_the_process():
    """In a process of its own: the setting cannot be taken back."""
    code = """
import resource, sys, torch
from benchmarks import common

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**22).sum()  # 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(), faults()
fresh = faults()
common.keep_memory()
faults(), faults()
print(fresh, faults())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    fresh, kept = map(int, done.stdout.split())
    assert kept < 100 and (kept < fresh or fresh < 100)  # without it, all 4,096 pages
