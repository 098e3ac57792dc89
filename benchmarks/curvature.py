"""What the largest Hessian eigenvalues cost: sam_lab beside its peers, in one run.

The problem is small and real: scikit-learn's 1,797 digits, each pixel standardised, and fully
connected tanh networks 64-128-128-10 (26,122 parameters) trained by full-batch gradient descent,
with cross-entropy (learning rate 0.4, 300 steps) and with squared error (half the sum over outputs,
mean over examples; 0.15, 400 steps). Three networks for each loss, several random starts for each.

Three tables, each a list of rows:

`products`
    seconds of one Hessian-vector product, in units of one gradient.
`cold`
    the k largest eigenvalues from a random start: Hessian-vector products, seconds, seconds in
    gradients, true error, and the residual the tool itself reports. Seconds begin with the model
    and end with the eigenvalues, so the construction of an operator counts.
`tracking`
    the same along gradient descent, measured at every step: cost of one measurement by
    `SharpnessTracker`, before and after the sharpness first reaches 2/lr.

Products are counted alike for all: calls of the function that multiplies the Hessian by one vector.
Errors and residuals are relative to the largest eigenvalue; the truth comes from scipy's eigsh
in float64 to 1e-10. Seconds are processor seconds on one thread; methods take turns, and each time
is divided by the gradient's time of the same turn, so that the load of the machine cancels as far
as it can. Peers are called in the way that is cheapest for them: curvlinops without its optional
checks of the data.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import Benchmark, quiet, say, seconds, version_of
from sam_lab import Hessian, SharpnessTracker, _optional, data, models


@dataclass(frozen=True)
class Config:
    """How large the benchmark is.

    Attributes:
        examples: how many of the digits.
        hidden: width of the two hidden layers.
        seeds: networks for each loss in `cold`.
        starts: random starts for each network.
        ce_steps, mse_steps: training steps of the two snapshots.
        track_seeds, track_steps: networks, and steps of each, followed in `tracking`.
        track_truth_every: steps between two comparisons with the truth there.
    """

    examples: int = 1797
    hidden: int = 128
    seeds: int = 3
    starts: int = 3
    ce_steps: int = 300
    mse_steps: int = 400
    track_seeds: int = 2
    track_steps: int = 800
    track_truth_every: int = 100


QUICK = Config(
    examples=60,
    hidden=8,
    seeds=1,
    starts=1,
    ce_steps=20,
    mse_steps=20,
    track_seeds=1,
    track_steps=12,
    track_truth_every=4,
)
"""Seconds instead of minutes; shows that everything runs, not what it costs."""


class HalfSquaredError(nn.Module):
    """Half the squared distance to the one-hot label, mean over examples (Cohen et al. 2021)."""

    reduction = "mean"  # which curvlinops asks for

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        targets = data.one_hot(labels, outputs.shape[1], outputs.dtype)
        return 0.5 * (outputs - targets).square().sum(1).mean()


Product = Callable[[Tensor], object]

CRITERIA: dict[str, nn.Module] = {"CE": nn.CrossEntropyLoss(), "MSE": HalfSquaredError()}


@dataclass
class Problem:
    """A network on the digits, and the loss it is trained with."""

    loss: str
    model: nn.Module
    x: Tensor
    y: Tensor

    @property
    def criterion(self) -> nn.Module:
        return CRITERIA[self.loss]

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def closure(self) -> Tensor:
        loss: Tensor = self.criterion(self.model(self.x), self.y)
        return loss

    def gradient(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.closure(), self.params)

    def step(self, lr: float) -> None:
        gradient = self.gradient()
        with torch.no_grad():
            for p, g in zip(self.params, gradient, strict=True):
                p.sub_(g, alpha=lr)

    def copy(self, dtype: torch.dtype | None = None) -> "Problem":
        model = copy.deepcopy(self.model)
        if dtype is None:
            return Problem(self.loss, model, self.x, self.y)
        return Problem(self.loss, model.to(dtype), self.x.to(dtype), self.y)


def make_problem(config: Config, loss: str, seed: int) -> Problem:
    """The untrained network."""
    digits = data.load("digits", test=1)
    x = torch.cat([digits.x, digits.x_test]).flatten(1)[: config.examples]
    y = torch.cat([digits.y, digits.y_test])[: config.examples]
    spread = x.std(0, correction=0)
    x = (x - x.mean(0)) / torch.where(spread > 0, spread, 1.0)
    model = models.mlp((x.shape[1], config.hidden, config.hidden, 10), seed=seed)
    return Problem(loss, model, x, y)


def truth(problem: Problem, k: int) -> np.ndarray:
    """The k largest eigenvalues, descending, in float64 by another solver, to 1e-10."""
    sparse = _optional.require("scipy.sparse.linalg", extra="bench")
    wide = problem.copy(torch.float64)
    H = Hessian(wide.closure, wide.params)
    operator = sparse.LinearOperator(
        H.shape, matvec=lambda v: (H @ torch.from_numpy(v).flatten()).numpy(), dtype=np.float64
    )
    # More than asked for: ARPACK can pass over one of a close pair at the end of what it finds.
    wanted = min(k + 3, H.shape[0] - 1)
    start = np.random.default_rng(0).standard_normal(H.shape[0])
    values = sparse.eigsh(operator, wanted, which="LA", v0=start, tol=1e-10)[0]
    return np.sort(values)[::-1][:k]


# --- one cold measurement by each tool --------------------------------------------------------


@dataclass
class Answer:
    """What a tool returns: values descending, products used, and what it says of them."""

    values: np.ndarray
    hvps: int
    residual: float | None = None
    converged: bool | None = None


@dataclass(frozen=True)
class Method:
    """A way to find the k largest eigenvalues.

    Attributes:
        tool, setting: as the table names them.
        package: the distribution it comes from; None for what is always there.
        solve: `solve(problem, k, seed)`.
    """

    tool: str
    setting: str
    package: str | None
    solve: Callable[[Problem, int, int], Answer]


def _sam_lab(problem: Problem, k: int, seed: int) -> Answer:
    pairs = Hessian(problem.closure, problem.params).top(k, tol=1e-2, seed=seed)
    worst = float(pairs.residuals.max() / pairs.values[0].abs())
    return Answer(pairs.values.numpy(), pairs.hvps, worst, pairs.converged)


def _curvlinops(problem: Problem) -> Any:
    curvlinops = _optional.require("curvlinops", extra="bench")
    return curvlinops.HessianLinearOperator(
        problem.model,
        problem.criterion,
        problem.params,
        [(problem.x, problem.y)],
        check_deterministic=False,
        num_data=len(problem.x),
    )


def _eigsh(tol: float) -> Callable[[Problem, int, int], Answer]:
    def solve(problem: Problem, k: int, seed: int) -> Answer:
        sparse = _optional.require("scipy.sparse.linalg", extra="bench")
        operator = _curvlinops(problem).to_scipy()
        calls = 0

        def matvec(v: np.ndarray) -> np.ndarray:
            nonlocal calls
            calls += 1
            product: np.ndarray = operator @ v
            return product

        counted = sparse.LinearOperator(operator.shape, matvec=matvec, dtype=operator.dtype)
        start = np.random.default_rng(seed).standard_normal(operator.shape[0])
        values = sparse.eigsh(counted, k, which="LA", v0=start, tol=tol)[0]
        return Answer(np.sort(values)[::-1], calls)

    return solve


def _pyhessian(problem: Problem, k: int, seed: int) -> Answer:
    module: Any = _optional.require("pyhessian.hessian", extra="bench")
    calls = 0
    original = module.hessian_vector_product

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args)

    module.hessian_vector_product = counted
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            solver = module.hessian(
                problem.model, problem.criterion, data=(problem.x, problem.y), cuda=False
            )
            values, _ = solver.eigenvalues(top_n=k)
    finally:
        module.hessian_vector_product = original
        problem.model.zero_grad(set_to_none=True)  # it leaves a graph in .grad
    return Answer(np.sort(values)[::-1], calls)


def _eigenthings_operator(problem: Problem) -> Any:
    eigenthings = _optional.require("hessian_eigenthings", extra="bench")
    loss = eigenthings.supervised_loss(problem.criterion)
    return eigenthings.HessianOperator(problem.model, [(problem.x, problem.y)], loss)


def _eigenthings(max_iter: int | None) -> Callable[[Problem, int, int], Answer]:
    def solve(problem: Problem, k: int, seed: int) -> Answer:
        eigenthings = _optional.require("hessian_eigenthings", extra="bench")
        operator = _eigenthings_operator(problem)
        calls = 0
        original = operator.matvec

        def counted(v: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            product: Tensor = original(v)
            return product

        operator.matvec = counted
        found = eigenthings.lanczos(operator, k=k, max_iter=max_iter, which="LA", seed=seed)
        values = found.eigenvalues.numpy().astype(np.float64)
        worst = float(found.residuals.max()) / abs(values[0])
        return Answer(values, calls, worst, bool(found.converged.all()))

    return solve


METHODS = (
    Method("sam_lab", "tol=1e-2 (default)", None, _sam_lab),
    Method("scipy eigsh + curvlinops", "tol=0 (default)", "curvlinops-for-pytorch", _eigsh(0.0)),
    Method("scipy eigsh + curvlinops", "tol=1e-2", "curvlinops-for-pytorch", _eigsh(1e-2)),
    Method("PyHessian", "tol=1e-3 (default)", "pyhessian", _pyhessian),
    Method(
        "hessian-eigenthings", "max_iter=2k (default)", "hessian-eigenthings", _eigenthings(None)
    ),
    Method("hessian-eigenthings", "max_iter=20", "hessian-eigenthings", _eigenthings(20)),
)


# --- one product by each tool -----------------------------------------------------------------


def _pyhessian_product(problem: Problem) -> Product:
    module = _optional.require("pyhessian.hessian", extra="bench")
    solver = module.hessian(
        problem.model, problem.criterion, data=(problem.x, problem.y), cuda=False
    )
    shapes, sizes = [p.shape for p in problem.params], [p.numel() for p in problem.params]

    def product(v: Tensor) -> object:
        split = [part.view(s) for part, s in zip(v.split(sizes), shapes, strict=True)]
        return module.hessian_vector_product(solver.gradsH, solver.params, split)

    return product


def _sam_lab_product(mode: str, kept: bool = True) -> Callable[[Problem], Product]:
    def make(problem: Problem) -> Product:
        H = Hessian(problem.closure, problem.params, problem.model, mode=mode)

        def product(v: Tensor) -> object:
            if not kept:
                H.reset()
            return H @ v

        return product

    return make


PRODUCTS: tuple[tuple[str, str, str | None, Callable[[Problem], Product]], ...] = (
    ("sam_lab", "graph kept (default)", None, _sam_lab_product("graph")),
    ("sam_lab", "graph built anew", None, _sam_lab_product("graph", kept=False)),
    ("sam_lab", "forward over reverse", None, _sam_lab_product("forward")),
    (
        "curvlinops",
        "forward over reverse",
        "curvlinops-for-pytorch",
        lambda problem: _curvlinops(problem).__matmul__,
    ),
    ("PyHessian", "graph kept", "pyhessian", _pyhessian_product),
    (
        "hessian-eigenthings",
        "graph built anew",
        "hessian-eigenthings",
        lambda problem: _eigenthings_operator(problem).matvec,
    ),
)


# --- the tables -------------------------------------------------------------------------------


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    return statistics.median(seconds(action) for _ in range(repeats))


def product_table(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    """One row a way to multiply by the Hessian; `failed` says what torch says where it cannot."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(sum(p.numel() for p in problem.params), generator=generator)
    ready = []
    failed: dict[tuple[str, str], str] = {}
    for tool, how, package, make in PRODUCTS:
        if package and not version_of(package):
            continue
        own = problem.copy()
        with quiet():
            try:
                product = make(own)
                product(v)  # warm up
            except RuntimeError as error:  # NotImplementedError is one
                failed[tool, how] = str(error).splitlines()[0]
            else:
                ready.append((tool, how, product, own))
    ratios: dict[tuple[str, str], list[float]] = {(tool, how): [] for tool, how, *_ in ready}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in ratios}
    for _ in range(repeats):
        gradient = median_seconds(problem.gradient, 3)
        for tool, how, product, _own in ready:
            with quiet():
                spent = median_seconds(partial(product, v), 3)
            times[tool, how].append(spent)
            ratios[tool, how].append(spent / gradient)
    for *_, own in ready:
        own.model.zero_grad(set_to_none=True)
    rows = []
    for tool, how, _package, _make in PRODUCTS:
        key = (tool, how)
        row: dict[str, Any] = {"tool": tool, "how": how, "missing": key not in {**ratios, **failed}}
        if key in failed:
            row["failed"] = failed[key]
        if key in ratios:
            row["seconds"] = statistics.median(times[key])
            low, row["gradients"], high = statistics.quantiles(ratios[key], n=4, method="inclusive")
            row |= {"gradients_low": low, "gradients_high": high}
        rows.append(row)
    return rows


def cold_table(problems: list[Problem], starts: int) -> list[dict[str, Any]]:
    """One row a method, loss and k; numbers over all networks of that loss and all starts."""
    rows = []
    for loss in CRITERIA:
        nets = [problem for problem in problems if problem.loss == loss]
        for k in (1, 5):
            measured: dict[Method, list[dict[str, Any]]] = {m: [] for m in METHODS}
            for i, net in enumerate(nets):
                exact = truth(net, k)
                for start in range(starts):
                    gradient = median_seconds(net.gradient, 9)
                    for method in METHODS:
                        if method.package and not version_of(method.package):
                            continue
                        measured[method].append(
                            _measure(method, net.copy(), k, 100 * i + start, exact, gradient)
                        )
            rows += [_cold_row(m, loss, k, runs) for m, runs in measured.items()]
    return rows


def _measure(
    method: Method, problem: Problem, k: int, seed: int, exact: np.ndarray, gradient: float
) -> dict[str, Any]:
    with quiet():
        start = time.process_time()
        answer = method.solve(problem, k, seed)
        spent = time.process_time() - start
    error = float(np.abs(np.asarray(answer.values) - exact).max() / exact[0])
    return {
        "hvps": answer.hvps,
        "seconds": spent,
        "gradients": spent / gradient,
        "error": error,
        "residual": answer.residual,
        "converged": answer.converged,
    }


def _cold_row(method: Method, loss: str, k: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "tool": method.tool,
        "setting": method.setting,
        "loss": loss,
        "k": k,
        "missing": not runs,
    }
    if not runs:
        return row

    def column(name: str) -> list[Any]:
        return [run[name] for run in runs]

    row["runs"] = len(runs)
    row["hvps"] = statistics.median(column("hvps"))
    row["hvps_min"], row["hvps_max"] = min(column("hvps")), max(column("hvps"))
    for name in ("seconds", "gradients", "error"):
        row[name] = statistics.median(column(name))
    row["error_max"] = max(column("error"))
    # None: the tool makes no such statement.
    certified = None not in column("residual")
    row["residual_max"] = max(column("residual")) if certified else None
    row["converged"] = sum(column("converged")) / len(runs) if certified else None
    return row


# With squared error the sharpness rises to 2/lr within the steps followed (at 0.15, the learning
# rate of the snapshot, it would take longer); with cross-entropy it falls before it gets there.
TRACKED = (("MSE", 0.2), ("MSE", 0.3), ("CE", 0.4))


def tracking_table(config: Config) -> list[dict[str, Any]]:
    """One row a loss, k and regime: cost of a measurement at every step of gradient descent."""
    rows = []
    for loss, lr in TRACKED:
        for k in (1, 5):
            steps = []
            for seed in range(config.track_seeds):
                steps += _track(config, loss, lr, k, seed)
            for regime in ("before the edge", "at the edge"):
                chosen = [step for step in steps if step["regime"] == regime]
                if chosen:
                    rows.append(_tracking_row(loss, lr, k, regime, chosen))
    return rows


def _track(config: Config, loss: str, lr: float, k: int, seed: int) -> list[dict[str, Any]]:
    problem = make_problem(config, loss, seed)
    tracker = SharpnessTracker(problem.closure, problem.params, k=k, tol=1e-2, seed=seed)
    reached = False
    steps = []
    for number in range(config.track_steps):
        audits = tracker.audit_hvps
        start = time.process_time()
        pairs = tracker.measure()
        spent = time.process_time() - start
        audits = tracker.audit_hvps - audits
        reached = reached or float(pairs.values[0]) >= 2 / lr
        error = None
        if number % config.track_truth_every == 0:
            exact = truth(problem, k)
            error = float(np.abs(pairs.values.numpy() - exact).max() / exact[0])
        gradient = seconds(problem.gradient)
        problem.step(lr)
        if number == 0:
            continue  # a cold measurement
        steps.append(
            {
                "regime": "at the edge" if reached else "before the edge",
                "hvps": pairs.hvps - audits,
                "audits": audits,
                "gradients": None if audits else spent / gradient,
                "residual": float(pairs.residuals.max() / pairs.values[0].abs()),
                "converged": pairs.converged,
                "error": error,
            }
        )
    return steps


def _tracking_row(
    loss: str, lr: float, k: int, regime: str, steps: list[dict[str, Any]]
) -> dict[str, Any]:
    def column(name: str) -> list[Any]:
        return [step[name] for step in steps if step[name] is not None]

    row: dict[str, Any] = {
        "loss": loss,
        "lr": lr,
        "k": k,
        "regime": regime,
        "measurements": len(steps),
        "hvps": statistics.fmean(column("hvps")),
        "hvps_max": max(column("hvps")),
        "hvps_with_audits": statistics.fmean(s["hvps"] + s["audits"] for s in steps),
        "residual_max": max(column("residual")),
        "converged": statistics.fmean(column("converged")),
    }
    if column("gradients"):
        row["gradients"] = statistics.median(column("gradients"))
    if column("error"):
        row["error"] = statistics.median(column("error"))
        row["error_max"] = max(column("error"))
    return row


# --- all of it --------------------------------------------------------------------------------


def run(config: Config) -> dict[str, Any]:
    """All three tables."""
    problems = []
    for loss, lr, steps in (("CE", 0.4, config.ce_steps), ("MSE", 0.15, config.mse_steps)):
        for seed in range(config.seeds):
            problem = make_problem(config, loss, seed)
            for _ in range(steps):
                problem.step(lr)
            problems.append(problem)
    say("products of the Hessian with one vector")
    products = product_table(problems[0], repeats=10 * config.starts)
    say("eigenvalues from a random start")
    cold = cold_table(problems, config.starts)
    say("eigenvalues along gradient descent")
    tracking = tracking_table(config)
    return {
        "config": asdict(config),
        "parameters": sum(p.numel() for p in problems[0].params),
        "peers": {m.package: version_of(m.package) for m in METHODS if m.package},
        "products": products,
        "cold": cold,
        "tracking": tracking,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    versions = ", ".join(f"{p} {v or 'missing'}" for p, v in result["peers"].items())
    provenance = result["provenance"]
    lines = [
        f"{result['parameters']} parameters, {provenance['threads']} thread(s), "
        f"torch {provenance['torch']}, {versions}",
        "",
        f"{'one product':49}{'gradients':>10}",
    ]
    lines += map(product_line, result["products"])
    head = f"{'HVPs':>7}{'(range)':>11}{'ms':>8}{'gradients':>10}{'error':>9}{'worst':>9}"
    for loss in CRITERIA:
        for k in (1, 5):
            lines += ["", f"{f'{loss}, k = {k}, random start':49}{head}{'certified':>10}"]
            for row in result["cold"]:
                if (row["loss"], row["k"]) == (loss, k):
                    lines.append(f"{row['tool']:25}{row['setting']:24}{_cold_cells(row)}")
    head = f"{'HVPs':>7}{'most':>6}{'+audits':>9}{'gradients':>10}{'error':>9}{'worst':>9}"
    lines += ["", f"{'along gradient descent, every step':49}{head}{'certified':>10}"]
    for row in result["tracking"]:
        name = f"{row['loss']}, lr {row['lr']}, k = {row['k']}, {row['regime']}"
        lines.append(
            f"{name:49}{row['hvps']:7.2f}{row['hvps_max']:6d}{row['hvps_with_audits']:9.2f}"
            f"{_number(row.get('gradients'), '10.1f')}{_number(row.get('error'), '9.1e')}"
            f"{_number(row.get('error_max'), '9.1e')}{_number(row['residual_max'], '10.1e')}"
        )
    return "\n".join(lines)


def product_line(row: dict[str, Any]) -> str:
    """A row of `product_table` as text."""
    end = f"{'missing' if row['missing'] else 'fails':>10}"
    if "gradients" in row:
        end = f"{row['gradients']:10.2f}"
    if "gradients_low" in row:
        end += f"{row['gradients_low']:8.2f}-{row['gradients_high']:.2f}"
    return f"{row['tool']:25}{row['how']:24}{end}"


def _cold_cells(row: dict[str, Any]) -> str:
    if row["missing"]:
        return f"{'missing':>7}"
    spread = f"{row['hvps_min']}-{row['hvps_max']}"
    certified = _number(row["residual_max"], "10.1e")
    if row["converged"] is not None and row["converged"] < 1:
        certified += f" ({1 - row['converged']:.0%} say: not converged)"
    return (
        f"{row['hvps']:7g}{spread:>11}{1e3 * row['seconds']:8.0f}{row['gradients']:10.1f}"
        f"{row['error']:9.1e}{row['error_max']:9.1e}{certified}"
    )


def _number(value: float | None, form: str) -> str:
    width = int(form.split(".")[0])
    return " " * (width - 1) + "-" if value is None else format(value, form)


BENCHMARK = Benchmark(
    name="curvature",
    about="the largest Hessian eigenvalues: products, seconds and true errors",
    schema="sam_lab.benchmark.curvature/1",
    measure=lambda quick: run(QUICK if quick else Config()),
    table=table,
    packages=("scipy",),
)
