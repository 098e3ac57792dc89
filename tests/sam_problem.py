"""A small problem that the tests of SAM share, and what they compare."""

import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

X = torch.linspace(-1, 1, 24).reshape(8, 3)
Y = X.prod(dim=1, keepdim=True).sin()

SGD = partial(torch.optim.SGD, lr=0.1)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": SGD,
    "momentum": partial(SGD, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, centered=True),
}


def network(*extra, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), *extra, nn.Tanh(), nn.Linear(4, 1))


@contextmanager
def nothing_waits():
    """An error where the host waits for CUDA inside."""
    try:
        with warnings.catch_warnings():
            # that not every wait is found
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def loss_of(model):
    return lambda: (model(X) - Y).square().mean()


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def assert_equal(a, b):
    """Bit for bit, in nested containers too."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def length(tensors):
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def moved(model, before):
    """How far the parameters are from where they were."""
    return length(p.detach() - w for p, w in zip(model.parameters(), before, strict=True))


def everything(sam, model):
    """Copies of all that a step could change."""
    return deepcopy(
        {
            "model": dict(model.state_dict()),
            "optimizer": sam.optimizer.state_dict()["state"],
            "counts": [sam.steps, sam.skipped],
        }
    )


class Elsewhere(torch.Tensor):
    """Says that it is on an accelerator, and so do the tensors computed from it."""

    @property
    def device(self):
        return SimpleNamespace(type="accelerator")

    def to(self, *_):
        return self
