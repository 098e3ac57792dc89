"""The cost of an attack: all methods find the same, and targets are decided by measurement."""

import pytest
import torch

from benchmarks import attacks as bench
from benchmarks import common

CPU = torch.device("cpu")
PEERS = {peer.package for peer in bench.PEERS}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("norm", bench.SIZES)
@pytest.mark.parametrize("network", bench.QUICK, ids=lambda network: network.name)
@pytest.mark.parametrize("peer", bench.PEERS, ids=lambda peer: peer.tool)
def test_every_method_finds_the_same(peer, network, norm) -> None:
    if bench.version_of(peer.package) is None:
        pytest.skip(f"{peer.package} is not installed")
    problem = bench.make_problem(network, norm, CPU)
    assert not any(module.training for module in problem.model.modules())
    ours = bench.OURS.make(problem.copy())()
    with bench.quiet():
        theirs = peer.make(problem.copy())()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert not torch.equal(ours, problem.x)


def test_what_all_are_measured_by_is_the_gradient_as_often_as_the_attack_needs_it() -> None:
    problem = bench.make_problem(bench.QUICK[0], "linf", CPU)
    calls = []
    problem.model.register_forward_hook(lambda *_: calls.append(1))
    grad = bench.BASE.make(problem)()
    assert len(calls) == bench.STEPS and grad.shape == problem.x.shape
    bench.OURS.make(problem)()
    assert len(calls) == 2 * bench.STEPS


def test_the_networks_are_what_the_text_says() -> None:
    mlp, wide = (bench.make_problem(network, "l2", CPU) for network in bench.NETWORKS)
    assert [layer.out_features for layer in mlp.model if hasattr(layer, "out_features")] == [
        200,
        200,
        10,
    ]
    assert mlp.x.shape == (128, 1, 28, 28) and wide.x.shape == (128, 3, 32, 32)
    for problem in (mlp, wide):
        assert problem.x.min() >= 0 and problem.x.max() <= 1


def against(**changes) -> dict:
    row = {"device": "cpu", "network": "MLP", "norm": "l2", "peer": "foolbox"}
    return row | {"ratio": 1.01, "ratio_low": 0.99, "ratio_high": 1.02} | changes


@pytest.mark.parametrize(("row", "reached"), [(against(), True), (against(ratio_low=1.001), False)])
def test_slower_than_a_peer_is_where_the_lower_quartile_is_above_one(row, reached) -> None:
    (target,) = bench.targets([row])
    assert target["reached"] == reached
    assert target["what"] == "time over foolbox" and target["value"] == row["ratio"]


@pytest.mark.parametrize("missing", [set(), PEERS, {"torchattacks"}])
def test_a_quick_run_writes_a_table_with_or_without_peers(
    missing, tmp_path, monkeypatch, capsys
) -> None:
    original = bench.version_of
    monkeypatch.setattr(bench, "version_of", lambda p: None if p in missing else original(p))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    there = {p for p in PEERS if bench.version_of(p)}
    arguments = ["--quick", "--out", str(tmp_path / "b.json")]
    assert common.main({"attacks": bench.BENCHMARK}, arguments) == 0
    result = bench.BENCHMARK.load(tmp_path / "b.json")
    assert result["devices"] == ["cpu"] and result["gpu"] is None
    places = len(bench.QUICK) * len(bench.SIZES)
    assert len(result["attacks"]) == places * len(bench.METHODS)
    for row in result["attacks"]:
        assert row["missing"] == (row["tool"] in PEERS - there)
        if not row["missing"]:
            assert row["seconds"] > 0 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        if row["tool"] == bench.BASE.tool:
            assert row["ratio"] == 1
    assert len(result["against"]) == len(result["targets"]) == places * len(there)
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.endswith("  missing")]
    assert len(rows) == places * len(PEERS - there)
    for row in result["targets"]:
        assert f"{row['what']}, {row['network']}" in printed


@pytest.mark.cuda
def test_on_cuda_attacks_are_measured() -> None:
    spent = bench.measure(bench.QUICK[0], "linf", torch.device("cuda"))
    assert all(second > 0 for turns in spent.values() for second in turns)
    assert {bench.BASE, bench.OURS} <= spent.keys()
