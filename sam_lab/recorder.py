r"""Sharpness and both stability edges, followed along any training loop.

One line before the loop and one inside::

    record = EdgeRecorder(sam, loss, every=10)
    for _ in range(1000):
        sam.step(loss)
        record()

    record["sharpness"] / record["sam_edge"]  # arrays, one entry a measurement

What is recorded is the view of one step of the optimizer: the loss, its gradient $g$ and its top
Hessian eigenpair $(\lambda_1, v_1)$ at the weights $w$ from which the next step starts, the
gradient that SAM takes instead, and the two edges that the step's learning rate, rho and $|g|$ put
on $\lambda_1$. Which loss is meant is the closure's choice. With minibatches these are different
questions: a closure over the current batch asks whether *this step* bounces, a closure over a large
fixed batch whether training as a whole sits in a valley that sharp. Two recorders answer both.

For neither of them is 2/lr the edge of a step on minibatches. What is at 2/lr there is the
`batch_sharpness`, a mean over minibatches; given `batches`, the recorder has it as a column.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab._checks import check_integer
from sam_lab.curvature import Hessian
from sam_lab.eigensolvers import inner
from sam_lab.methods import gradient_penalty, gsam, plain, wsam
from sam_lab.objective import Closure
from sam_lab.perturbations import sam as sam_rule
from sam_lab.perturbations import unnormalized
from sam_lab.sam import SAM
from sam_lab.stability import gd_edge, sam_edge
from sam_lab.state import check_state
from sam_lab.tracker import SharpnessTracker

__all__ = ["BATCH_COLUMNS", "COLUMNS", "BatchSharpness", "EdgeRecorder", "batch_sharpness"]

COLUMNS = (
    "step",
    "loss",
    "sharpness",
    "residual",
    "grad_norm",
    "gd_edge",
    "sam_edge",
    "grad_align",
    "sam_align",
    "rayleigh",
)
"""What a measurement consists of; see `EdgeRecorder`."""

BATCH_COLUMNS = ("batch_sharpness", "batch_sharpness_stderr")
"""What there is besides, where the recorder is given `batches`."""


class BatchSharpness(NamedTuple):
    """`value` of `batch_sharpness`, and its standard error over the batches (NaN of one batch)."""

    value: float
    stderr: float


def batch_sharpness(
    optimizer: SAM | torch.optim.Optimizer,
    closures: Iterable[Closure],
    model: nn.Module | None = None,
) -> BatchSharpness:
    r"""Curvature that a step on a minibatch meets, on that same minibatch: a ratio of two means.

    Let $g_B$ and $H_B$ be gradient and Hessian of the loss on a batch B, and $s_B$ the gradient
    with which the optimizer would step: $g_B$ itself for SGD, that at $w + \epsilon$ for SAM. Then

    $$\frac{E_B[s_B \cdot H_B s_B]}{E_B[s_B \cdot g_B]} .$$

    To second order a step $-\eta s_B$ changes the loss on its own batch by
    $-\eta\, s_B \cdot g_B + \tfrac12 \eta^2 s_B \cdot H_B s_B$. On average that is zero if and only
    if the ratio is 2/lr, `gd_edge`, whatever rho. For SGD the ratio is
    $E[g_B \cdot H_B g_B] / E|g_B|^2$, the batch sharpness of Andreyev & Beneventano. For SAM with
    the whole data as the only batch, where the gradient lies along an eigenvector, it is
    $\lambda(1 + \rho\lambda/|g|)$, and it is 2/lr where $\lambda$ is `sam_edge`. The form for SAM
    is derived here.

    Cost: for each batch its gradient and one Hessian-vector product; with SAM one more gradient.

    Args:
        optimizer: a `SAM` of the method `plain`, or another torch optimizer alone (rho = 0).
        closures: each evaluates the loss on one batch, of the size that is trained with. Some tens
            of batches give a value to within a tenth as a rule; the standard error tells.
        model: the module that the closures evaluate; default that of the SAM.

    Raises:
        ValueError: no batch, or a SAM whose method is not `plain` or whose rule draws or has a
            state, since measuring must not move it.
        FloatingPointError: a loss, a gradient or a product is not finite.

    Source: Andreyev & Beneventano 2024 (arXiv:2412.20553), for SGD.

    Example:
        >>> w = torch.tensor([3.0, 1.0], requires_grad=True)
        >>> sgd = torch.optim.SGD([w], lr=0.5)
        >>> batch_sharpness(sgd, [lambda: w[0] ** 2, lambda: w[1] ** 2]).value
        2.0
    """
    sam = optimizer if isinstance(optimizer, SAM) else SAM(optimizer, rho=0.0, model=model)
    if not _repeatable(sam):
        raise ValueError(
            "batch_sharpness needs a SAM of the method plain whose rule neither draws nor has a "
            "state: measuring must not move it"
        )
    model = sam.model if model is None else model
    bends, slopes = [], []
    for closure in closures:
        hessian = Hessian(closure, sam.params, model)
        g = hessian.gradient()
        s = _stepped_gradient(sam, hessian, g)
        dot = inner(torch.stack([s, g, hessian @ s]), s[None])[:, 0].tolist()
        slopes.append(dot[1])
        bends.append(dot[2])
    if not bends:
        raise ValueError("closures must hold at least one batch, got none")
    mean = float(np.mean(slopes))
    value = float(np.mean(bends)) / mean if mean else math.nan
    if len(bends) == 1 or not mean:
        return BatchSharpness(value, math.nan)
    # the error of a ratio of means, to first order
    rest = np.array(bends) - value * np.array(slopes)
    return BatchSharpness(value, float(np.std(rest, ddof=1)) / math.sqrt(len(rest)) / abs(mean))


class EdgeRecorder:
    r"""Records sharpness and stability edges of a training run, without disturbing it.

    Args:
        optimizer: a `SAM`, or a `torch.optim.SGD` alone (that is SAM with rho = 0).
        closure: evaluates the loss at the current weights, as for `Hessian`; or a ready `Hessian`
            of the same parameters, such as `Hessian.over(...)`.
        every: optimizer steps from one measurement to the next.
        tol: tolerance on the residual of the eigenpair, relative to the eigenvalue.
        model: the module that the closure evaluates, as for `Hessian`; default that of the SAM.
        seed: seed of the eigensolver's random starts.
        batches: gives at each measurement the losses of some minibatches, closures as for
            `batch_sharpness`, which says what they cost; default none. What it draws it should
            draw from a generator of its own, so that training is not disturbed.

    Attributes:
        columns: a list for each name, one entry a measurement:

            ``step``: steps that the optimizer had taken; ``loss``; ``sharpness``: largest Hessian
            eigenvalue; ``residual``: of that eigenpair, so that an eigenvalue lies within it;
            ``grad_norm``: Euclidean norm of the gradient g; ``gd_edge``, ``sam_edge``: the edges of
            the step without and with the perturbation; ``grad_align``, ``sam_align``:
            \|cos\| of the angle between the top eigenvector and g, or SAM's gradient;
            ``rayleigh``: g.Hg / \|g\|^2, the curvature along the gradient. With `batches` also
            ``batch_sharpness``, whose edge is ``gd_edge`` for SAM, too (without momentum), and
            ``batch_sharpness_stderr``; NaN for rules and methods that it does not take.

        tracker: the `SharpnessTracker` that measures.

    The edges are those of the step that the optimizer would take with its present settings. For
    heavy-ball momentum m the learning rate counts as lr / (1 + m): there the bouncing flips sign
    without growing (with SAM and a large m it may also settle elsewhere). Weight decay lowers both
    edges by its coefficient (exactly for gradient descent; for SAM where the decay is small beside
    the edge). For the rule `unnormalized` they are those of \|g\| = 1. For rules other than those
    two no edge is known, and ``sam_edge`` is NaN; ``sam_align`` is NaN for rules that draw or
    have a state, since measuring must not move them. Of methods, `gsam` has the edge of SAM (along
    an eigenvector it is SAM), `wsam` and `gradient_penalty` that of SAM with the radius that they
    come to there; for others, and for the second form of `gsam`, ``sam_edge`` is NaN, and for all
    but `plain` ``sam_align``.

    Raises:
        TypeError: the optimizer is neither, or of another kind than SGD: no edge is known then;
            `SharpnessTracker` follows the sharpness alone.
        ValueError: an argument is not as described; the parameter groups differ in learning rate,
            momentum, weight decay or rho; the optimizer uses Nesterov's momentum, dampening or
            maximize.

    Source: Long & Bartlett 2024 (arXiv:2309.12488); Cohen et al. 2021 (arXiv:2103.00065).

    Example:
        >>> w = torch.tensor([3.0, 1.0], requires_grad=True)
        >>> loss = lambda: w[0] ** 2 + 0.5 * w[1] ** 2
        >>> sam = SAM(torch.optim.SGD([w], lr=0.5), rho=0.5)
        >>> record = EdgeRecorder(sam, loss)
        >>> for _ in range(40):
        ...     record()
        ...     _ = sam.step(loss)
        >>> round(float(record["sharpness"][-1] / record["sam_edge"][-1]), 3)
        1.0
    """

    def __init__(
        self,
        optimizer: SAM | torch.optim.Optimizer,
        closure: Closure | Hessian,
        *,
        every: int = 1,
        tol: float = 1e-2,
        model: nn.Module | None = None,
        seed: int = 0,
        batches: Callable[[], Iterable[Closure]] | None = None,
    ) -> None:
        if batches is not None and not callable(batches):
            raise TypeError(
                "batches must be a function that returns the losses of some minibatches, got "
                f"{type(batches).__name__}"
            )
        if not isinstance(optimizer, SAM):
            optimizer = SAM(_sgd(optimizer), rho=0.0, model=model)
        _sgd(optimizer.optimizer)
        self.sam = optimizer
        if isinstance(closure, Hessian):
            if model is not None:
                raise ValueError("a Hessian brings its own model: leave model out")
            if [id(p) for p in closure.params] != [id(p) for p in self.sam.params]:
                raise ValueError(
                    "the Hessian must be over the optimizer's parameters that require grad, in "
                    "their order"
                )
            hessian = closure
        else:
            model = self.sam.model if model is None else model
            hessian = Hessian(closure, self.sam.params, model)
        self.tracker = SharpnessTracker(hessian, tol=tol, seed=seed)
        self.every = check_integer("every", every, 1)
        self._batches = batches
        names = COLUMNS if batches is None else (*COLUMNS, *BATCH_COLUMNS)
        self.columns: dict[str, list[float]] = {name: [] for name in names}
        self.seconds = 0.0
        self._began = time.perf_counter()
        self._edges(1.0)  # bad settings are an error here, not after a thousand steps

    def __call__(self, now: bool = False) -> None:
        """Measure, if the number of steps taken is a multiple of `every` and was not seen yet.

        Args:
            now: measure in any case, for instance after the last step.

        Raises:
            FloatingPointError: the loss is not finite: the run has diverged.
        """
        steps = self.sam.steps
        seen = self.columns["step"]
        if seen and seen[-1] == steps:
            return
        if steps % self.every and not now:
            return
        self._wait()
        start = time.perf_counter()
        row = {"step": steps, **self._measure()}
        if self._batches is not None:
            row |= self._on_batches(self._batches())
        self._wait()
        self.seconds += time.perf_counter() - start
        for name, value in row.items():
            self.columns[name].append(value)

    def __getitem__(self, name: str) -> np.ndarray:
        """The column of this name as an array, one entry a measurement."""
        return np.array(self.columns[name])

    def __len__(self) -> int:
        return len(self.columns["step"])

    @property
    def share(self) -> float:
        """Share of the time since the recorder was made that went into measuring."""
        return self.seconds / (time.perf_counter() - self._began)

    def state_dict(self) -> dict[str, Any]:
        """The columns and the tracker's state: ``torch.load(..., weights_only=True)`` reads it."""
        columns = {name: list(values) for name, values in self.columns.items()}
        return {"columns": columns, "tracker": self.tracker.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a run that was saved; what is recorded goes on bit for bit, once
        the model and the optimizer have theirs, too.

        Raises:
            ValueError: the state is not one of `state_dict`, or of a recorder with other columns
                or another number of parameters. Nothing has been loaded then.
        """
        check_state(state, ("columns", "tracker"))
        if set(state["columns"]) != set(self.columns):
            raise ValueError(
                f"state has the columns {sorted(state['columns'])}, and this recorder "
                f"{sorted(self.columns)}"
            )
        self.tracker.load_state_dict(state["tracker"])
        self.columns = {name: list(state["columns"][name]) for name in self.columns}

    def _measure(self) -> dict[str, float]:
        pairs = self.tracker.measure()
        hessian = self.tracker.hessian
        loss, g, v = hessian.loss(), hessian.gradient(), pairs.vectors[:, 0]
        bent = hessian @ g
        # all norms and angles from one matrix of inner products, summed in float64
        rows = torch.stack([g, v, bent, self._sam_gradient(g)])
        dot = inner(rows, rows).tolist()
        norm = math.sqrt(dot[0][0])
        before, after = self._edges(norm)
        return {
            "loss": loss,
            "sharpness": float(pairs.values[0]),
            "residual": float(pairs.residuals[0]),
            "grad_norm": norm,
            "gd_edge": before,
            "sam_edge": after,
            "grad_align": _cosine(dot, 0, 1),
            "sam_align": _cosine(dot, 3, 1),
            "rayleigh": dot[0][2] / dot[0][0] if norm else math.nan,
        }

    def _on_batches(self, closures: Iterable[Closure]) -> dict[str, float]:
        found = BatchSharpness(math.nan, math.nan)
        if _repeatable(self.sam):
            found = batch_sharpness(self.sam, closures, self.tracker.hessian.model)
        return dict(zip(BATCH_COLUMNS, found, strict=True))

    def _sam_gradient(self, g: Tensor) -> Tensor:
        """The gradient at w + eps (P,); g itself where eps is 0, NaN where it cannot be known."""
        if any(self.sam.radii()) and not _repeatable(self.sam):
            return torch.full_like(g, math.nan)
        return _stepped_gradient(self.sam, self.tracker.hessian, g)

    def _edges(self, grad_norm: float) -> tuple[float, float]:
        groups, radii = self.sam.optimizer.param_groups, self.sam.radii()
        lr, momentum, decay = (
            _common(name, [float(group[name]) for group in groups])
            for name in ("lr", "momentum", "weight_decay")
        )
        rho = _common("rho", radii)
        before = gd_edge(lr / (1 + momentum)) - decay
        if not before > 0:
            raise ValueError(
                f"weight_decay must be below the edge, {before + decay:.4g}, got {decay:g}"
            )
        if self.sam.rule is unnormalized:
            grad_norm = 1.0
        if rho == 0:
            return before, before
        rho *= _radius_of(self.sam.method, rho)
        if self.sam.rule not in (sam_rule, unnormalized) or math.isnan(rho):
            return before, math.nan
        return before, sam_edge(2 / before, rho, grad_norm) if rho else before

    def _wait(self) -> None:
        """An accelerator still at work on the steps must not be charged to the measurement."""
        device = self.tracker.hessian.device
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()


def _repeatable(sam: SAM) -> bool:
    """Whether the perturbation can be looked at without moving what the next step does."""
    if not any(sam.radii()):
        return True
    stateless = sam.generator is None and not hasattr(sam.rule, "state_dict")
    return sam.method is plain and stateless


def _stepped_gradient(sam: SAM, hessian: Hessian, g: Tensor) -> Tensor:
    """The gradient (P,) of the Hessian's loss at w + eps, where g is that at w."""
    if not any(sam.radii()):
        return g
    pieces = g.split([p.numel() for p in sam.params])
    grads = [piece.view_as(p) for p, piece in zip(sam.params, pieces, strict=True)]
    with sam.perturbed(grads):
        gradient = hessian.gradient()
    hessian.reset()  # what it keeps is of w + eps
    return gradient


def _radius_of(method: Any, rho: float) -> float:
    """The radius, over rho, with which SAM is the method along an eigenvector; NaN if with none."""
    function = getattr(method, "func", method)
    given = inspect.signature(method).parameters
    if function is plain or (function is gsam and given["minimize_fp"].default):
        return 1.0
    if function is wsam:
        gamma: float = given["gamma"].default
        return gamma / (1 - gamma)
    if function is gradient_penalty:
        lam: float = given["lam"].default
        return lam / rho
    return math.nan


def _sgd(optimizer: Any) -> torch.optim.SGD:
    if not isinstance(optimizer, torch.optim.SGD):
        raise TypeError(
            "optimizer must be a SAM around torch.optim.SGD, or that SGD alone: no edge is known "
            f"for {type(optimizer).__name__}; SharpnessTracker follows the sharpness alone"
        )
    for group in optimizer.param_groups:
        for name in ("nesterov", "dampening", "maximize"):
            if group[name]:
                raise ValueError(
                    f"no edge is known for SGD with {name}={group[name]}; leave it out, or follow "
                    "the sharpness alone with SharpnessTracker"
                )
    return optimizer


def _common(name: str, values: list[float]) -> float:
    if len(set(values)) != 1:
        raise ValueError(f"an edge needs one {name} for all parameters, got {sorted(set(values))}")
    return values[0]


def _cosine(dot: list[list[float]], i: int, j: int) -> float:
    length = math.sqrt(dot[i][i] * dot[j][j])
    return min(abs(dot[i][j]) / length, 1.0) if length else math.nan
