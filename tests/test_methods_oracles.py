"""The methods beside those of pytorch_optimizer: fifty steps where both follow the paper's formula.

Where they part, a formula in NumPy says which of the two follows it.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from sam_lab import SAM
from sam_lab.methods import friendly_sam, gsam, looksam, wsam

peer = pytest.importorskip("pytorch_optimizer")

LR, MOMENTUM, RHO = 0.1, 0.9, 0.1
SGD = {"lr": LR, "momentum": MOMENTUM}
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X[:, :1] * X[:, 1:2]).tanh()


class Constant:
    """The schedule that their GSAM asks for."""

    def step(self):
        return RHO


def network(several=True):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)]
        return nn.Sequential(*(layers if several else [nn.Linear(6, 1, bias=False)])).double()


def loss_of(model):
    return nn.functional.mse_loss(model(X), Y)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def ours(method, model, steps=50):
    sam = SAM(torch.optim.SGD(model.parameters(), **SGD), RHO, model, method=method)
    for _ in range(steps):
        sam.step(lambda: loss_of(model))
    return flat(model)


def theirs(make, model, steps=50, calls=None):
    optimizer = make(model)
    if isinstance(optimizer, peer.GSAM):
        for _ in range(steps):
            optimizer.set_closure(nn.functional.mse_loss, X, Y)
            optimizer.step()
        return flat(model)

    def backward():
        if calls is not None:
            calls.append(0)
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(steps):
        if not isinstance(optimizer, peer.WSAM):
            backward()
        optimizer.step(backward)
    return flat(model)


def their_looksam(model):
    return peer.LookSAM(model.parameters(), torch.optim.SGD, rho=RHO, k=4, alpha=0.5, **SGD)


SAME = {
    "GSAM": (
        partial(gsam, alpha=0.3),
        lambda m: peer.GSAM(
            m.parameters(), torch.optim.SGD(m.parameters(), **SGD), m, Constant(), alpha=0.3
        ),
    ),
    "WSAM, coupled": (
        partial(wsam, gamma=0.7),
        lambda m: peer.WSAM(
            m, m.parameters(), torch.optim.SGD, rho=RHO, gamma=0.7, decouple=False, **SGD
        ),
    ),
    "Friendly SAM": (
        partial(friendly_sam, sigma=0.8, lam=0.6),
        lambda m: peer.FriendlySAM(
            m.parameters(), torch.optim.SGD, rho=RHO, sigma=0.8, lmbda=0.6, **SGD
        ),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_fifty_steps_agree(name):
    method, make = SAME[name]
    found, expected, start = ours(method, network()), theirs(make, network()), flat(network())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # their norm is of float32
    assert float((found - start).abs().max()) > 0.05
    assert float((found - ours(partial(wsam, gamma=0.5), network())).abs().max()) > 1e-3


def test_looksam_agrees_where_there_is_one_tensor():
    found = ours(partial(looksam, k=4, alpha=0.5), network(several=False))
    expected = theirs(their_looksam, network(several=False))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def by_formula(model, k, alpha, steps):
    """LookSAM with one norm for all parameters, by differences of nothing but gradients."""
    params = list(model.parameters())

    def gradient_at(w):
        nn.utils.vector_to_parameters(torch.from_numpy(w), params)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model), params)]).numpy()

    w = flat(model).numpy()
    velocity, across = np.zeros_like(w), None
    for step in range(steps):
        g = gradient_at(w)
        if step % k == 0:
            direction = gradient_at(w + RHO * g / np.linalg.norm(g))
            across = direction - (direction @ g) / (g @ g) * g
        else:
            direction = g + alpha * np.linalg.norm(g) / np.linalg.norm(across) * across
        velocity = MOMENTUM * velocity + direction
        w = w - LR * velocity
    return torch.from_numpy(w)


def test_of_several_tensors_ours_is_the_formula_and_theirs_has_a_norm_for_each():
    """Trap: a norm for each tensor is another method (Look-LayerSAM has one a layer)."""
    formula = by_formula(network(), k=4, alpha=0.5, steps=50)
    found = ours(partial(looksam, k=4, alpha=0.5), network())
    torch.testing.assert_close(found, formula, rtol=1e-9, atol=1e-10)
    expected = theirs(their_looksam, network())
    assert float((expected - formula).abs().max()) > 0.01


def test_looksam_saves_passes_here_and_none_there():
    """Trap: the closure is called at every step, so nothing is saved."""
    model, calls = network(), []
    sam = SAM(torch.optim.SGD(model.parameters(), **SGD), RHO, method=partial(looksam, k=4))
    for _ in range(20):
        sam.step(lambda: calls.append(0) or loss_of(model))
    assert len(calls) == 25
    calls.clear()
    theirs(their_looksam, network(), 20, calls)
    assert len(calls) == 40
