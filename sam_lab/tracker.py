"""The sharpness along a training run, for a few Hessian-vector products a step.

Between two optimizer steps the top eigenvectors turn only a little. `SharpnessTracker` starts each
measurement from a guess that costs no product (LOBPCG, see `sam_lab.eigensolvers`) and stops as
soon as the residuals are small. There are three guesses, and the one is taken that was nearest to
what was found in the latest measurements:

- the vectors of the measurement before;
- those of the one before that: at the edge of stability the iterate swings from one wall of the
  valley to the other and back, and what was found on the same wall is nearer;
- those that the move of the parameters predicts from the last few measurements
  (`eigensolvers.extrapolate`): where the loss is smooth and the steps are short, the nearest.

What a warm start cannot see: a residual says that *some* eigenvalue is near. A direction that
overtakes the tracked ones from outside leaves their residuals small. Guard vectors (for k > 1)
keep the next neighbours in view, and every `audit_every` measurements an *audit* runs Lanczos from
a random start: where it finds more than the residuals allow, its vectors replace the tracked ones,
and the event is counted.

At the edge the top two eigenvalues often lie within a few percent of each other; each value is then
right, to its residual, for one of the two. Where they change places the sharpness is continuous and
its vector is not: a *crossing*, which the measurement says. What is followed along one vector, such
as the part of the iterate that lies along it, has a new beginning there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sam_lab._checks import check_integer, check_positive
from sam_lab.curvature import Eigenpairs, Hessian
from sam_lab.eigensolvers import extrapolate, missing
from sam_lab.objective import Closure
from sam_lab.state import check_state

__all__ = ["SharpnessTracker"]

DEPTH = 4
"""Measurements that a guess is made from."""

COUNTS = ("measurements", "hvps", "audits", "audit_hvps", "false_convergences", "crossings")
"""What a tracker counts; see `SharpnessTracker`."""


class SharpnessTracker:
    """Measures the k largest Hessian eigenvalues again and again as the parameters move.

    Args:
        closure: evaluates the loss at the current parameters, as for `Hessian`; or a ready
            `Hessian`, such as `Hessian.over(...)`, which brings its own params and model.
        params: the parameters, as for `Hessian`.
        k: number of eigenpairs.
        tol: tolerance on residuals, relative to the largest eigenvalue.
        model: the module that the closure evaluates, as for `Hessian`.
        audit_every: measurements from one audit to the next; None for no audits.
        seed: seed of the random starts.
        max_hvps: most products of one measurement, its audit apart.

    Memory: the parameters and the vectors of the last four measurements, which for P parameters are
    8 P numbers with k = 1 and 4 (k + 3) P with more.

    What it costs depends on how fast the top eigenvector turns. Twelve problems that a seed drew
    (`book/results/bench_tracker.json`: fully connected and convolutional networks, Transformers,
    residual networks, full-batch gradient descent) took over their first sixty steps (ResNet-18:
    twelve), audits apart, a median of 2 products a measurement before the edge and 3 at it (90th
    percentile 3.1 and 9); with k = 5, 12 and 17. With k = 1, networks with GELU before the edge
    took 1.3 on average, with ReLU 2.6, Transformers at the edge 7. There the vector is another one
    at each step (by a median of 64 degrees from the nearer of the last two), and from that nearer
    vector no method that knows the Hessian by its products alone can certify 1% with
    fewer than 6 (median): the benchmark's column `fewest`, which over all networks is 2 before the
    edge and 3 at it.

    Attributes:
        hessian: the operator; `hessian.loss()` and `hessian.gradient()` cost nothing more right
            after a measurement of a loss of one batch.
        measurements, hvps: measurements so far and products spent on them, audits apart.
        audits, audit_hvps: audits so far and products spent on them.
        crossings: measurements whose first vector had less than half of its square along the first
            vector of the measurement before: another eigenvalue had become the largest, or the
            vector had turned by more than 45 degrees, which nearly equal eigenvalues allow.
        false_convergences: audits that found an eigenvalue above the tracked one by more than
            the residuals of the two together.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> tracker = SharpnessTracker(lambda: 3 * w[0] ** 2 + w[1] ** 2, [w])
        >>> round(float(tracker.measure().values[0]), 3)
        6.0
    """

    def __init__(
        self,
        closure: Closure | Hessian,
        params: Iterable[Tensor] | None = None,
        k: int = 1,
        tol: float = 1e-2,
        model: nn.Module | None = None,
        audit_every: int | None = 50,
        seed: int = 0,
        max_hvps: int = 200,
    ) -> None:
        if isinstance(closure, Hessian):
            if params is not None or model is not None:
                raise ValueError("a Hessian brings its own params and model: leave them out")
            self.hessian = closure
        elif params is None:
            raise ValueError("params must be given, unless the first argument is a Hessian")
        else:
            self.hessian = Hessian(closure, params, model)
        size = self.hessian.shape[0]
        self.k = check_integer("k", k, 1, size)
        self.tol = check_positive("tol", tol)
        if audit_every is not None:
            check_integer("audit_every", audit_every, 1, what="None or an integer")
        self.audit_every = audit_every
        self.seed = check_integer("seed", seed, 0)
        self.max_hvps = check_integer("max_hvps", max_hvps, k)
        self.measurements = self.hvps = 0
        self.audits = self.audit_hvps = self.false_convergences = self.crossings = 0
        self.reset()

    def measure(self) -> Eigenpairs:
        """The top eigenpairs at the current parameters.

        The first call starts at random, later ones from vectors of the calls before. The vectors
        keep the signs they had. An exception leaves the tracker as it was before the call.

        Returns:
            `Eigenpairs` as from `Hessian.top`; its `hvps` includes an audit that was due, and
            `crossing` says whether this measurement is one of the `crossings`. Where not even
            Lanczos from a random start converged within `max_hvps`, `converged` is False and a
            `ConvergenceWarning` is issued.

        Raises:
            FloatingPointError: the loss or a product is not finite: the run has diverged.
        """
        seed = self.seed + self.measurements
        here = self.hessian.position()
        guesses = self._guesses(here)
        start = guesses[self._nearest(guesses)].T if guesses else None
        pairs = self._top(seed, start)
        spent, checked, missed = pairs.hvps, 0, False
        # a start at random, as the first, needs no audit
        if self.audit_every and start is not None and self.measurements % self.audit_every == 0:
            audit = self._top(seed, None)
            checked = audit.hvps
            excess = audit.values - pairs.values
            missed = audit.converged and bool((excess > audit.residuals + pairs.residuals).any())
            if missed or (audit.converged and not pairs.converged):
                pairs = audit
        pairs = self._aligned(pairs, spent + checked)
        self.measurements += 1
        self.hvps += spent
        self.audits += checked > 0
        self.audit_hvps += checked
        self.false_convergences += missed
        self.crossings += pairs.crossing
        self._remember(pairs, here, guesses)
        return pairs

    def reset(self) -> None:
        """Forget all vectors: the next measurement starts at random."""
        self._before: Tensor | None = None  # (P, m) block of the measurement before
        self._points: list[Tensor] = []  # parameters at the latest measurements, the last one last
        self._spans: list[Tensor] = []  # (m, P) rows near the eigenvectors there
        self._errors: dict[str, float] = {}  # how far each guess lay off, late ones counting most

    def state_dict(self) -> dict[str, Any]:
        """The counts and the vectors: ``torch.load(..., weights_only=True)`` reads it."""
        return {
            "counts": {name: getattr(self, name) for name in COUNTS},
            "before": self._before,
            "points": list(self._points),
            "spans": list(self._spans),
            "errors": dict(self._errors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a run that was saved; its measurements go on bit for bit.

        Raises:
            ValueError: the state is not one of `state_dict`, or of another number of parameters.
                Nothing has been loaded then.
        """
        check_state(state, self.state_dict())
        size, points = self.hessian.shape[0], state["points"]
        if any(len(point) != size for point in points):
            raise ValueError(
                f"state is of {len(points[0])} parameters, and this tracker has {size}"
            )
        kept = copy.deepcopy(dict(state))
        for name in COUNTS:
            setattr(self, name, int(kept["counts"][name]))
        here = self.hessian.device
        self._before = None if kept["before"] is None else kept["before"].to(here)
        self._points = [point.to(here) for point in kept["points"]]
        self._spans = [span.to(here) for span in kept["spans"]]
        self._errors = kept["errors"]

    def _top(self, seed: int, start: Tensor | None) -> Eigenpairs:
        return self.hessian.top(self.k, self.tol, seed, self.max_hvps, start)

    def _guesses(self, here: Tensor) -> dict[str, Tensor]:
        """Rows to start from, by the name of the guess."""
        spans = self._spans
        guesses = {"last": spans[-1]} if spans else {}
        if len(spans) > 1:
            guesses["before"] = spans[-2]
        if len(spans) > 2 and len({len(span) for span in spans}) == 1:
            guesses["predicted"] = extrapolate(self._points, spans, here, self.tol / 2)
        return guesses

    def _nearest(self, guesses: dict[str, Tensor]) -> str:
        """The guess that was nearest of late; one that has not been seen yet comes last."""
        return min(guesses, key=lambda name: self._errors.get(name, 1.0 + (name != "last")))

    def _aligned(self, pairs: Eigenpairs, hvps: int) -> Eigenpairs:
        """The same pairs with the signs of their predecessors, and whether the first crossed."""
        block, ahead, crossing = pairs.block, pairs.ahead, False
        if self._before is not None:
            width = min(block.shape[1], self._before.shape[1])
            along = (block[:, :width] * self._before[:, :width]).sum(0)
            crossing = float(along[0]) ** 2 < 0.5
            signs = torch.ones(block.shape[1], dtype=block.dtype, device=block.device)
            signs[:width] = torch.where(along < 0, -1.0, 1.0)
            block, ahead = block * signs, ahead * signs
        vectors = block[:, : pairs.vectors.shape[1]]
        return replace(
            pairs, vectors=vectors, hvps=hvps, block=block, ahead=ahead, crossing=crossing
        )

    def _remember(self, pairs: Eigenpairs, here: Tensor, guesses: dict[str, Tensor]) -> None:
        """Keep what was found and where, and see how far off each guess was."""
        for name, guess in guesses.items():
            error = missing(guess, pairs.vectors.T)
            self._errors[name] = (self._errors.get(name, error) + error) / 2
        self._before = pairs.block
        self._points = [*self._points, here][-DEPTH:]
        self._spans = [*self._spans, pairs.ahead.T.contiguous()][-DEPTH:]
