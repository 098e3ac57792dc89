"""A training script that is killed and started again ends where it would have ended."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

STEPS = 60
SCRIPT = """
import os, sys
import torch
from torch import nn
from functools import partial
from sam_lab import SAM
from sam_lab.methods import esam, graphsam, looksam, plain
from sam_lab.perturbations import random_direction, sam as sam_rule

name, path, end = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
x, y = torch.randn(256, 20), torch.randint(5, (256,))
model = nn.Sequential(
    nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 5)
)
loss_fn = nn.CrossEntropyLoss(reduction="none")
if name == "AdamW":
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
else:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
method = {
    "LookSAM": partial(looksam, k=7, alpha=0.2),
    "GraphSAM": partial(graphsam, k=7, beta=0.9),
    "ESAM": esam,
}.get(name, plain)
sam = SAM(
    optimizer,
    rho=lambda step: 0.1 / (1 + step),
    model=model,
    rule=random_direction if method is plain else sam_rule,
    method=method,
    generator=torch.Generator().manual_seed(1),
)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=end)

if os.path.exists(path):
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    sam.load_state_dict(state["sam"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["random"])

while sam.steps < end:
    batch = torch.randint(256, (32,))
    sam.step(lambda examples=slice(None): loss_fn(model(x[batch][examples]), y[batch][examples]))
    scheduler.step()
    if sam.steps % 5 == 0:
        state = {
            "model": model.state_dict(),
            "sam": sam.state_dict(),
            "scheduler": scheduler.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(state, path + ".part")
        os.replace(path + ".part", path)
    print(sam.steps, flush=True)
"""


def train(optimizer: str, path: str, kill_at: int | None = None) -> list[int]:
    """Run the script, kill it when it has said that it is at that step; the steps it has named."""
    ours, theirs = socket.socketpair()
    # with a buffer of a few lines, the script cannot run far ahead of who reads them
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    command = [sys.executable, "-W", "error", "-c", SCRIPT, optimizer, path, str(STEPS)]
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, text=True)
    theirs.close()
    steps = []
    with ours, ours.makefile() as lines, process:
        for line in lines:
            steps.append(int(line))
            if steps[-1] == kill_at:
                os.kill(process.pid, signal.SIGKILL)
        errors = process.stderr.read()
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL), errors
    return steps


def same(a: Any, b: Any) -> bool:
    """Equal through and through, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Sequence) and not isinstance(a, str):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD with momentum", "LookSAM", "GraphSAM", "ESAM"])
def test_training_that_was_killed_and_resumed_ends_bit_identical(optimizer, tmp_path):
    whole, interrupted = str(tmp_path / "whole.pt"), str(tmp_path / "interrupted.pt")
    assert train(optimizer, whole) == list(range(1, STEPS + 1))
    train(optimizer, interrupted, kill_at=23)
    saved = torch.load(interrupted, weights_only=True)["sam"]["steps"]
    assert 20 <= saved < STEPS
    assert train(optimizer, interrupted) == list(range(saved + 1, STEPS + 1))
    expected = torch.load(whole, weights_only=True)
    assert same(torch.load(interrupted, weights_only=True), expected)
