"""The benchmark of `Stack`: both ways take the same steps, and the table shows what there is."""

import pytest
import torch

from benchmarks import stack as bench
from sam_lab.stack import Stack

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result() -> dict:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {**bench.run(bench.QUICK), "provenance": {}}
    torch.set_num_threads(before)


@pytest.mark.parametrize("network", bench.NETWORKS)
@pytest.mark.parametrize("rho", bench.METHODS.values(), ids=bench.METHODS)
def test_both_ways_come_to_the_same_weights(network, rho):
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
    nets = [bench.NETWORKS[network](seed).double() for seed in range(3)]
    stack = Stack(nets, bench.loss, bench.LR, rho, bench.MOMENTUM)
    step = bench.one_by_one(nets, rho, x, y)
    for _ in range(3):
        stack.step(x, y)
        step()
    for net, stacked in zip(nets, stack.models(), strict=True):
        for p, q in zip(net.parameters(), stacked.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)


def test_each_network_method_and_size_has_its_row(result):
    rows = [row for row in result["saved"] if row["device"] == "cpu"]
    assert {(row["network"], row["method"]) for row in rows} == {
        (network, method) for network in bench.NETWORKS for method in bench.METHODS
    }
    assert all(0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows)
    assert len(bench.table(result).splitlines()) == 1 + len(result["saved"])


def test_the_chapters_table_has_a_column_a_size_and_method(result):
    table = bench.chapter_table(result)
    assert table.header == ["Network, batch", "2 runs, SGD", "2 runs, SAM"]
    assert [row[0] for row in table.rows] == ["MLP, 4", "CNN, 4"]
    with pytest.raises(ValueError, match="device must be one of"):
        bench.chapter_table(result, "tpu")
