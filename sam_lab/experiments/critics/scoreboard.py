"""The scoreboard: for each explanation of SAM's success, what this book measured for and against.

An `Explanation` names claims of the ledger, and says of each what it would count for if it is
reproduced. `weigh` reads the verdicts off the result files, so that rewording a claim, or running
it again, changes the scoreboard. A claim that is not reproduced counts for the other side, unless
its evidence says otherwise: the criterion was missed, which is less than the contrary proven. An
inconclusive one counts for none.

The number of claims is no weight: some were easy to ask, and others are on toys. Every one is
there with its measured value, so that a reader can weigh them anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sam_lab.experiments.lab.claims import Verdict
from sam_lab.experiments.lab.registry import get
from sam_lab.experiments.lab.result import Result
from sam_lab.experiments.lab.table import Table

__all__ = [
    "EXPLANATIONS",
    "SIDES",
    "Evidence",
    "Explanation",
    "Weighed",
    "counts",
    "table",
    "weigh",
]

SIDES = ("for", "against", "undecided", "not run")


@dataclass(frozen=True)
class Evidence:
    """A claim of the ledger, read as evidence on an explanation.

    Attributes:
        experiment, claim: the names of both.
        counts: the side that it speaks for if it is reproduced, ``"for"`` or ``"against"``.
        asks: what was measured, in a few words.
        scale: of the result file.
        missed: the side if it is not reproduced; the other one unless given.

    Raises:
        ValueError: another side.
    """

    experiment: str
    claim: str
    counts: str
    asks: str
    scale: str = "laptop"
    missed: str = ""

    def __post_init__(self) -> None:
        if self.counts not in SIDES[:2]:
            raise ValueError(
                f"evidence {self.experiment}/{self.claim}: counts must be 'for' or 'against', "
                f"got {self.counts!r}"
            )
        if self.missed not in ("", *SIDES[:3]):
            raise ValueError(
                f"evidence {self.experiment}/{self.claim}: missed must be one of "
                f"{', '.join(SIDES[:3])}, got {self.missed!r}"
            )

    def side(self, verdict: Verdict | None) -> str:
        """The side of `SIDES` for which it speaks, given its verdict (None: not run)."""
        if verdict is None:
            return "not run"
        if verdict.verdict == "reproduced":
            return self.counts
        if verdict.verdict == "not reproduced":
            return self.missed or ("against" if self.counts == "for" else "for")
        return "undecided"


@dataclass(frozen=True)
class Explanation:
    """Why SAM predicts better, as some say, and the claims that bear on it.

    Attributes:
        name: in a word or two.
        says: the explanation in one sentence.
        evidence: what bears on it.
    """

    name: str
    says: str
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True)
class Weighed:
    """Evidence and what the stored runs say about it.

    Attributes:
        explanation, evidence: what was asked.
        verdict: of the claim; None where it was not run.
    """

    explanation: Explanation
    evidence: Evidence
    verdict: Verdict | None

    @property
    def side(self) -> str:
        """One of `SIDES`."""
        return self.evidence.side(self.verdict)

    @property
    def measured(self) -> str:
        """Mean over seeds and its interval, or that there is none."""
        return "not run" if self.verdict is None else self.verdict.measured


def weigh(
    directory: str | os.PathLike[str], explanations: Iterable[Explanation] | None = None
) -> list[Weighed]:
    """Every piece of evidence with the verdict of the result files of a folder.

    Args:
        directory: holds files such as ``second_pass.laptop.json``; what has none is not run.
        explanations: `EXPLANATIONS` unless given.

    Raises:
        ExperimentError: evidence names no experiment of the book.
        KeyError: evidence names no claim of its experiment.
    """
    results: dict[str, Result | None] = {}

    def judged(evidence: Evidence) -> Verdict | None:
        claims = {claim.id: claim for claim in get(evidence.experiment).claims}
        claim = claims[evidence.claim]
        name = f"{evidence.experiment}.{evidence.scale}.json"
        if name not in results:
            path = Path(directory) / name
            results[name] = Result.load(path) if path.exists() else None
        result = results[name]
        return claim.judge(result) if result else None

    return [
        Weighed(explanation, evidence, judged(evidence))
        for explanation in (EXPLANATIONS if explanations is None else explanations)
        for evidence in explanation.evidence
    ]


def counts(weighed: Iterable[Weighed]) -> Table:
    """A row an explanation: what it says, and how many claims speak for each side."""
    weighed = list(weighed)
    shown = [
        side for side in SIDES if side != "not run" or any(one.side == side for one in weighed)
    ]
    return Table(
        ["Explanation", "It says", *(side.capitalize() for side in shown)],
        [
            [
                f"**{explanation.name}**",
                explanation.says,
                *(str(sum(one.side == side for one in its)) for side in shown),
            ]
            for explanation, its in _grouped(weighed)
        ],
    )


def table(weighed: Iterable[Weighed]) -> Table:
    """A row a claim: what was measured, the number, and the side that it speaks for."""
    rows = []
    for explanation, its in _grouped(weighed):
        for i, one in enumerate(its):
            evidence = one.evidence
            scale = "" if evidence.scale == "laptop" else f", {evidence.scale}"
            rows.append(
                [
                    "" if i else f"**{explanation.name}**",
                    evidence.asks,
                    one.measured,
                    one.side,
                    f"`{evidence.experiment}`: {evidence.claim}{scale}",
                ]
            )
    return Table(["Explanation", "Measured", "Value", "Speaks", "Claim"], rows)


def _grouped(weighed: Iterable[Weighed]) -> list[tuple[Explanation, list[Weighed]]]:
    groups: dict[str, list[Weighed]] = {}
    for one in weighed:
        groups.setdefault(one.explanation.name, []).append(one)
    return [(its[0].explanation, its) for its in groups.values()]


EXPLANATIONS = (
    Explanation(
        "Flatness",
        "SAM ends flatter, and what is flatter predicts better.",
        (
            Evidence(
                "second_pass",
                "sam-is-flatter-than-sgd",
                "for",
                "SAM's sharpness over SGD's, where SAM has the smaller test error",
            ),
            Evidence(
                "late_mnist1d",
                "an-earlier-switch-generalizes-better",
                "for",
                "share of pairs of switching times whose earlier one, which is flatter, errs less",
            ),
            Evidence(
                "late_images",
                "an-earlier-switch-generalizes-better-in-steps",
                "for",
                "the same on all of CIFAR-10, with a rate that falls in steps",
                scale="fast",
            ),
            Evidence(
                "late_images",
                "early-half-saves-in-steps",
                "against",
                "a tenth of CIFAR-10: test error that SAM in the first half saves, where it ends "
                "sharper than SGD",
                scale="desktop",
            ),
            Evidence(
                "second_pass",
                "flatter-methods-err-less",
                "for",
                "rank correlation of sharpness and test error over the methods of SAM's family",
                missed="undecided",  # above 0, and below what was asked for
            ),
            Evidence(
                "sharpness_aware",
                "micro-batches-generalise",
                "for",
                "test error that a smaller trace, by perturbing small groups, saves",
            ),
            Evidence(
                "larger_step",
                "sam-generalizes-better-than-larger-step",
                "against",
                "SAM's test error less that of gradient descent which is as flat",
            ),
            Evidence(
                "flattest",
                "flat-generalizes-without-bias",
                "for",
                "XOR without biases: test error of the network that SAM has flattened",
            ),
            Evidence(
                "flattest",
                "bias-errs-more",
                "against",
                "XOR: test error with biases, where SAM ends flatter, less that without",
            ),
            Evidence(
                "diagonal",
                "one-example-beats-descent",
                "for",
                "diagonal networks: draws in which SAM for each example errs less",
            ),
            Evidence(
                "factorisation",
                "flat-recovers-low-rank",
                "for",
                "matrices of rank 1: error of the flat fit over that of gradient descent",
            ),
            Evidence(
                "factorisation",
                "full-rank-is-not-recovered",
                "against",
                "matrices of full rank: error of the flat fit over the norm of the matrix",
            ),
            Evidence(
                "measures",
                "sharpness-ranks-errors",
                "for",
                "a grid at equal training loss: Kendall's coefficient of sharpness and test error",
            ),
            Evidence(
                "measures",
                "granulated-sharpness",
                "for",
                "the same where one hyper-parameter alone is changed",
            ),
            Evidence(
                "measures",
                "across-radii",
                "for",
                "the same where SAM's radius alone is changed",
            ),
            Evidence(
                "measures",
                "adaptive-ranks-errors",
                "for",
                "the same of adaptive sharpness, over all pairs",
            ),
            Evidence(
                "measures",
                "adaptive-at-nearly-equal-logit-scale",
                "for",
                "the same where networks have nearly one logit scale",
            ),
            Evidence(
                "measures",
                "rescaling-orders-at-will",
                "against",
                "Kendall's coefficient of sharpness and test error, after layers are rescaled",
            ),
            Evidence(
                "averages",
                "sam-beats-average-clean",
                "for",
                "true labels: test error of SGD's average, which is sharper, less SAM's",
            ),
        ),
    ),
    Explanation(
        "Noise",
        "Noise would do: a perturbation in a random direction, or random labels.",
        (
            Evidence(
                "sharpness_aware",
                "noise-does-nothing",
                "against",
                "sharpness with random perturbations as long as SAM's, over SGD's",
            ),
            Evidence(
                "sharpness_aware",
                "noise-does-not-reach-it",
                "against",
                "sharpness with random perturbations ten times as long, over SAM's",
            ),
            Evidence(
                "second_pass",
                "sam-beats-noise",
                "against",
                "test error with random perturbations less SAM's, at equal passes",
            ),
            Evidence(
                "label_noise",
                "label-noise-flattens",
                "for",
                "share of the trace that gradient descent with noise on the labels takes away",
            ),
            Evidence(
                "language",
                "sam-beats-noise-on-text",
                "against",
                "a language model: test loss with random perturbations less SAM's",
            ),
        ),
    ),
    Explanation(
        "Balanced features",
        "SAM holds back what is learnt well and leaves room for what is hard.",
        (
            Evidence(
                "features",
                "sam-finds-the-hard-part-ten",
                "for",
                "ten classes: probe error of the hard part that SAM saves",
            ),
            Evidence(
                "features",
                "sam-finds-the-hard-part-two",
                "for",
                "the same with two classes",
            ),
            Evidence(
                "features",
                "sam-finds-the-hard-part-pixel",
                "for",
                "the same beside a single pixel",
            ),
            Evidence(
                "features",
                "sam-suppresses-the-easy-part-ten",
                "for",
                "ten classes: probe error of the easy part, SAM's less SGD's",
            ),
            Evidence(
                "features",
                "weights-more-even-ten",
                "for",
                "ten classes: Gini coefficient of the importance weights, at w + ε less at w",
            ),
            Evidence(
                "features",
                "weights-more-even-two",
                "for",
                "the same with two classes",
            ),
            Evidence(
                "features",
                "weights-alone-find-the-hard-part-ten",
                "for",
                "ten classes: probe error that SGD with SAM's importance weights saves",
            ),
            Evidence(
                "features",
                "sam-is-a-longer-step-ten",
                "against",
                "ten classes: probe error of the hard part, with a step as long less SAM's",
            ),
        ),
    ),
    Explanation(
        "Logit scale",
        "SAM keeps the logits small, and probabilities that are less sure cost less loss.",
        (
            Evidence(
                "measures",
                "temperature-explains-gain",
                "for",
                "share of SAM's gain in test loss that is left at each network's best temperature",
            ),
            Evidence(
                "measures",
                "sam-errs-less-at-equal-training-loss",
                "against",
                "test error that SAM saves, which no temperature changes",
            ),
            Evidence(
                "measures",
                "sharpness-beats-logit-scale",
                "against",
                "Kendall's coefficient with the test error: sharpness's less the temperature's",
            ),
            Evidence(
                "measures",
                "adaptive-beats-logit-scale",
                "against",
                "Kendall's coefficient: adaptive sharpness's less the temperature's",
            ),
        ),
    ),
    Explanation(
        "Early stopping",
        "SAM fits more slowly, and stopping SGD early would do the same.",
        (
            Evidence(
                "sharpness_aware",
                "sam-trains-slower",
                "for",
                "SAM's training loss over SGD's after as many epochs",
            ),
            Evidence(
                "second_pass",
                "sam-beats-early-stopping",
                "against",
                "test error of SGD that stops early less SAM's, labels in part redrawn",
            ),
            Evidence(
                "sharpness_aware",
                "flatter-at-equal-loss",
                "against",
                "SAM's sharpness over SGD's at equal training loss",
            ),
            Evidence(
                "late_mnist1d",
                "late-sam-before-a-drop-generalizes",
                "against",
                "test error that SAM saves which comes after three quarters of the epochs",
            ),
            Evidence(
                "measures",
                "sam-errs-less-at-equal-training-loss",
                "against",
                "test error that SAM saves where it and SGD stop at one training loss",
            ),
            Evidence(
                "ridge",
                "best-stopping-levels-them",
                "for",
                "least squares, each stopped at its best step: SAM's error over gradient descent's",
            ),
            Evidence(
                "language",
                "sam-beats-early-stopping-on-text",
                "against",
                "a language model: test loss of SGD that stops early less SAM's",
            ),
        ),
    ),
    Explanation(
        "Schedule",
        "What SAM does, a larger learning rate or another schedule does too.",
        (
            Evidence(
                "larger_step",
                "larger-step-is-as-flat",
                "for",
                "SAM's sharpness over that of gradient descent with a larger rate, at equal loss",
            ),
            Evidence(
                "late_mnist1d",
                "learning-rate-is-the-clock",
                "for",
                "sharpness after late SAM under other schedules, over that with the same sum of "
                "rates",
            ),
            Evidence(
                "second_pass",
                "sam-beats-sgd",
                "against",
                "test error of SGD with a tuned learning rate less SAM's, at equal passes",
            ),
            Evidence(
                "late_mnist1d",
                "sam-generalizes-better-in-steps",
                "against",
                "test error that SAM saves with a rate that falls in steps",
            ),
            Evidence(
                "late_images",
                "sam-generalizes-better-in-steps",
                "against",
                "the same on a tenth of CIFAR-10",
                scale="desktop",
            ),
            Evidence(
                "late_images",
                "sam-generalizes-better-in-steps",
                "against",
                "the same on all of CIFAR-10",
                scale="fast",
            ),
            Evidence(
                "averages",
                "sam-beats-average",
                "against",
                "test error of the average of SGD's weights less SAM's, at a constant rate",
            ),
            Evidence(
                "averages",
                "sam-beats-decayed-average",
                "against",
                "the same with a rate that falls along half a cosine",
            ),
            Evidence(
                "language",
                "sam-beats-sgd-at-equal-passes",
                "against",
                "a language model: test loss of tuned SGD less SAM's, at equal passes",
            ),
        ),
    ),
)
"""Explanations of SAM's success, in the order of the book."""
