r"""Pairs of weights whose product shall be 1: a loss on which the bounce can be averaged exactly.

Each example has two weights of its own. The loss of $n$ examples is

$$L = \frac1n \sum_i \tfrac12 (u_i v_i - y_i)^2, \qquad y_i = 1.$$

Its minima are hyperbolas. On one of them the Hessian of a pair has the eigenvalues $s/n$, with
$s = u^2 + v^2$, and 0, so a minimum is flatter the nearer it is to $u = v$. The *place* on the
hyperbola is $q = u^2 - v^2$; there $s = \sqrt{q^2 + 4}$.

**The rates are derived here.** Write $\eta$ for the learning rate of a pair (that of the loss above
over $n$) and $e = uv - y$ for its residual.

- *Gradient descent, label noise.* A step multiplies $q$ by exactly $1 - \eta^2 e^2$, whatever $y$.
  With labels $1 \pm \sigma$ drawn anew in every step the residual has the stationary mean square
  $2\sigma^2/(2 - \eta s)$, so $\log q$ falls by $2\eta^2\sigma^2/(2 - \eta s)$ a step.
- *SAM.* The gradient is along $(v, u)$. With $e_+$ the residual at the perturbed point and
  $c = \rho\,\mathrm{sign}(e)/\sqrt s$, a step multiplies $q$ by exactly
  $(1 - \eta e_+ c)^2 - (\eta e_+)^2$.
  SAM bounces between $e = \pm\beta$ with $\beta = \eta\rho s^{3/2}/(2 - \eta s)$, where
  $e_+ = \pm 2\rho\sqrt{s}/(2 - \eta s)$. The mean over both walls is, to second order in $\rho$,
  a fall of $\log q$ by $8\eta\rho^2/(2 - \eta s)^2$ a step.
- *Noise in place of SAM's direction.* $\rho\xi$ with $\xi$ uniform on the sphere of all $d = 2n$
  weights: the perturbation turns the gradient by $2\eta\rho^2/d$ and acts as gradient noise beside,
  together $4\eta\rho^2/(d\,(2 - \eta s))$ a step.
- *SAM where several pairs are equally sharp.* They share one bounce, so each of $m$ such pairs has
  $1/m$ of the rate.

All in float64. Weights are arrays (..., 2, n): pairs ``u, v`` of n examples, in any number of
copies, each of which is a run of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "RULES",
    "at",
    "flow",
    "gradient",
    "label_noise_rate",
    "noise_rate",
    "place",
    "sam_rate",
    "sharpness",
    "step",
    "tied_flow",
]

Floats = NDArray[np.float64]
RULES = ("descent", "sam", "unnormalized", "noise")
"""How a step perturbs the weights: not at all, along g/|g|, along g, along a random direction."""


def at(q: Floats | float, residual: Floats | float = 0.0) -> Floats:
    """Weights (..., 2, n) with u² - v² = q (..., n) and uv = 1 + residual, u and v positive."""
    q = np.atleast_1d(np.asarray(q, dtype=float))
    s = np.hypot(q, 2 * (1 + np.asarray(residual)))
    w: Floats = np.sqrt(np.stack([(s + q) / 2, (s - q) / 2], axis=-2))
    return w


def place(w: Floats) -> Floats:
    """Where on its hyperbola each pair is: q = u² - v², (..., n)."""
    return w[..., 0, :] ** 2 - w[..., 1, :] ** 2


def sharpness(q: Floats | float) -> Floats:
    """Curvature s = u² + v² of a pair at the place q on the hyperbola uv = 1, the 1/n left out."""
    return np.hypot(q, 2.0)


def gradient(
    w: Floats, labels: Floats | float = 1.0, weight: Floats | float | None = None
) -> Floats:
    """Gradient (..., 2, n) of the mean over examples; `weight` (..., n) replaces their 1/n."""
    residual = w[..., 0, :] * w[..., 1, :] - labels
    if weight is None:
        weight = 1 / w.shape[-1]
    scaled: Floats = (weight * residual)[..., None, :] * w[..., ::-1, :]
    return scaled


def step(
    w: Floats,
    lr: float,
    rho: float = 0.0,
    rule: str = "descent",
    *,
    sigma: float = 0.0,
    single: bool = False,
    tremor: float = 0.0,
    rng: np.random.Generator | None = None,
) -> Floats:
    """One step of every copy.

    Args:
        w: (..., 2, n).
        lr: learning rate of the mean over examples.
        rho: radius; of "unnormalized", the factor of the gradient.
        rule: one of `RULES`.
        sigma: the labels are 1 ± sigma, drawn anew for each example.
        single: use one random example, and its own loss, in place of the mean.
        tremor: standard deviation of noise that is added to the gradient before it is normalised.
        rng: needed where anything is random.

    Raises:
        ValueError: an unknown rule, or no generator where one is needed.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if rng is None and (sigma or single or tremor or rule == "noise"):
        raise ValueError("rng must be a generator where the step is random, got None")
    batch, n = w.shape[:-2], w.shape[-1]
    labels: Floats | float = 1.0
    weight: Floats | None = None
    if rng is not None and sigma:
        labels = 1 + sigma * rng.choice((-1.0, 1.0), size=(*batch, n))
    if rng is not None and single:
        weight = np.eye(n)[rng.integers(n, size=batch)]
    g = gradient(w, labels, weight)
    if rule == "descent" or not rho:
        return w - lr * g
    if rng is not None and tremor:
        g = g + tremor * rng.normal(size=g.shape)
    if rng is not None and rule == "noise":
        g = rng.normal(size=g.shape)
    if rule != "unnormalized":
        norm = np.sqrt(np.sum(g**2, axis=(-2, -1), keepdims=True))
        g = g / np.where(norm > 0, norm, 1.0)
    return w - lr * gradient(w + rho * g, labels, weight)


# --- theory: by how much log q falls in a step, with the learning rate of a pair ------------------


def sam_rate(q: Floats | float, lr: float, rho: float) -> Floats:
    """SAM on one pair: 8 lr rho² / (2 - lr s)²."""
    rate: Floats = 8 * lr * rho**2 / (2 - lr * sharpness(q)) ** 2
    return rate


def _shared(q: Floats, lr: float, rho: float, among: int) -> Floats:
    """SAM's rate for each of several tied pairs."""
    return sam_rate(q, lr, rho) / among


def label_noise_rate(q: Floats | float, lr: float, sigma: float) -> Floats:
    """Labels 1 ± sigma: 2 lr² sigma² / (2 - lr s)."""
    rate: Floats = 2 * lr**2 * sigma**2 / (2 - lr * sharpness(q))
    return rate


def noise_rate(q: Floats | float, lr: float, rho: float, d: int) -> Floats:
    """A random direction of length rho in d weights: 4 lr rho² / (d (2 - lr s))."""
    rate: Floats = 4 * lr * rho**2 / (d * (2 - lr * sharpness(q)))
    return rate


def flow(q: Floats | float, rate: Callable[[Floats], Floats], steps: int) -> Floats:
    """The places (steps + 1, ...) along dq/dt = -rate(q) q from q on, by the midpoint rule."""
    places = [np.atleast_1d(np.asarray(q, dtype=float))]
    for _ in range(steps):
        now = places[-1]
        middle = now * np.exp(-rate(now) / 2)
        places.append(now * np.exp(-rate(middle)))
    return np.stack(places)


def tied_flow(q: Floats, lr: float, rho: float, steps: int) -> Floats:
    """The places (steps + 1, n) of the pairs of one run of full-batch SAM.

    The sharpest pair alone moves, at its own rate, until it is as sharp as the next; from then on
    the tied pairs move together, each with its share of the rate.

    Args:
        q: (n,), positive.
        lr: learning rate of the mean over examples.
    """
    n = len(q)
    order = np.argsort(-np.asarray(q, dtype=float), kind="stable")
    now = np.asarray(q, dtype=float)[order]
    places = [now]
    for _ in range(steps):
        tied = int(np.sum(now > now[0] * (1 - 1e-12)))
        share = partial(_shared, lr=lr / n, rho=rho, among=tied)
        level = float(flow(now[0], share, 1)[-1, 0])
        now = np.minimum(now, level)
        places.append(now)
    found = np.empty((steps + 1, n))
    found[:, order] = np.stack(places)
    return found
