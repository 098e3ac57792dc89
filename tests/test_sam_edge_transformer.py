"""Task (c) of the paper at a tiny scale, and its own claims on made-up runs."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from claims_contract import result_of, run_of

from sam_lab import SAM, experiments, models, text
from sam_lab.experiments import Cell, Result
from sam_lab.experiments.sam import at_the_edge
from sam_lab.experiments.sam import sam_edge_transformer as task
from sam_lab.recorder import COLUMNS

TINY = task.Config(
    layers=1,
    width=8,
    heads=2,
    key=3,
    length=6,
    batch=4,
    fixed=16,
    lrs=(0.1, 0.4),
    rhos=(0.0, 0.1),
    steps=12,
    every=3,
)
SAM_SETTING = {"lr": 0.4, "rho": 0.1}
OWN = [
    "sam-as-sgd",
    "starts-beyond",
    "batch-scatters",
    "batch-sharper",
    "batch-edge-higher",
    "batch-reads-alike",
]


@pytest.fixture(scope="module")
def result() -> Result:
    return experiments.run(task.EXPERIMENT, TINY, seeds=2, device="cpu", progress=False)


def test_every_run_has_both_sets_of_columns_at_the_same_steps(result):
    names = set(COLUMNS) | {"batch_" + name for name in COLUMNS}
    for run in result.runs:
        assert set(run.columns) == names
        assert run["step"].tolist() == run["batch_step"].tolist() == [0, 3, 6, 9, 12]
        assert all(np.isfinite(run[name]).all() for name in names)


def test_every_claim_gets_a_number_from_every_seed_and_the_own_ones_are_finite(result):
    assert len(result.runs) == 2 * 4
    for verdict in experiments.judge(result):
        assert "the statistic failed" not in verdict.reason
        assert len(verdict.values) == 2 or verdict.verdict == "does not apply"
        assert verdict.claim.id not in OWN or all(map(math.isfinite, verdict.values))


def test_the_same_seed_gives_the_same_numbers():
    config = dataclasses.replace(TINY, steps=3)
    torch.manual_seed(1)
    first = task.run(config, Cell(SAM_SETTING, 7))
    torch.manual_seed(2)
    assert task.run(config, Cell(SAM_SETTING, 7)) == first
    assert task.run(config, Cell(SAM_SETTING, 8))["loss"] != first["loss"]


def test_settings_of_one_seed_share_network_fixed_batch_and_minibatches(result):
    for seed in result.by_seed():
        assert len(seed.runs) == 4
        for name in ("loss", "sharpness", "batch_loss", "batch_sharpness"):
            assert len({run[name][0] for run in seed.runs}) == 1
    first, second = (result.select(lr=0.1, rho=0.0, seed=seed)[0] for seed in (0, 1))
    assert first["loss"][0] != second["loss"][0]


def test_the_fixed_batch_stays_and_the_current_one_changes():
    config = dataclasses.replace(TINY, lrs=(1e-9,), rhos=(0.0,))
    columns = task.run(config, Cell({"lr": 1e-9, "rho": 0.0}))
    assert columns["loss"] == pytest.approx([columns["loss"][0]] * 5, rel=1e-6)
    assert len({round(loss, 4) for loss in columns["batch_loss"]}) == 5


@pytest.mark.slow
def test_a_run_is_sam_with_a_fresh_batch_a_step():
    """The same by hand, and without recorders."""
    columns = task.run(TINY, Cell(SAM_SETTING, 3))
    tokens = text.load().tokens
    generator = torch.Generator().manual_seed(3)
    fixed = text.windows(tokens, TINY.length, TINY.fixed, generator)
    model = models.transformer(128, 8, 1, 2, 6, key=3, seed=3)

    def loss(x, y):
        logits = model(x)
        return -logits.log_softmax(-1).gather(-1, y[..., None]).mean()  # nats, mean over tokens

    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.4), rho=0.1)
    for _ in range(TINY.steps):
        batch = text.windows(tokens, TINY.length, TINY.batch, generator)
        sam.step(lambda batch=batch: loss(*batch))
    assert columns["loss"][-1] == pytest.approx(loss(*fixed).item(), rel=1e-4)


def test_the_current_batch_is_the_one_that_the_next_step_is_on():
    model, loss, _, draw = task.problem(TINY, seed=5)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.4), rho=0.1)
    seen = []
    for _ in range(TINY.steps):
        batch = draw()
        seen.append(sam.step(lambda batch=batch: loss(*batch)).item())
    columns = task.run(TINY, Cell(SAM_SETTING, 5))
    assert columns["batch_loss"][:-1] == pytest.approx(seen[:: TINY.every], rel=1e-4)


def test_the_loss_is_the_cross_entropy_of_the_next_character():
    model, loss, fixed, _ = task.problem(TINY, seed=0)
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.zero_()
    assert loss(*fixed).item() == pytest.approx(math.log(128))  # all characters alike
    with torch.no_grad():
        model[-1].bias[ord("e")] = 50.0
    wrong = (fixed[1] != ord("e")).double().mean().item()
    assert loss(*fixed).item() == pytest.approx(50 * wrong, rel=1e-4)


def test_an_unknown_text_is_named():
    with pytest.raises(ValueError, match="'latin'"):
        task.problem(dataclasses.replace(TINY, data="latin"))


def test_the_paper_preset_is_the_network_of_the_papers_code():
    paper = task.PAPER
    assert paper.data == "shakespeare"
    assert (paper.layers, paper.heads, paper.key, paper.width) == (6, 8, 32, 128)
    assert (paper.length, paper.batch) == (64, 128)
    assert 0.1 in paper.lrs and 0.1 in paper.rhos


@pytest.mark.parametrize("scale", ["laptop", "desktop", "paper"])
def test_presets_can_be_decided(scale):
    config = task.EXPERIMENT.presets[scale]
    assert config.rhos[0] == 0 and list(config.lrs) == sorted(config.lrs)
    assert config.fixed >= 4 * config.batch
    assert config.steps // config.every >= 20  # enough in the second half for percentiles
    assert task.LAPTOP.data == "python_reference"  # needs no download


# --- made-up runs --------------------------------------------------------------------------------


def made_up(sgd=1.0, sam=1.0, start=5.0, width=3.0, sharper=1.2, longer=1.2) -> Result:
    """Runs that hover around `sgd` and `sam` times their edge on the fixed batch; on the current
    one with `width` times the scatter, `sharper` by a factor, and a `longer` gradient's edge."""
    config = dataclasses.replace(task.LAPTOP, lrs=(0.1, 0.4), rhos=(0.0, 0.1))
    n, runs = 41, []
    wave = 0.02 * (np.arange(n) % 3 - 1)
    for seed in range(3):
        for setting in task.EXPERIMENT.settings(config):
            gd = 2 / setting["lr"]
            perturbed = setting["rho"] > 0
            edge = gd * (0.5 if perturbed else 1.0) * np.linspace(1, 0.99, n)
            batch_edge = edge * (longer if perturbed else 1.0)
            hover = (sam if perturbed else sgd) + 0.001 * seed
            sharpness = edge * (hover + wave)
            sharpness[0] = start * gd
            columns = dict.fromkeys(COLUMNS, np.linspace(1, 0.5, n)) | {
                "step": 10.0 * np.arange(n),
                "sharpness": sharpness,
                "gd_edge": np.full(n, gd),
                "sam_edge": edge,
            }
            batch = columns | {
                "sharpness": sharper * edge * hover + width * batch_edge * wave,
                "sam_edge": batch_edge,
            }
            columns |= {"batch_" + name: values for name, values in batch.items()}
            runs.append(run_of(setting, seed, **columns))
    return result_of(dataclasses.asdict(config), *runs)


def verdicts(result):
    return {verdict.claim.id: verdict for verdict in task.EXPERIMENT.judge(result)}


def test_the_own_claims_hold_on_runs_made_to_hold_them():
    held = verdicts(made_up())
    assert {name: held[name].verdict for name in OWN} == dict.fromkeys(OWN, "reproduced")


def test_beside_its_own_the_task_has_the_claims_of_all_three():
    shared = [claim.id for claim in at_the_edge.CLAIMS]
    assert [claim.id for claim in task.EXPERIMENT.claims] == [*shared, *OWN]


@pytest.mark.parametrize(
    ("change", "falls"),
    [
        ({"sam": 0.6}, "sam-as-sgd"),
        ({"sgd": 0.6}, "sam-as-sgd"),
        ({"start": 0.2}, "starts-beyond"),
        ({"width": 1.0}, "batch-scatters"),
        ({"sharper": 1.0}, "batch-sharper"),
        ({"longer": 1.0}, "batch-edge-higher"),
        ({"longer": 1.5}, "batch-reads-alike"),
        ({"sharper": 1.5}, "batch-reads-alike"),
    ],
)
def test_each_own_claim_can_fail(change, falls):
    assert verdicts(made_up(**change))[falls].verdict == "not reproduced"


def test_own_statistics_are_what_they_say():
    own = verdicts(made_up(sgd=1.2, sam=0.9, start=5.0, width=3.0, sharper=1.1, longer=1.3))
    assert own["sam-as-sgd"].mean == pytest.approx(0.9 / 1.2, rel=0.02)
    assert own["starts-beyond"].mean == pytest.approx(5.0)
    assert own["batch-scatters"].mean == pytest.approx(3.0, rel=0.02)
    assert own["batch-sharper"].mean == pytest.approx(1.1, rel=0.02)
    assert own["batch-edge-higher"].mean == pytest.approx(1.3)
    assert own["batch-reads-alike"].mean == pytest.approx(1.1 / 1.3, rel=0.02)


def test_neither_near_its_edge_is_alike_too():
    assert verdicts(made_up(sgd=0.65, sam=0.65))["sam-as-sgd"].verdict == "reproduced"
