"""A small experiment, its claims and its results, for the tests of the machinery."""

from dataclasses import dataclass

from sam_lab.experiments import Claim, Criterion, Experiment, Result, Run, Source

# A toy experiment as a reader would write one: `slow` seconds a step, a line in `log` per run made.
TOY = '''
"""A toy."""
import os, time
from dataclasses import dataclass
from sam_lab.experiments import Experiment, Source, claim

@dataclass(frozen=True)
class Config:
    steps: int = 4
    lrs: tuple[float, ...] = (0.1, 0.2)

def settings(config):
    return [{"lr": lr} for lr in config.lrs]

def run(config, cell):
    xs = []
    for step in range(config.steps):
        time.sleep(float(os.environ.get("TOY_SLOW", 0)))
        xs.append(cell["lr"] * (1 + 0.01 * cell.seed) * (step + 1))
        cell.tick(step + 1, config.steps)
    if "TOY_LOG" in os.environ:
        with open(os.environ["TOY_LOG"], "a") as log:
            print(cell["lr"], cell.seed, file=log)
    return {"x": xs}

@claim(Source("Nobody (2020), Figure 1", "after"), 0.9, 1.1)
def slope(runs):
    """x grows by lr a step"""
    return runs.one(lr=0.1)["x"][0] / 0.1

EXPERIMENT = Experiment(
    "NAME", "A toy that grows", "Nobody (2020), Figure 1",
    {"laptop": Config(), "paper": Config(steps=8)}, settings, run, [slope],
)
'''


@dataclass(frozen=True)
class Config:
    steps: int = 3
    lr: float = 0.1


def toy(*claims, run=None, settings=None, name="toy"):
    def grow(config, cell):
        return {"x": [cell["lr"] * step + cell.seed for step in range(config.steps)]}

    return Experiment(
        name,
        "A toy",
        "Nobody (2020)",
        {"laptop": Config(), "paper": Config(steps=30)},
        settings or (lambda config: [{"lr": config.lr}, {"lr": 2 * config.lr}]),
        run or grow,
        claims,
    )


def claim_of(values, low=0.9, high=1.1, **changes):
    """A claim whose statistic is values[seed], or a function of the seed's runs."""
    statistic = values if callable(values) else lambda runs: values[runs.seed]
    given = {"id": "c", "statement": "It holds", "source": Source("Fig. 1", "after"), **changes}
    return Claim(**given, statistic=statistic, criterion=Criterion(low, high))


def result_of(seeds=3, scale="laptop", **columns):
    columns = columns or {"x": [1.0]}
    runs = [Run({"lr": 0.1}, seed, columns) for seed in range(seeds)]
    return Result("toy", scale, {"lr": 0.1}, runs, [{"seeds": list(range(seeds)), "python": "3"}])
