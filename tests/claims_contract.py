"""What the claims of every experiment are held to, and how to make runs by hand."""

import pytest

from sam_lab.experiments import Ratio, Result, Run, SeedRuns


def run_of(settings=None, seed=0, **columns):
    """A run; a bare number makes a column of length one."""
    return Run(settings or {}, seed, columns)


def seed_runs(config, *runs):
    """These runs of one seed, as a claim gets them."""
    return SeedRuns(runs[0].seed, config, runs)


def result_of(config, *runs):
    """A result of these runs, of any seeds."""
    return Result("hand-made", "laptop", config, list(runs), [])


def check_statistics(claims, cases):
    """Every claim has a case, and there its statistic is the number worked out by hand.

    Of a claim on a ratio of means, it is the quotient of the one seed.

    It is the same when the runs come in another order, the first (the base) excepted.

    Args:
        claims: those of an experiment.
        cases: maps the id of each claim to (runs of one seed, expected value).
    """
    ids = {claim.id for claim in claims}
    assert cases.keys() == ids, f"claims and cases differ: {sorted(cases.keys() ^ ids)}"
    wrong = {}
    for claim in claims:
        runs, expected = cases[claim.id]
        base, *others = runs.runs
        for ordered in ([base, *others], [base, *reversed(others)]):
            value = claim(seed_runs(runs.config, *ordered))
            if isinstance(value, Ratio):
                value = value.quotient
            # columns hold six digits
            if value != pytest.approx(expected, rel=1e-5, nan_ok=True):
                wrong[claim.id] = f"{value}, expected {expected}"
    assert not wrong, wrong
