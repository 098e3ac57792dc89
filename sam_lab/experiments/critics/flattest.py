r"""The flattest network is not the best: XOR of two inputs, with and without a bias.

Inputs $x$ are drawn from $\{-1, 1\}^d$, and the label is $y = x_1 x_2$. Wen, Li & Ma 2023
(arXiv:2307.11007) ask of two-layer ReLU networks whether flatness, by the trace of the Hessian,
goes with generalisation, and find that it depends on the architecture. Here are three networks of
$m$ hidden neurons, $z_j = w_j \cdot x + b_j$, $h_j = \max(z_j, 0)$, half the squared error:

- ``no_bias``: $f = a \cdot h$ with $b = 0$;
- ``bias``: $f = a \cdot h$;
- ``normed``: $f = a \cdot h / \max(\|h\|, 1)$, with biases. This simplified normalisation is ours.

**How flat a fit can be (derived here).** The outputs of the first two are linear in each single
weight, so the trace of the Hessian is that of the Gauss-Newton matrix at any weights,

$$\operatorname{tr} H = \frac1n \sum_i \sum_{j:\, z_{ij} > 0} \left(z_{ij}^2 + D a_j^2\right)
  \;\ge\; \frac{2\sqrt D}{n} \sum_i |f(x_i)|,$$

with $D = d$, or $d + 1$ where there is a bias. A fit of labels $\pm 1$ has at least $2\sqrt D$.
There is equality where each neuron that fires has $z = \sqrt D\,|a|$ and the label's sign. Four
neurons that fire on $x_1 = x_2 = \pm1$ and $x_1 = -x_2 = \pm1$ do that: *the rule*. With a bias
another network does it too: $w_j \propto x_j$, $b_j \propto -(d - 1)$ fires on the training
example $j$ alone: *the memoriser*, which is 0 everywhere else. For the normed network the smallest
trace is 1, and again both reach it. A neuron without a bias cannot fire on one of many examples
alone.

**What is run.** Gradient descent fits the labels. From there go three methods, with batches of one
example: SGD, SAM (its perturbation is that of the example's own loss) and SGD with noise
$\pm\sigma$ on the label. Before each measurement a copy goes on by plain gradient descent until its
training loss is `level` or less, so that the traces are compared at an equal training loss. The
test error is that on other examples; an output of 0 counts as half an error.

Sizes, learning rates, radius and noise were chosen, and the criteria of the claims so marked were
set, after runs with a few draws that are none of the seeds. The claim that the network with biases
errs more was added after the run of all seeds, where one of five did learn. All in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam_lab._checks import check_integer
from sam_lab.experiments.critics import from_a_fit
from sam_lab.experiments.critics.from_a_fit import METHODS
from sam_lab.experiments.lab.claims import CONTROL, OURS, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment, Studies, Study
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import farthest_from_one

__all__ = ["KINDS", "METHODS", "Config", "Net", "draw", "error", "memoriser", "rule"]

Floats = NDArray[np.float64]
KINDS = ("no_bias", "bias", "normed")
"""Two-layer ReLU networks: without biases, with biases, and with both these and a normalisation."""


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        inputs, easier: how many inputs an example has, and in the task that is easier.
        examples, width: of training, and hidden neurons; at least as many neurons as examples.
        lr, lr_normed: learning rates of what follows the fit; the last of the ``normed`` network.
        rho, noise: radius of SAM, and size of the noise on the labels.
        steps, every: steps after the fit, and from one measurement to the next.
        fit_lr, fit_lr_normed: learning rates of gradient descent, which fits the labels.
        level: the training loss to which it does.
        unseen: how many examples the test error is taken on.
        by_hand: numbers of inputs for which the networks are written down.
    """

    inputs: int = 30
    easier: int = 20
    examples: int = 100
    width: int = 100
    lr: float = 0.01
    lr_normed: float = 0.05
    rho: float = 0.2
    noise: float = 2.0
    steps: int = 20_000
    every: int = 4000
    fit_lr: float = 0.1
    fit_lr_normed: float = 0.5
    level: float = 1e-4
    unseen: int = 2000
    by_hand: tuple[int, ...] = (20, 40, 80, 160)


LAPTOP = Config()
PAPER = Config(
    width=500,
    lr=0.003,
    rho=0.1,
    noise=1.0,
    steps=500_000,
    every=50_000,
    fit_lr=0.02,
    unseen=20_000,
)

FIT_STEPS = 100_000  # at most
REST = 1e-12  # the training loss at which SGD is over: its gradient moves nothing any more


@dataclass(frozen=True)
class Net:
    """A two-layer ReLU network as functions of one vector of weights: w, then a, then b.

    Args:
        kind: one of `KINDS`.
        inputs, width: how many inputs and hidden neurons, d and m.

    Raises:
        ValueError: another kind, or a size below 1.
    """

    kind: str
    inputs: int
    width: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        check_integer("inputs", self.inputs, 1)
        check_integer("width", self.width, 1)

    @property
    def reach(self) -> int:
        """D: the squared length of an example, that of the bias' input included."""
        return self.inputs + (self.kind != "no_bias")

    @property
    def floor(self) -> float:
        """The smallest trace of the Hessian that a fit of labels of size 1 can have."""
        return 1.0 if self.kind == "normed" else 2 * math.sqrt(self.reach)

    def pack(self, w: Floats, a: Floats, b: Floats) -> Floats:
        """The vector of weights w (m, d), a (m,), b (m,); b is left out where there is none."""
        return np.concatenate([w.ravel(), a] if self.kind == "no_bias" else [w.ravel(), a, b])

    def start(self, rng: np.random.Generator) -> Floats:
        """Gaussian weights of variance 1/d and 1/m, and no bias."""
        w = rng.standard_normal((self.width, self.inputs)) / math.sqrt(self.inputs)
        a = rng.standard_normal(self.width) / math.sqrt(self.width)
        return self.pack(w, a, np.zeros(self.width))

    def outputs(self, weights: Floats, x: Floats) -> Floats:
        """f for the examples (n, d), (n,)."""
        return self._forward(weights, x)[0]

    def loss(self, weights: Floats, x: Floats, y: Floats) -> float:
        """Half the mean squared error."""
        return float(np.square(self.outputs(weights, x) - y).mean() / 2)

    def gradient(self, weights: Floats, x: Floats, y: Floats) -> Floats:
        """The gradient of `loss` in the weights."""
        f, features, slopes = self._forward(weights, x)
        residual = (f - y) / len(x)
        back = residual[:, None] * slopes
        return self.pack(back.T @ x, residual @ features, back.sum(0))

    def trace(self, weights: Floats, x: Floats) -> float:
        """Trace of the Gauss-Newton matrix: of the Hessian, if ``normed`` only where f fits."""
        _, features, slopes = self._forward(weights, x)
        return float((np.square(features).sum(1) + self.reach * np.square(slopes).sum(1)).mean())

    def _forward(self, weights: Floats, x: Floats) -> tuple[Floats, Floats, Floats]:
        """f (n,), and its derivatives in a and in z, (n, m) each."""
        m, split = self.width, self.width * self.inputs
        a = weights[split : split + m]
        z = x @ weights[:split].reshape(m, self.inputs).T
        if self.kind != "no_bias":
            z += weights[split + m :]
        h = np.maximum(z, 0)
        if self.kind != "normed":
            return h @ a, h, a * (z > 0)
        length = np.sqrt(np.square(h).sum(1, keepdims=True))
        size = np.maximum(length, 1)
        features = h / size
        f: Floats = features @ a
        along = np.where(length > 1, f[:, None] * features, 0)
        return f, features, (a - along) / size * (z > 0)


def draw(examples: int, inputs: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Examples (n, d) of +1 and -1, no two the same, and the product of their first two inputs.

    Raises:
        ValueError: fewer than two inputs, or more than half of all 2^d examples.
    """
    check_integer("inputs", inputs, 2)
    check_integer("examples", examples, 1, 2 ** (inputs - 1))
    x = np.empty((0, inputs))
    while len(x) < examples:
        x = np.unique(np.concatenate([x, rng.choice([-1.0, 1.0], (examples, inputs))]), axis=0)
    x = x[rng.permutation(len(x))[:examples]]
    return x, x[:, 0] * x[:, 1]


def error(outputs: Floats, y: Floats) -> float:
    """Share of outputs of the wrong sign, in %; an output of 0 counts as half."""
    return float(50 * (1 - np.sign(outputs) * np.sign(y)).mean())


def rule(net: Net) -> Floats:
    """Weights by hand that are x1 x2 everywhere, as flat as a fit can be.

    Raises:
        ValueError: fewer than two inputs, or fewer than four neurons.
    """
    if net.inputs < 2 or net.width < 4:
        raise ValueError(f"the rule needs two inputs and four neurons, got {net}")
    w, a, b = _blank(net)
    w[:4, :2] = np.array([[1, 1], [-1, -1], [1, -1], [-1, 1]]) / 2
    a[:4] = 1, 1, -1, -1
    return _balanced(net, w, a, b)


def memoriser(net: Net, x: Floats, y: Floats) -> Floats:
    """Weights by hand that are y on the examples and 0 everywhere else, as flat as a fit can be.

    Args:
        net: of any kind with a bias.
        x, y: (n, d) of +1 and -1, no two the same, and labels of size 1, (n,).

    Raises:
        ValueError: a network without a bias, with fewer neurons than examples, or an example twice.
    """
    if net.kind == "no_bias":
        raise ValueError("net must have a bias to fire on one example alone, got kind 'no_bias'")
    if net.width < len(x):
        raise ValueError(f"net must have a neuron for each of {len(x)} examples, got {net.width}")
    if len(np.unique(x, axis=0)) < len(x):
        raise ValueError("the examples x must differ, got one of them twice")
    w, a, b = _blank(net)
    w[: len(x)], a[: len(x)], b[: len(x)] = x, y, 1 - net.inputs
    return _balanced(net, w, a, b)


def _blank(net: Net) -> tuple[Floats, Floats, Floats]:
    return np.zeros((net.width, net.inputs)), np.zeros(net.width), np.zeros(net.width)


def _balanced(net: Net, w: Floats, a: Floats, b: Floats) -> Floats:
    """Neurons with z = 1 where they fire, scaled so that z² = D a²; if normed, so that z > 1."""
    scale = 2.0 if net.kind == "normed" else net.reach**0.25
    return net.pack(scale * w, a if net.kind == "normed" else a / scale, scale * b)


# --- what is run ---------------------------------------------------------------------------------


def _problem(
    config: Config, inputs: int, rng: np.random.Generator
) -> tuple[Floats, Floats, Floats, Floats]:
    """Examples and labels for training, and others that are none of these."""
    n = config.examples
    x, y = draw(n + config.unseen, inputs, rng)
    return x[:n], y[:n], x[n:], y[n:]


def _by_hand_settings(config: Config) -> list[Setting]:
    return [{"net": net, "inputs": inputs} for net in KINDS for inputs in config.by_hand]


def _by_hand(config: Config, cell: Cell) -> Columns:
    """The rule, and the memoriser where there is a bias: trace, smallest trace, errors in %."""
    rng = np.random.default_rng([cell.seed, 0])
    x, y, unseen, truth = _problem(config, cell["inputs"], rng)
    net = Net(cell["net"], cell["inputs"], config.width)
    rows = Rows()
    made = {"rule": rule(net)}
    if net.kind != "no_bias":
        made["memoriser"] = memoriser(net, x, y)
    for weights in made.values():
        rows.add(
            trace=net.trace(weights, x),
            floor=net.floor,
            loss=net.loss(weights, x, y),
            test_error=error(net.outputs(weights, unseen), truth),
        )
    return rows.columns


def _train_settings(config: Config) -> list[Setting]:
    def one(net: str, method: str, **other: object) -> Setting:
        base = {"inputs": config.inputs, "labels": "xor", "start": "fit"}
        return {"net": net, "method": method, **base, **other}

    return [
        *(one(net, method) for net in KINDS for method in METHODS),
        *(one(net, "sam", labels="random") for net in ("no_bias", "bias")),
        *(one(net, "sam", inputs=config.easier) for net in ("no_bias", "bias")),
        one("bias", "sam", start="memoriser"),
    ]


def _train(config: Config, cell: Cell) -> Columns:
    """One method from its start; all measured after gradient descent to a loss of `level`.

    Columns, at the steps in ``step``: ``trace``, ``loss`` and ``test_error`` in % of the copy that
    went on by gradient descent, and ``loss_before``, that of the weights themselves. SGD ends
    early where that is `REST` or less.

    Raises:
        FloatingPointError: a run has diverged, or gradient descent has not reached `level`.
    """
    inputs = cell["inputs"]
    rng = np.random.default_rng([cell.seed, 1])
    x, y, unseen, truth = _problem(config, inputs, rng)
    if cell["labels"] == "random":
        y = rng.choice([-1.0, 1.0], len(y))
    net = Net(cell["net"], inputs, config.width)
    fit_lr = config.fit_lr_normed if net.kind == "normed" else config.fit_lr
    weights = net.start(rng)
    if cell["start"] == "memoriser":
        weights = memoriser(net, x, y)

    def fitted(weights: Floats) -> Floats:
        return from_a_fit.fitted(
            weights,
            lambda w: net.loss(w, x, y),
            lambda w: net.gradient(w, x, y),
            fit_lr,
            config.level,
            FIT_STEPS,
        )

    weights = fitted(weights)
    rng = np.random.default_rng([cell.seed, 2])
    rows = Rows()
    for at in range(config.steps + 1):
        if at % config.every == 0:
            copy = fitted(weights)
            rows.add(
                step=at,
                trace=net.trace(copy, x),
                loss=net.loss(copy, x, y),
                loss_before=net.loss(weights, x, y),
                test_error=error(net.outputs(copy, unseen), truth),
            )
            cell.tick(at, config.steps)
            if cell["method"] == "sgd" and rows.columns["loss_before"][-1] <= REST:
                break
        if at < config.steps:
            i = rng.integers(len(x), size=1)
            weights = _step(cell["method"], net, weights, x[i], y[i], config, rng)
    return rows.columns


def _step(
    method: str,
    net: Net,
    weights: Floats,
    x: Floats,
    y: Floats,
    config: Config,
    rng: np.random.Generator,
) -> Floats:
    """A step on one example."""
    lr = config.lr_normed if net.kind == "normed" else config.lr
    return from_a_fit.step(
        method,
        weights,
        lambda w, labels: net.gradient(w, x, labels),
        y,
        lr,
        config.rho,
        config.noise,
        rng,
    )


STUDIES = Studies(
    Study("train", _train_settings, _train),
    Study("by_hand", _by_hand_settings, _by_hand),
)


# --- what a run says -----------------------------------------------------------------------------


def _of(runs: SeedRuns, net: str, method: str = "sam", **other: object) -> Run:
    """The run of this network and method; of the main task, unless told otherwise."""
    base = {"inputs": runs.config["inputs"], "labels": "xor", "start": "fit"}
    return runs.one(study="train", net=net, method=method, **{**base, **other})


def _end(run: Run, name: str) -> float:
    return float(run[name][-1])


def _kept(run: Run) -> float:
    """The last trace over that of the fit of gradient descent."""
    return _end(run, "trace") / float(run["trace"][0])


def _above(runs: SeedRuns, which: int) -> list[float]:
    """Traces over the smallest of all networks by hand: of the rule (0), the memoriser (1)."""
    return [
        float(run["trace"][which] / run["floor"][which])
        for run in runs.all(study="by_hand")
        if len(run["trace"]) > which
    ]


# --- what the runs decide ------------------------------------------------------------------------

# Its abstract: flatness and generalisation depend on architecture and data; three scenarios.
WEN = Source("Wen, Li & Ma 2023", "after")


@claim(OURS, 0.999, 1.001, headline=True)
def memoriser_is_flattest(runs: SeedRuns) -> float:
    """A network with biases, written down by hand, that knows the training examples and is 0
    everywhere else has the smallest trace that a fit can have, however many inputs there are, with
    and without the normalisation: its trace over the smallest, where it is farthest from 1"""
    return farthest_from_one(_above(runs, 1))


@claim(OURS, 0.999, 1.001)
def rule_is_flattest(runs: SeedRuns) -> float:
    """A network written down by hand that is right everywhere has the smallest trace that a fit can
    have, however many inputs there are, in all three architectures: its trace over the smallest,
    where it is farthest from 1"""
    return farthest_from_one(_above(runs, 0))


@claim(WEN, high=0.5, domain="positive", set_after=True)
def sam_flattens(runs: SeedRuns) -> float:
    """SAM with batches of one example at least halves the trace of the fit that gradient descent
    found, at equal training loss: trace after over before, the largest of the three networks"""
    return max(_kept(_of(runs, net)) for net in KINDS)


@claim(WEN, high=0.5, domain="positive", set_after=True)
def label_noise_flattens(runs: SeedRuns) -> float:
    """SGD with batches of one example and noise on the labels at least halves the trace of the fit
    that gradient descent found, at equal training loss: trace after over before, the largest of the
    three networks"""
    return max(_kept(_of(runs, net, "label_noise")) for net in KINDS)


@claim(CONTROL, 0.95, 1.05, domain="positive")
def sgd_does_not_flatten(runs: SeedRuns) -> float:
    """SGD with batches of one example, without perturbation and without noise on the labels, keeps
    the trace of the fit that gradient descent found: trace after over before, of the three networks
    the one farthest from 1"""
    return farthest_from_one(_kept(_of(runs, net, "sgd")) for net in KINDS)


@claim(CONTROL, low=25.0, unit="%", domain="share", set_after=True)
def descent_does_not_generalize(runs: SeedRuns) -> float:
    """The fit that gradient descent finds does not generalise: its test error, the smallest of the
    three networks"""
    return min(float(_of(runs, net)["test_error"][0]) for net in KINDS)


@claim(WEN, high=5.0, unit="%", domain="share", headline=True, set_after=True)
def flat_generalizes_without_bias(runs: SeedRuns) -> float:
    """Without biases the network that SAM has flattened generalises: its test error"""
    return _end(_of(runs, "no_bias"), "test_error")


@claim(WEN, low=10.0, unit="%", domain="share", set_after=True)
def flat_errs_with_bias(runs: SeedRuns) -> float:
    """With biases the network that SAM has flattened does not generalise: its test error"""
    return _end(_of(runs, "bias"), "test_error")


@claim(OURS, low=0.0, unit="points", headline=True, set_after=True)
def bias_errs_more(runs: SeedRuns) -> float:
    """After SAM the network with biases has a larger test error than the network without: its test
    error less that of the network without, at equal training loss"""
    with_bias, without = (_end(_of(runs, net), "test_error") for net in ("bias", "no_bias"))
    return with_bias - without


@claim(OURS, high=1.0, domain="positive", headline=True, set_after=True)
def bias_is_flatter(runs: SeedRuns) -> float:
    """After SAM the network with biases is flatter than the network without: its trace over that of
    the network without, at equal training loss"""
    return _end(_of(runs, "bias"), "trace") / _end(_of(runs, "no_bias"), "trace")


@claim(OURS, high=5.0, unit="%", domain="share", set_after=True)
def easier_task_is_learnt_with_bias(runs: SeedRuns) -> float:
    """With biases and fewer inputs, and thus more examples for each, the network that SAM has
    flattened generalises, although the memoriser is as flat as before: its test error"""
    easier = runs.config["easier"]
    return _end(_of(runs, "bias", inputs=easier), "test_error")


@claim(WEN, high=5.0, unit="%", domain="share", set_after=True)
def flat_generalizes_normed(runs: SeedRuns) -> float:
    """With the simplified normalisation the network that SAM has flattened generalises, although
    its memoriser has the smallest trace: its test error"""
    return _end(_of(runs, "normed"), "test_error")


@claim(OURS, low=45.0, unit="%", domain="share")
def sam_stays_with_the_memoriser(runs: SeedRuns) -> float:
    """From the memoriser written down by hand SAM does not find a network that generalises: test
    error after as many steps as from the fit of gradient descent"""
    return _end(_of(runs, "bias", start="memoriser"), "test_error")


@claim(OURS, high=1.2, domain="positive")
def random_labels_are_as_flat_with_bias(runs: SeedRuns) -> float:
    """With biases SAM makes a fit of random labels about as flat as one of the true labels: trace
    with random labels over trace with true ones"""
    random, true = (_of(runs, "bias", labels=labels) for labels in ("random", "xor"))
    return _end(random, "trace") / _end(true, "trace")


@claim(CONTROL, low=1.2, domain="positive", set_after=True)
def random_labels_are_sharper_without_bias(runs: SeedRuns) -> float:
    """Without biases SAM leaves a fit of random labels sharper than one of the true labels: trace
    with random labels over trace with true ones"""
    random, true = (_of(runs, "no_bias", labels=labels) for labels in ("random", "xor"))
    return _end(random, "trace") / _end(true, "trace")


EXPERIMENT = Experiment(
    name="flattest",
    title="The flattest network is not the best: XOR with and without a bias",
    source="after Wen, Li & Ma 2023 (arXiv:2307.11007)",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=STUDIES.settings,
    run=STUDIES.run,
    claims=[
        memoriser_is_flattest,
        rule_is_flattest,
        sam_flattens,
        label_noise_flattens,
        sgd_does_not_flatten,
        descent_does_not_generalize,
        flat_generalizes_without_bias,
        flat_errs_with_bias,
        bias_errs_more,
        bias_is_flatter,
        easier_task_is_learnt_with_bias,
        flat_generalizes_normed,
        sam_stays_with_the_memoriser,
        random_labels_are_as_flat_with_bias,
        random_labels_are_sharper_without_bias,
    ],
)
