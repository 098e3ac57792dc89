"""The cost of a SAM step: all methods take the same one, and memory is what it is by hand."""

import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from benchmarks import common
from benchmarks import sam as bench

CPU = torch.device("cpu")
NETWORKS = {network.name: network for network in bench.QUICK}
SAME = [m for m in bench.METHODS if m not in (bench.BASE, bench.PEERS[-1]) and "asam" not in m.how]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def skip_without(package: str | None) -> None:
    """By its version: torchvision may be there and yet need `_optional` to be imported."""
    if package and bench.version_of(package) is None:
        pytest.skip(f"{package} is not installed")


def problem_of(name: str) -> bench.Problem:
    """In float64: in float32 the last bits may decide which ReLUs of a ResNet open."""
    network = NETWORKS[name]
    skip_without(network.package)
    if name == "ResNet-18":
        # at 8 x 8 BatchNorm would have one value a channel in the last layers
        network = replace(network, shape=(3, 16, 16), batch=4)
    problem = bench.make_problem(network, CPU)
    return bench.Problem(problem.model.double(), problem.x.double(), problem.y)


def weights_after(method: bench.Method, problem: bench.Problem) -> torch.Tensor:
    """Of three steps, so that the second and third start from a momentum."""
    own = problem.copy()
    with bench.quiet():
        step = method.make(own)
        for _ in range(3):
            step()
    return nn.utils.parameters_to_vector(own.params).detach()


@cache
def steps_on(name: str) -> tuple[bench.Problem, torch.Tensor, torch.Tensor]:
    """The problem, and where the plain loop and SGD take it."""
    problem = problem_of(name)
    return problem, weights_after(bench.PEERS[-1], problem), weights_after(bench.BASE, problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", SAME, ids=lambda m: f"{m.tool}, {m.how}")
def test_every_method_takes_the_step_of_the_plain_loop(method, name) -> None:
    skip_without(method.package)
    problem, wanted, plain = steps_on(name)
    start = nn.utils.parameters_to_vector(problem.params).detach().clone()
    got = weights_after(method, problem)
    moved = (wanted - start).norm()
    assert (got - wanted).norm() < 1e-3 * moved
    assert (wanted - plain).norm() > 1e-2 * moved  # which is not that of SGD
    assert torch.equal(nn.utils.parameters_to_vector(problem.params), start)


def test_the_networks_are_what_the_text_says() -> None:
    mlp, cnn = (bench.make_problem(network, CPU) for network in bench.NETWORKS[:2])
    assert len(mlp.params) == 128 and max(p.numel() for p in mlp.params) == 64 * 64
    assert mlp.x.shape == (128, 64) and cnn.x.shape == (128, 3, 32, 32)
    gradient = torch.autograd.grad(mlp.closure(), mlp.params)
    assert min(float(g.norm()) for g in gradient) > 1e-6  # it does not vanish on its way


def test_resnet_keeps_the_resolution_of_small_images() -> None:
    skip_without("torchvision")
    state = torch.get_rng_state()
    model = bench.resnet18()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.fc.weight, bench.resnet18().fc.weight)
    with torch.no_grad():
        stem = model.maxpool(model.conv1(torch.zeros(1, 3, 32, 32)))
    assert stem.shape == (1, 64, 32, 32)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962


# --- memory -----------------------------------------------------------------------------------


def test_peak_memory_is_what_it_is_by_hand() -> None:
    def make() -> bench.Step:
        kept = torch.zeros(1000)  # 4000 bytes that stay

        def step() -> None:
            first = torch.ones(500)  # 2000
            first = first + kept[:500]  # and 2000 more
            torch.ones(250)  # 1000, while only one of them is there

        return step

    assert bench.peak_bytes(make, CPU)[0] == 4000 + 2 * 2000


def test_what_only_the_first_step_needs_does_not_count() -> None:
    def make() -> bench.Step:
        sizes = iter([10_000, 100])
        return lambda: torch.ones(next(sizes))

    assert bench.peak_bytes(make, CPU)[0] == 400


def test_what_the_first_step_leaves_for_the_second_counts() -> None:
    def make() -> bench.Step:
        left = []

        def step() -> None:
            left[:] = [torch.ones(100), *left[:1]]

        return step

    # the new one is there before the older one of two goes
    assert bench.peak_bytes(make, CPU)[0] == 2 * 400


def test_the_memory_of_a_step_of_sgd_is_its_gradient_and_its_momentum() -> None:
    w = nn.Parameter(torch.ones(1000))
    problem = bench.Problem(nn.ParameterList([w]), torch.empty(0), torch.empty(0))
    problem.closure = lambda: (w * w).sum()  # type: ignore[method-assign]
    assert problem.bytes == 4000
    peak, step = bench.peak_bytes(lambda: bench._base(problem), CPU)
    # w * w and the loss; backward, with w * w gone: two products by 2 w and their sum; momentum
    assert 3 * 4000 <= peak <= 4.1 * 4000
    step()
    assert w.grad is not None


# --- waiting for a device ---------------------------------------------------------------------


@pytest.mark.parametrize("message", ["called a synchronizing CUDA operation", "something else"])
def test_waiting_is_what_torch_warns_of(message, monkeypatch) -> None:
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def step() -> None:
        warnings.warn(message, stacklevel=1)

    assert bench.waits(step, torch.device("cuda")) == ("synchronizing" in message)
    assert modes == ["warn", 0]


def test_on_the_cpu_there_is_nothing_to_wait_for() -> None:
    def step() -> None:
        raise AssertionError("called")

    assert bench.waits(step, CPU) is None


@pytest.mark.cuda
def test_on_cuda_time_and_memory_are_measured_and_nothing_waits() -> None:
    device = torch.device("cuda")
    peak, step = bench.peak_bytes(lambda: lambda: torch.ones(1024, device=device), device)
    assert peak == 4096 and bench.step_seconds(step, 2, device) > 0
    assert bench.waits(lambda: torch.ones(1, device=device).item(), device) is True
    network = replace(NETWORKS["MLP"], cuda_steps=2, cuda_turns=2)
    problem, measured = bench.measure(network, device)
    ours = {(r["how"]): r for r in bench.step_rows(problem, measured) if r["tool"] == "sam_lab"}
    assert [row["waits"] for row in ours.values()] == [False] * 3


# --- the tables -------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_turn() -> None:
    got = bench.ratios([2.0, 4.0, 8.0, 30.0, 16.0], [1.0, 2.0, 4.0, 5.0, 8.0])
    assert got == {"ratio": 2.0, "ratio_low": 2.0, "ratio_high": 2.0}
    assert bench.ratios([1.0, 3.0], [1.0, 1.0]) == {
        "ratio": 2.0,
        "ratio_low": 1.5,
        "ratio_high": 2.5,
    }


def step_row(**changes) -> dict:
    row = {"device": "cpu", "network": "ResNet-18", "tool": "sam_lab", "how": "SAM.step"}
    row |= {"missing": False, "seconds": 1.0, "ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1}
    return row | {"memory": 1.0, "waits": None} | changes


def peer_row(**changes) -> dict:
    row = {"device": "cpu", "network": "CNN", "peer": "plain loop"}
    return row | {"ratio": 1.01, "ratio_low": 0.99, "ratio_high": 1.02} | changes


@pytest.mark.parametrize(
    ("row", "what", "reached"),
    [
        (step_row(ratio=2.05), "time over SGD", True),
        (step_row(ratio=2.06), "time over SGD", False),
        (step_row(memory=1.1), "copies of the parameters added", True),
        (step_row(memory=1.11), "copies of the parameters added", False),
        (peer_row(), "time over plain loop", True),
        (peer_row(ratio_low=1.001), "time over plain loop", False),
    ],
)
def test_targets_are_decided_by_what_was_measured(row, what, reached) -> None:
    steps, against = ([], [row]) if "peer" in row else ([row], [])
    rows = {target["what"]: target for target in bench.targets(steps, against)}
    assert rows[what]["reached"] == reached
    assert rows[what]["value"] in (row["ratio"], row.get("memory"))


def test_only_our_step_has_targets_and_only_resnet_one_for_time_over_sgd() -> None:
    others = [
        step_row(how="SAM.perturbed"),
        step_row(tool="plain loop"),
        step_row(missing=True),
    ]
    assert bench.targets(others, []) == []
    assert [row["what"] for row in bench.targets([step_row(network="CNN")], [])] == [
        "copies of the parameters added"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("missing", [set(), {"pytorch-optimizer", "torchvision"}])
def test_quick_run_writes_a_table_with_or_without_peers(
    missing, tmp_path, monkeypatch, capsys
) -> None:
    original = bench.version_of
    monkeypatch.setattr(bench, "version_of", lambda p: None if p in missing else original(p))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    there = {p for p in ("pytorch-optimizer", "torchvision") if bench.version_of(p)}
    arguments = ["--quick", "--out", str(tmp_path / "b.json")]
    assert common.main({"sam": bench.BENCHMARK}, arguments) == 0
    result = bench.BENCHMARK.load(tmp_path / "b.json")
    assert result["devices"] == ["cpu"] and result["gpu"] is None
    assert len(result["steps"]) == len(bench.QUICK) * len(bench.METHODS)
    for row in result["steps"]:
        needs = {"pytorch-optimizer"} & {row["tool"].replace("_", "-")}
        needs |= {"torchvision"} if row["network"] == "ResNet-18" else set()
        assert row["missing"] == (not needs <= there)
        if row["missing"]:
            continue
        assert row["seconds"] > 0 and row["waits"] is None
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        if row["tool"] == "SGD":
            assert row["ratio"] == 1 and row["memory"] == 0
    networks = 2 + ("torchvision" in there)
    peers = 1 + ("pytorch-optimizer" in there)
    assert len(result["against"]) == networks * peers
    assert len(result["targets"]) == networks * (peers + 1) + ("torchvision" in there)
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.endswith("  missing")]
    assert len(rows) == sum(row["missing"] for row in result["steps"])
    table = bench.chapter_table(result)
    assert table.header[:3] == ["Method", "MLP: time", "memory"] and len(table.rows) == 5
    assert {len(row) for row in table.rows} == {7} and "SGD" not in table._repr_markdown_()
    assert ("–" in table.rows[0]) == ("torchvision" not in there)
    with pytest.raises(ValueError, match="device must be one of cpu"):
        bench.chapter_table(result, "cuda")
