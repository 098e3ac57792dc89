"""What following the sharpness costs, on problems that nobody chose.

A seed that is drawn when the benchmark starts draws the problems: the network (fully connected,
convolutional with layer norm, a small Transformer, a wide ResNet with batch norm), its depth, width
and activation, the data, the loss and the learning rate; torchvision's ResNet-18, with batch norm,
sees eight digits of 64 x 64 and takes fewer steps, with k = 1 alone (needs torchvision). Each is
trained by full-batch gradient descent and measured by `SharpnessTracker` before every step, from
the first one on. The seed stands in the result; `measure` with the same seed draws the same
problems.

The table has one row for each kind of network, number k of eigenvalues and regime, *before the
edge* and *at the edge* (from the step on at which the sharpness first reaches 2/lr), and rows over
all networks: median, mean and 90th percentile of Hessian-vector products a measurement, audits
apart; the first measurement, which is cold, is left out. The error is that of the eigenvalues
against Lanczos from another random start to a residual of 1e-4 (ResNet-18: 1e-3), relative to the
largest one, at every few steps; `error_within` is the share of these comparisons with an error of
at most 2%.

Two columns say what could be reached. `turned` is the angle from the first eigenvector of the last
measurement or of the one before it, whichever is nearer. `fewest` (k = 1, at the steps with a
comparison) starts from the nearer of those two vectors and counts the products until *some* vector
in the span of all that they give has a residual of 1% at the top eigenvalue. Nothing that starts
from that vector and knows the Hessian by its products alone can need fewer; a better start can.
"""

import math
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common import Benchmark, quiet, say, version_of
from sam_lab import Hessian, SharpnessTracker, _optional, data, models, text
from sam_lab.eigensolvers import lanczos

KINDS = ("mlp", "cnn", "transformer", "resnet", "resnet18")
REGIMES = ("before the edge", "at the edge")


@dataclass(frozen=True)
class Config:
    """How large the benchmark is.

    Attributes:
        seed: draws the problems.
        mlps, cnns, transformers, resnets, resnet18s: how many of each kind.
        steps: steps of gradient descent, each with a measurement.
        resnet18_steps: the same for ResNet-18, whose steps are dear.
        truth_every: steps from one comparison with the truth to the next.
        ks: numbers of eigenvalues.
        examples: most examples of a problem.
    """

    seed: int = field(default_factory=lambda: secrets.randbits(32))
    mlps: int = 6
    cnns: int = 2
    transformers: int = 2
    resnets: int = 1
    resnet18s: int = 1
    steps: int = 60
    resnet18_steps: int = 12
    truth_every: int = 10
    ks: tuple[int, ...] = (1, 5)
    examples: int = 100


QUICK = Config(
    seed=0,
    mlps=1,
    cnns=1,
    transformers=1,
    resnets=1,
    resnet18s=0,
    steps=6,
    truth_every=3,
    examples=20,
)
"""Seconds instead of minutes; shows that everything runs, not what it costs."""


@dataclass
class Problem:
    """A network, its loss on all the data, and the learning rate it is trained with."""

    kind: str
    about: str
    lr: float
    model: nn.Module
    closure: Callable[[], Tensor]

    def step(self) -> None:
        params = list(self.model.parameters())
        gradient = torch.autograd.grad(self.closure(), params)
        with torch.no_grad():
            for p, g in zip(params, gradient, strict=True):
                p.sub_(g, alpha=self.lr)


def resnet18(seed: int) -> nn.Module:
    """torchvision's, with ten classes."""
    make = _optional.torchvision().models.resnet18
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: nn.Module = make(num_classes=10)
    return model


def draw(kind: str, seed: int, examples: int) -> Problem:
    """The problem that this seed draws."""
    chance = random.Random(f"{kind} {seed}")
    lr = round(0.02 * 25 ** chance.random(), 4)  # log-uniform from .02 to .5
    depth = chance.randint(2, 4)
    width = round(32 * 8 ** chance.random())  # log-uniform from 32 to 256
    activation = chance.choice(["tanh", "gelu", "relu"])
    if kind == "transformer":
        width, length = 32, 16
        generator = torch.Generator().manual_seed(seed)
        tokens = text.load().tokens
        model = models.transformer(text.VOCAB, width, depth - 1, 4, length, seed=seed)
        x, y = text.windows(tokens, length, max(4, examples // 8), generator)
        about = f"python_reference, {depth - 1} layers of {width}"

        def token_loss() -> Tensor:
            loss: Tensor = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
            return loss

        return Problem(kind, f"{about}, CE, lr {lr}", lr, model, token_loss)
    if kind == "resnet18":
        images = data.load("digits", train=8, seed=seed)
        x = functional.interpolate((images.x - images.x.mean()) / images.x.std(), (64, 64))
        x, labels, net = x.expand(-1, 3, -1, -1).contiguous(), images.y, resnet18(seed)

        def loss_of_eight() -> Tensor:
            value: Tensor = functional.cross_entropy(net(x), labels)
            return value

        return Problem(kind, f"digits, ResNet-18, relu, CE, lr {lr}", lr, net, loss_of_eight)
    name = chance.choice({"mlp": ["digits", "mnist_5k", "mnist1d"]}.get(kind, ["digits"]))
    loss = chance.choice(["CE", "MSE"])
    images = data.load(name, train=examples, seed=seed)
    x, labels = images.x, images.y
    x = (x - x.mean()) / x.std()
    if kind == "mlp":
        sizes = (x[0].numel(), *[width] * (depth - 1), 10)
        model, about = models.mlp(sizes, activation, seed=seed), f"{depth} layers of {width}"
    elif kind == "cnn":
        widths = (max(4, width // 8), max(8, width // 4))
        pooling = chance.choice(["avg", "max"])
        model = models.cnn(
            tuple(x.shape[1:]), 10, activation, widths=widths, pooling=pooling, norm="layer",
            seed=seed,
        )  # fmt: skip
        about = f"widths {widths}, {pooling} pooling"
    else:
        model = models.wide_resnet(10, 1, tuple(x.shape[1:]), stride=2, seed=seed)
        activation, about = "relu", "WRN-10-1"
    targets = data.one_hot(labels, 10)

    def loss_of_images() -> Tensor:
        outputs = model(x)
        if loss == "CE":
            value: Tensor = functional.cross_entropy(outputs, labels)
            return value
        squares: Tensor = (outputs - targets).square().sum(1)
        return 0.5 * squares.mean()

    return Problem(
        kind, f"{name}, {about}, {activation}, {loss}, lr {lr}", lr, model, loss_of_images
    )


def degrees(one: Tensor, other: Tensor) -> float:
    """The angle between the lines along two unit vectors, from 0 to 90."""
    cosine = min(1.0, abs(float(one.double() @ other.double())))
    return math.degrees(math.acos(cosine))


def fewest_products(operator: Hessian, start: Tensor, top: float, tol: float) -> int:
    """Products from `start` until a vector in the span they give has a residual of tol * top.

    With the Lanczos basis V of m products, H V = V' T for a basis V' of one vector more, and the
    least residual at a value t is the smallest singular value of T - t (1, 0)^T: taken over values
    t within tol of the top eigenvalue.
    """
    rows = lanczos(lambda v: (operator @ v.T).T, lambda _: start[None])
    for krylov in rows:
        m = len(krylov.alpha)
        projected = np.zeros((m + 1, m))
        projected[:m] = np.diag(krylov.alpha) + np.diag(krylov.beta[:-1], 1)
        projected[1:] += np.diag(krylov.beta)
        least = min(
            np.linalg.svd(projected - value * np.eye(m + 1, m), compute_uv=False)[-1]
            for value in top * np.linspace(1 - tol, 1 + tol, 21)
        )
        if least <= tol * abs(top) or krylov.closed:
            break
    return m


def follow(problem: Problem, k: int, config: Config) -> list[dict[str, Any]]:
    """One row a measurement, until the steps are made or the run diverges."""
    model = problem.model
    params = list(model.parameters())
    tracker = SharpnessTracker(problem.closure, params, k=k, model=model)
    reached = False
    rows: list[dict[str, Any]] = []
    seen: list[Tensor] = []  # the first eigenvectors of the last two measurements
    long = problem.kind == "resnet18"  # its vectors, of 45 MB each
    for number in range(config.resnet18_steps if long else config.steps):
        audits = tracker.audit_hvps
        try:
            start = time.process_time()
            pairs = tracker.measure()
            spent = time.process_time() - start
        except FloatingPointError:
            break
        audits = tracker.audit_hvps - audits
        top = float(pairs.values[0])
        reached = reached or top >= 2 / problem.lr
        error = fewest = None
        top_vector = pairs.vectors[:, 0]
        near = max(seen, key=lambda v: abs(float(v @ top_vector)), default=top_vector)
        if number and number % config.truth_every == 0:
            judge = Hessian(problem.closure, params, model)
            exact = judge.top(k, tol=1e-3 if long else 1e-4, seed=10_000 + number, max_hvps=400)
            if exact.converged:
                scale = abs(float(exact.values[0]))
                error = float((pairs.values - exact.values).abs().max()) / scale
                if k == 1:
                    fewest = fewest_products(judge, near, float(exact.values[0]), tracker.tol)
        if number:  # the first one is cold
            rows.append(
                {
                    "kind": problem.kind,
                    "k": k,
                    "regime": REGIMES[reached],
                    "hvps": pairs.hvps - audits,
                    "audits": audits,
                    "seconds": spent,
                    "residual": float(pairs.residuals.max()) / abs(top),
                    "error": error,
                    "turned": degrees(near, top_vector),
                    "fewest": fewest,
                }
            )
        seen = [*seen[-1:], top_vector]
        problem.step()
    return rows


def summary(kind: str, k: int, regime: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table."""
    hvps = np.array([row["hvps"] for row in rows])
    errors = np.array([row["error"] for row in rows if row["error"] is not None])
    fewest = [row["fewest"] for row in rows if row["fewest"] is not None]
    return {
        "kind": kind,
        "k": k,
        "regime": regime,
        "measurements": len(rows),
        "median": float(np.median(hvps)),
        "mean": float(hvps.mean()),
        "p90": float(np.quantile(hvps, 0.9)),
        "most": int(hvps.max()),
        "audits": float(np.mean([row["audits"] for row in rows])),
        "residual_within": float(np.mean([row["residual"] <= 0.01 for row in rows])),
        "comparisons": len(errors),
        "error_median": float(np.median(errors)) if len(errors) else None,
        "error_within": float(np.mean(errors <= 0.02)) if len(errors) else None,
        "turned": float(np.median([row["turned"] for row in rows])),
        "fewest": float(np.median(fewest)) if fewest else None,
    }


def run(config: Config) -> dict[str, Any]:
    """All problems, followed with each k."""
    counts = (config.mlps, config.cnns, config.transformers, config.resnets, config.resnet18s)
    kinds = [kind for kind, count in zip(KINDS, counts, strict=True) for _ in range(count)]
    if not version_of("torchvision"):
        kinds = [kind for kind in kinds if kind != "resnet18"]
    problems, rows = [], []
    for i, kind in enumerate(kinds):
        for k in config.ks if kind != "resnet18" else (1,):
            problem = draw(kind, config.seed + i, config.examples)
            say(f"{kind}, k = {k}: {problem.about}")
            with quiet():
                steps = follow(problem, k, config)
            rows += steps
            hvps = [row["hvps"] for row in steps]
            problems.append(
                {
                    "kind": kind,
                    "about": problem.about,
                    "k": k,
                    "parameters": sum(p.numel() for p in problem.model.parameters()),
                    "measurements": len(steps),
                    "at_the_edge": sum(row["regime"] == REGIMES[1] for row in steps),
                    "mean": float(np.mean(hvps)) if hvps else None,
                }
            )
    table = []
    for kind in ("all", *KINDS):
        for k in config.ks:
            for regime in REGIMES:
                chosen = [
                    row
                    for row in rows
                    if (row["k"], row["regime"]) == (k, regime) and kind in ("all", row["kind"])
                ]
                if chosen:
                    table.append(summary(kind, k, regime, chosen))
    return {"config": asdict(config), "problems": problems, "tracking": table}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"problems drawn by seed {result['config']['seed']}",
        f"{'HVPs a measurement':38}{'n':>6}{'median':>8}{'mean':>7}{'90%':>6}{'most':>6}"
        f"{'+audits':>9}{'residual<1%':>13}{'error':>9}{'error<2%':>10}"
        f"{'turned':>8}{'fewest':>8}",
    ]
    for row in result["tracking"]:
        name = f"{row['kind']}, k = {row['k']}, {row['regime']}"
        error = "-" if row["error_median"] is None else f"{row['error_median']:.1e}"
        fewest = "-" if row["fewest"] is None else f"{row['fewest']:.1f}"
        within = "-" if row["error_within"] is None else f"{row['error_within']:.1%}"
        lines.append(
            f"{name:38}{row['measurements']:6d}{row['median']:8.1f}{row['mean']:7.2f}"
            f"{row['p90']:6.1f}{row['most']:6d}{row['audits']:9.2f}"
            f"{row['residual_within']:13.1%}{error:>9}{within:>10}"
            f"{row['turned']:7.1f}°{fewest:>8}"
        )
    return "\n".join(lines)


BENCHMARK = Benchmark(
    name="tracker",
    about="the sharpness followed along training, on problems drawn by a seed",
    schema="sam_lab.benchmark.tracker/1",
    measure=lambda quick: run(QUICK if quick else Config()),
    table=table,
    packages=("torchvision",),
)
