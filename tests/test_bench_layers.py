"""The benchmark of layers: products that are right, rows that add up."""

import pytest
import torch

from benchmarks import curvature, layers
from sam_lab import Hessian


@pytest.fixture(scope="module")
def result():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield layers.run(layers.SMALL, 2)
    torch.set_num_threads(before)


def test_each_layer_has_a_row_for_each_way(result):
    assert len(result["products"]) == len(layers.SMALL) * len(curvature.PRODUCTS)
    for row in result["products"]:
        assert row["tool"] != "sam_lab" or not row["missing"]
        if "gradients" in row:
            assert 0 < row["gradients_low"] <= row["gradients"] <= row["gradients_high"]
    printed = layers.table({**result, "provenance": {"threads": 1, "torch": "2"}})
    assert printed.count("graph kept (default)") == len(layers.SMALL)


@pytest.mark.parametrize("name", layers.SMALL)
def test_a_problem_is_the_same_each_time_and_has_curvature_in_every_parameter(name):
    problem, same = (layers.make_problem(layers.SMALL[name]) for _ in range(2))
    assert torch.equal(problem.closure(), same.closure())
    hessian = Hessian(problem.closure, problem.params, problem.model)
    dense = hessian @ torch.eye(hessian.shape[0])
    torch.testing.assert_close(dense, dense.T, rtol=1e-3, atol=1e-5)
    sizes = [p.numel() for p in problem.params]
    assert sum(bool(block.abs().max() > 1e-6) for block in dense.split(sizes)) > len(sizes) / 2


def test_both_attentions_are_causal():
    x = torch.randn(1, 4, 8)
    later = x.clone()
    later[:, 2:] += 1
    for written_out in (True, False):
        attention = layers.Attention(8, 2, written_out)
        torch.testing.assert_close(attention(x)[:, :2], attention(later)[:, :2])


def test_a_tool_that_cannot_is_said_to_fail(monkeypatch):
    def cannot(_problem):
        raise NotImplementedError("no second derivative\nand a long trace")

    monkeypatch.setattr(curvature, "PRODUCTS", (("a tool", "a way", None, cannot),))
    (row,) = curvature.product_table(layers.make_problem(layers.SMALL["convolution"]), 1)
    assert row["failed"] == "no second derivative" and not row["missing"]
    assert curvature.product_line(row).endswith("fails")
