"""The benchmark runs, counts what it says it counts, and writes a file that can be trusted."""

import importlib
import sys

import numpy as np
import pytest
import torch

from benchmarks import curvature as bench
from sam_lab import Hessian
from sam_lab.experiments.result import ResultError

PEERS = {m.package for m in bench.METHODS if m.package}


@pytest.fixture(scope="module")
def problem() -> bench.Problem:
    problem = bench.make_problem(bench.QUICK, "MSE", seed=0)
    for _ in range(10):
        problem.step(0.15)
    return problem


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench, "version_of", lambda package: None if package in PEERS else "1.0 (assumed)"
    )


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


def test_quick_run_without_peers_reports_them_missing(no_peers, tmp_path, capsys) -> None:
    out = tmp_path / "results" / "bench.json"
    threads = torch.get_num_threads()
    try:
        assert bench.main(["--quick", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    result = bench.load(out)
    assert result["peers"] == dict.fromkeys(PEERS)
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


def test_a_changed_file_is_refused(tmp_path) -> None:
    path = bench.save({"schema": bench.SCHEMA, "cold": [1, 2]}, tmp_path / "bench.json")
    path.write_text(path.read_text().replace("2", "1"))
    with pytest.raises(ResultError):
        bench.load(path)


def test_a_missing_package_has_no_version() -> None:
    assert bench.version_of("no-such-package") is None
    assert bench.version_of("torch") == torch.__version__


def test_the_command_is_one_thread_before_anything_is_imported(monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.delitem(sys.modules, "benchmarks.__main__", raising=False)
    importlib.import_module("benchmarks.__main__")
    import os

    assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == ("1", "2")
