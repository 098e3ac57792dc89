"""The SAM family at equal passes: controls, the search, what is measured, and the claims."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import common
from benchmarks import family as bench
from sam_lab import SAM, experiments, models
from sam_lab.experiments import Cell
from sam_lab.experiments.family import second_pass as task
from sam_lab.methods import inner
from sam_lab.perturbations import global_norm
from sam_lab.perturbations import sam as sam_rule

TINY = dataclasses.replace(
    task.LAPTOP,
    recipe=task.LAPTOP.recipe.but(
        data="mnist1d", standardize="nowhere", train=80, test=40, batch=20, epochs=6, measured=20
    ),
    validation=40,
    probes=2,
)
STEPS = 10


def step_of(name, value, counted):
    """Ten steps of a contender on a small network; `counted` is told of every pass."""
    torch.manual_seed(0)
    model = models.mlp((5, 8, 3), seed=0)
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    how = task.CONTENDERS[name].how(value)
    sam = SAM(
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        how.get("rho", 0.0),
        method=how.get("method", task.plain),
        generator=torch.Generator().manual_seed(0),
    )

    def losses(examples=slice(None)):
        counted(len(x[examples]) / len(x) * (1 if torch.is_grad_enabled() else 1 / 3))
        return torch.nn.functional.cross_entropy(model(x[examples]), y[examples], reduction="none")

    for _ in range(STEPS):
        sam.step(losses)


@pytest.mark.parametrize("name", task.CONTENDERS)
def test_a_contender_makes_the_passes_that_it_is_charged_for(name):
    passes = []
    step_of(name, task.CONTENDERS[name].start, passes.append)
    assert sum(passes) / STEPS == pytest.approx(task.CONTENDERS[name].passes)


def test_a_budget_of_passes_is_fewer_epochs_for_who_makes_more_of_them():
    epochs = {name: one.epochs(60, one.start) for name, one in task.CONTENDERS.items()}
    assert epochs["sgd"] == epochs["momentum_sam"] == 60
    assert epochs["sam"] == 30 and epochs["looksam"] == 50 and epochs["frob_sam"] == 20
    early = task.CONTENDERS["sgd_early"]
    assert [early.epochs(80, step * early.start) for step in task.STEPS] == [10, 20, 40, 80]


def test_times_of_the_clock_are_those_that_the_benchmark_has_measured():
    result = bench.BENCHMARK.load(common.RESULTS / bench.BENCHMARK.file)
    measured = {
        row["how"]: row["ratio"]
        for row in result["steps"]
        if row["network"] == "MLP" and row["tool"] == "sam_lab" and row["device"] == "cpu"
    }
    clocked = [one for one in task.CONTENDERS.values() if one.clock]
    assert {one.title: one.clock for one in clocked} == {
        one.title: pytest.approx(measured[one.title], abs=0.01) for one in clocked
    }


class Seen:
    """A loss g.w, whose gradient is known, and a note of where it was looked at."""

    def __init__(self):
        self.params = [torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True)]
        self.at_points, self.chosen = [], []

    @property
    def rho(self):
        return 0.5

    def __call__(self):
        return [torch.arange(1.0, 4.0), torch.full((2, 2), -2.0)]

    def epsilon(self, direction, rule=None):
        rule = rule or sam_rule
        return rule(self.params, direction, 0.5)

    def along(self, direction, rule=None):
        return self.at(self.epsilon(direction, rule))

    def at(self, epsilon, examples=None):
        self.at_points.append(epsilon)
        self.chosen.append(examples)
        return self()

    def losses(self, epsilon=None):
        return torch.zeros(8)


def test_noise_looks_once_in_a_random_direction_of_sams_length():
    look = Seen()
    direction, state = task.noise(look, {}, generator=torch.Generator().manual_seed(0))
    (epsilon,) = look.at_points
    assert float(global_norm(epsilon)) == pytest.approx(0.5)
    assert abs(float(inner(epsilon, look()))) < 0.5 * float(global_norm(look()))
    assert state == {} and len(direction) == 2


def test_a_random_part_lies_across_the_gradient_and_is_as_long_as_looksams():
    look, generator = Seen(), torch.Generator().manual_seed(0)
    _, state = task.random_reuse(look, {}, alpha=0.7, generator=generator)
    second, state = task.random_reuse(look, state, alpha=0.7, generator=generator)
    g = look()
    extra = [a - b for a, b in zip(second, g, strict=True)]
    assert len(look.at_points) == 1 and state == {"t": 2}
    assert float(inner(extra, g)) == pytest.approx(0, abs=1e-4)
    assert float(global_norm(extra)) == pytest.approx(0.7 * float(global_norm(g)), rel=1e-5)


def test_random_examples_are_half_of_the_batch_each_once():
    look, generator = Seen(), torch.Generator().manual_seed(0)
    for _ in range(4):
        task.random_subset(look, {}, generator=generator)
    for chosen in look.chosen:
        assert len(chosen) == len(set(chosen.tolist())) == 4 and int(chosen.max()) < 8
    assert len({tuple(chosen.tolist()) for chosen in look.chosen}) > 1


@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_noisy_labels_are_labels_and_change_no_more_than_their_share(share, seed):
    y = torch.arange(200) % 10
    noisy = task.noisy(y, share, 10, seed)
    assert noisy.dtype == y.dtype and int(noisy.min()) >= 0 and int(noisy.max()) < 10
    changed = float((noisy != y).double().mean())
    assert changed <= share + 4 * math.sqrt(share * (1 - share) / 200) + 1e-9
    assert torch.equal(noisy, task.noisy(y, share, 10, seed))


def test_training_has_the_noisy_labels_and_what_is_measured_the_true_ones():
    training, dataset = task.trained(TINY, "sgd", 0.1, 3)
    assert len(training.x) == TINY.examples == 40
    assert torch.equal(training.x, dataset.x[:40])
    assert not torch.equal(training.y, dataset.y[:40])
    clean, _ = task.trained(dataclasses.replace(TINY, noise=0.0), "sgd", 0.1, 3)
    assert torch.equal(clean.y, dataset.y[:40])
    with torch.no_grad():
        wrong = training.model.eval()(dataset.x[40:]).argmax(1) != dataset.y[40:]
    validation = task.validation_error(TINY, training.model, dataset)
    assert validation == pytest.approx(100 * float(wrong.double().mean()))


def test_a_run_that_diverged_is_never_chosen():
    training, dataset = task.trained(TINY, "sgd", 0.1, 0)
    with torch.no_grad():
        next(training.model.parameters()).fill_(math.nan)
    assert task.test_error(TINY, training.model, dataset) == task.WORST


def test_the_search_takes_the_value_with_the_smallest_validation_error():
    run = run_of({}, 0, **task.run_passes(TINY, Cell({"method": "sam"}, 0)))
    assert run["tried"].tolist() == pytest.approx([0.05, 0.1, 0.2, 0.4])
    assert run.value("value") == run["tried"][run["validation_error"].argmin()]
    assert run["validation_error"].tolist() == list(task.search(TINY, "sam"))
    again = run_of({}, 1, **task.run_passes(TINY, Cell({"method": "sam"}, 1)))
    assert again.value("value") == run.value("value"), "the seed that is reported has no say"
    assert run.value("epochs") == 3 and run.value("passes") == 6


def test_by_the_clock_a_dearer_step_means_fewer_epochs():
    columns = task.run_clock(TINY, Cell({"method": "momentum_sam"}, 0))
    assert columns["epochs"] == [round(6 / 1.44)]


def test_frobenius_norm_and_trace_are_estimated_without_bias():
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = half + half.T
    trace, norm = task.frobenius(Dense(matrix), 4000)
    assert trace == pytest.approx(float(matrix.trace()), abs=0.6)
    assert norm == pytest.approx(float(matrix.norm()), rel=0.02)
    diagonal = torch.diag(torch.tensor([3.0, -1.0], dtype=torch.float64))
    assert task.frobenius(Dense(diagonal), 1) == pytest.approx((2.0, math.sqrt(10)))


class Dense:
    """A matrix as an operator."""

    device = torch.device("cpu")

    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, matrix.dtype

    def __matmul__(self, v):
        return self.matrix @ v


def test_the_surrogate_gap_is_the_rise_of_the_loss_along_its_gradient():
    model = models.mlp((5, 8, 3), seed=0, dtype=torch.float64)
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    before = [p.detach().clone() for p in model.parameters()]
    found = task.gap(model, x, y, 0.1, 0.3)
    fn = task.mean_loss(0.1)
    loss = fn(model(x), y)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for p, g in zip(model.parameters(), grads, strict=True):
            p += 0.3 * g / global_norm(grads)
        assert found == pytest.approx(float(fn(model(x), y) - loss))
        for p, old in zip(model.parameters(), before, strict=True):
            p.copy_(old)
    assert task.gap(model, x, y, 0.1, 0.3) == pytest.approx(found), "it leaves the weights alone"


def test_the_small_comparison_runs_to_verdicts():
    config = dataclasses.replace(TINY, contenders=("sgd", "sam"))
    result = experiments.run("second_pass", config, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 3
    by_id = {verdict.claim.id: verdict for verdict in experiments.judge(result)}
    assert not by_id["sam-beats-sgd"].reason.startswith("the statistic failed")


def made(name, error, study="passes", **more):
    columns = {"test_error": [error], "sharpness": [1.0], "frobenius": [1.0], **more}
    return run_of({"study": study, "method": name}, 0, **columns)


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = [
        made("sgd", 30.0, sharpness=[8.0]),
        made("sgd_early", 24.0, sharpness=[7.0]),
        made("nesterov", 29.0, sharpness=[6.0]),
        made("noise", 28.0, sharpness=[5.5]),
        made("momentum_sam", 21.0, sharpness=[2.5]),
        made("every", 26.5, sharpness=[5.0]),
        made("looksam", 22.0, sharpness=[3.0]),
        made("random_reuse", 27.0, sharpness=[4.5]),
        made("esam", 19.0, sharpness=[2.2]),
        made("random_subset", 19.5, sharpness=[2.3]),
        made("sam", 20.0, sharpness=[2.0], frobenius=[10.0]),
        made("gsam", 18.0, sharpness=[1.9]),
        made("friendly_sam", 20.5, sharpness=[2.4]),
        made("vasso", 23.0, sharpness=[3.5]),
        made("frob_sam", 25.0, sharpness=[4.0], frobenius=[7.0]),
        made("sam", 22.5, study="clock"),
        made("momentum_sam", 23.5, study="clock"),
    ]
    passes = [run for run in runs if run.settings["study"] == "passes"]
    ranks = [
        np.argsort(np.argsort([run.value(column) for run in passes]))
        for column in ("sharpness", "test_error")
    ]
    n = len(passes)
    spearman = 1 - 6 * float(((ranks[0] - ranks[1]) ** 2).sum()) / (n * (n * n - 1))
    expected = {
        "sam-beats-sgd": 10.0,
        "sam-beats-early-stopping": 4.0,
        "sam-beats-noise": 8.0,
        "momentum-sam-beats-sgd": 9.0,
        "momentum-sam-beats-sam": -1.0,
        "momentum-sam-beats-nesterov": 8.0,
        "momentum-sam-beats-noise": 7.0,
        "looksam-keeps-up-with-sam": -2.0,
        "looksam-beats-sam-now-and-then": 4.5,
        "looksam-beats-random-part": 5.0,
        "esam-beats-sam": 1.0,
        "esam-beats-random-examples": 0.5,
        "gsam-beats-sam": 2.0,
        "friendly-sam-beats-sam": -0.5,
        "vasso-beats-sam": -3.0,
        "sam-is-flatter-than-sgd": 0.25,
        "frob-sam-lowers-frobenius": 0.7,
        "flatter-methods-err-less": spearman,
        "sam-beats-sgd-by-the-clock": 7.5,
        "momentum-sam-beats-sgd-by-the-clock": 6.5,
    }
    cases = {name: (seed_runs({}, *runs), value) for name, value in expected.items()}
    check_statistics(task.EXPERIMENT.claims, cases)


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_no_seed_of_the_search_is_one_that_is_reported(scale):
    config = task.EXPERIMENT.presets[scale]
    assert min(config.search_seeds) >= 1000
    assert 0 < config.examples < config.recipe.train
    assert task.cost(config) > 0
