r"""One training loop, in phases.

A `Phase` says what the epochs [start, stop) train with: the optimizer alone, SAM around it,
examples that are attacked, or both. All phases share one optimizer, one schedule of the learning
rate and one order of the examples; what changes at the boundary is the phase, and nothing else.
Runs that differ in the time of the switch can therefore share their trunk::

    trunk = Training(model, x, y, optimizer, late(200, 200, rho=0.1))
    for at in (150, 180, 195):
        trunk.run(until=at)
        branch = trunk.branch(late(at, 200, rho=0.1))
        branch.run()

What an epoch draws (order, augmentation, dropout, a random rule) is a function of seed and epoch
alone. So the branch is, bit for bit, the run that had that phase from the beginning, and so is a
run that was interrupted and taken up again from a checkpoint.
"""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab._checks import check_examples, check_integer, check_nonnegative
from sam_lab.adversarial import Attack
from sam_lab.data import one_hot
from sam_lab.methods import Method, plain
from sam_lab.objective import Closure
from sam_lab.perturbations import Rule
from sam_lab.perturbations import sam as sam_rule
from sam_lab.sam import SAM
from sam_lab.state import RandomState, check_state, evaluating, load_optimizer, save_whole

__all__ = [
    "Phase",
    "Training",
    "constant",
    "cosine",
    "crop_and_flip",
    "descend",
    "early",
    "evaluate",
    "late",
    "squared_error",
    "step_decay",
]

Schedule = Callable[[float], float]
LossFn = Callable[[Tensor, Tensor], Tensor]
Augmentation = Callable[[Tensor, torch.Generator], Tensor]


# --- phases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """What the epochs from `start` up to, and not including, `stop` train with.

    Args:
        start, stop: the half-open interval [start, stop) of epochs, counted from 0.
        rho: radius of SAM; 0 for the optimizer alone, at one pass a step.
        rule: what SAM's perturbation is, a function of `sam_lab.perturbations` without a state.
        method: how often a step looks at the loss and what descends, a function of
            `sam_lab.methods`. Its state goes from epoch to epoch, and ends with the phase.
        attack: for adversarial training, such as ``partial(adversarial.pgd, threat=0.1)``. Called
            as ``attack(model, x, y, generator=generator)`` once a step; all passes of the step see
            what it returns. None for the examples as they are.

    Raises:
        TypeError, ValueError: start and stop are not whole numbers with 0 <= start < stop, rho is
            not a finite number of at least 0, rule is no function or has a state, or method or
            attack is no function.
    """

    start: int
    stop: int
    rho: float = 0.0
    rule: Rule = sam_rule
    attack: Attack | None = None
    method: Method = plain

    def __post_init__(self) -> None:
        check_integer("start", self.start, 0)
        check_integer("stop", self.stop, self.start + 1)
        check_nonnegative("rho", self.rho)
        if self.attack is not None and not callable(self.attack):
            raise TypeError(
                f"attack must be a function such as partial(pgd, threat=0.1), got {self.attack!r}"
            )
        if not callable(self.rule):
            raise TypeError(f"rule must be a function of sam_lab.perturbations, got {self.rule!r}")
        if not callable(self.method):
            raise TypeError(f"method must be a function of sam_lab.methods, got {self.method!r}")
        if hasattr(self.rule, "state_dict"):
            raise ValueError(
                f"rule must be without a state, which checkpoints would miss; got {self.rule!r:.80}"
            )


def late(at: int, epochs: int, **how: Any) -> tuple[Phase, ...]:
    """The optimizer alone for the epochs [0, at), and `how` for [at, epochs).

    ``late(150, 200, rho=0.1)`` is late SAM, and with ``attack=partial(pgd, threat=0.1)`` instead it
    is late adversarial training. ``at = epochs`` is the optimizer alone, ``at = 0`` `how`
    throughout.

    Args:
        how: what a `Phase` takes besides start and stop.
    """
    return _switch(at, epochs, {}, how)


def early(at: int, epochs: int, **how: Any) -> tuple[Phase, ...]:
    """`how` for the epochs [0, at), and the optimizer alone for [at, epochs); see `late`."""
    return _switch(at, epochs, how, {})


def _switch(
    at: int, epochs: int, before: dict[str, Any], after: dict[str, Any]
) -> tuple[Phase, ...]:
    check_integer("epochs", epochs, 1)
    check_integer("at", at, 0, epochs)
    parts = ((0, at, before), (at, epochs, after))
    return tuple(Phase(start, stop, **how) for start, stop, how in parts if start < stop)


# --- schedules ------------------------------------------------------------------------------------


def constant(done: float) -> float:
    """A learning rate that stays as it is."""
    return 1.0


def cosine(done: float) -> float:
    """From 1 down to 0 along half a cosine (Loshchilov & Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * done))


def step_decay(factors: Mapping[float, float]) -> Schedule:
    """A staircase: ``step_decay({0.3: 0.2, 0.6: 0.04})`` is a fifth of the learning rate from 30%
    of the epochs on, and a twenty-fifth from 60% on.

    Raises:
        ValueError: a key outside [0, 1], or a factor that is not above 0.
    """
    stairs = sorted(factors.items())
    if not all(0 <= start <= 1 and 0 < factor < math.inf for start, factor in stairs):
        raise ValueError(
            "factors must map shares of the training in [0, 1] to factors above 0, "
            f"got {dict(factors)}"
        )

    def factor(done: float) -> float:
        # 0.3 of 10 epochs is epoch 3, whatever 0.3 * 10 is in floating point
        passed = [value for start, value in stairs if done >= start - 1e-9]
        return passed[-1] if passed else 1.0

    return factor


# --- the loop -------------------------------------------------------------------------------------


class Training:
    """A model in training: where it stands, and how to go on.

    Args:
        model: what is trained; runs on the device of its parameters.
        x, y: the training set, inputs (N, ...) and targets (N, ...), on the model's device.
        optimizer: makes the optimizer, such as ``partial(torch.optim.SGD, lr=0.1, momentum=0.9)``.
        phases: what the epochs train with, one phase after the other, from epoch 0 on without a
            gap; the end of the last is the end of the training.
        loss_fn: ``loss_fn(model(x), y)`` is the mean loss of a batch. For label smoothing give
            ``torch.nn.CrossEntropyLoss(label_smoothing=0.1)``. It may be the losses (N,) of the
            examples, whose mean is then taken, which a phase with `methods.esam` needs.
        batch: examples a step. The last batch of an epoch is smaller where N does not divide.
        schedule: the factor of the learning rate in an epoch, a function of the share of the
            epochs that are done: `constant`, `cosine`, `step_decay`.
        augment: ``augment(x, generator)`` changes a batch of inputs: `crop_and_flip`.
        carry: whether the state of the optimizer (momentum) survives from phase to phase. If not,
            every phase begins with an empty one, as where each phase has an optimizer of its own.
        seed: determines all that an epoch draws.
        autocast: ``torch.bfloat16`` for passes in `torch.autocast`, with parameters, SAM's
            perturbation and the optimizer's state as they are; None for passes as they are.

    Attributes:
        epoch: how many epochs are done.
        epochs: how many there are.
        history: a dict for each epoch done: `epoch`, `lr` and `rho` in it, `attacked` (1 if its
            examples were, 0 if not), `loss` (mean over its steps, at the weights before each step)
            and `passes` (forward through the model, and mostly backward, in all epochs so far).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: the design of Zhou et al. 2025 (arXiv:2410.10373), where a run switches once; their code
    counts both ends of an interval of epochs as inside, and does not carry the momentum.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
        phases: Sequence[Phase],
        *,
        loss_fn: LossFn = nn.functional.cross_entropy,
        batch: int = 128,
        schedule: Schedule = constant,
        augment: Augmentation | None = None,
        carry: bool = True,
        seed: int = 0,
        autocast: torch.dtype | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r:.80}")
        check_examples(x, y)
        functions = {"loss_fn": loss_fn, "schedule": schedule}
        if augment is not None:
            functions["augment"] = augment
        for name, function in functions.items():
            if not callable(function):
                raise TypeError(f"{name} must be a function, got {function!r:.80}")
        self.model, self.x, self.y = model, x, y
        self.phases = _checked_phases(phases)
        self.loss_fn, self.schedule, self.augment = loss_fn, schedule, augment
        self.batch = check_integer("batch", batch, 1)
        self.carry, self.seed = carry, check_integer("seed", seed, 0)
        if autocast not in (None, torch.bfloat16):
            raise ValueError(
                "autocast must be None or torch.bfloat16 (float16 would need its loss scaled), "
                f"got {autocast!r}"
            )
        self.autocast = autocast
        self._make = optimizer
        self.optimizer = _made(optimizer, model)
        self._lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._generator = torch.Generator(x.device)
        self._inside = False  # an epoch
        self._method: Mapping[str, Any] | None = None  # the state of the phase's method
        self.epoch = 0
        self.history: list[dict[str, float]] = []

    @property
    def epochs(self) -> int:
        return self.phases[-1].stop

    def phase(self, epoch: int) -> Phase:
        """The phase of an epoch."""
        check_integer("epoch", epoch, 0, self.epochs - 1)
        return next(phase for phase in self.phases if epoch < phase.stop)

    def run(
        self,
        until: int | None = None,
        *,
        on_step: Callable[[], object] | None = None,
        on_epoch: Callable[[], object] | None = None,
    ) -> Training:
        """Train up to, and not including, the epoch `until`; default to the end.

        An epoch is done whole or not at all: an exception inside, Ctrl-C included, leaves the
        training as it was before that epoch.

        Args:
            until: number of epochs that are done afterwards; nothing happens if more are already.
            on_step: called after each step, the model in training mode.
            on_epoch: called after each epoch: for progress, or ``lambda: training.save(path)``.

        Returns:
            Itself.

        Raises:
            ValueError: `until` is no epoch of this training.
        """
        until = self.epochs if until is None else check_integer("until", until, 0, self.epochs)
        while self.epoch < until:
            before = copy.deepcopy(self.state_dict())
            try:
                self._run_epoch(on_step)
            except BaseException:
                self.load_state_dict(before)
                raise
            if on_epoch is not None:
                on_epoch()
        return self

    def branch(self, phases: Sequence[Phase]) -> Training:
        """A training that goes on from here, through other phases; this one is not touched.

        Raises:
            ValueError: the phases end before this epoch, or are not those of the past up to here.
        """
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        other.optimizer = _made(self._make, other.model)
        other.phases = _checked_phases(phases)
        other._generator = torch.Generator(self.x.device)
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict[str, Any]:
        """All that changes in training: ``torch.load(..., weights_only=True)`` reads it.

        Holds the model's and the optimizer's own tensors, not copies.

        Raises:
            RuntimeError: in the middle of an epoch, as from `on_step`.
        """
        if self._inside:
            raise RuntimeError(
                f"epoch {self.epoch} is not done, and what is taken up are whole epochs: "
                "save, or branch, from on_epoch"
            )
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": [dict(row) for row in self.history],
            "draws": self._draws(),
            **({} if self._method is None else {"method": self._method}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state of `state_dict`, also of a training whose later phases are other ones.

        Raises:
            ValueError: the state is not one, or of a training with another seed, batch size or
                number of examples, whose epochs draw otherwise; or later than the last phase; or
                its epochs had another learning rate or phase than they would have here; or of
                another model or optimizer. Nothing has been loaded then.
        """
        check_state(state, ("epoch", "model", "optimizer", "history", "draws"), ("method",))
        if state["draws"] != self._draws():
            raise ValueError(
                f"state is of a training with {state['draws']}, this one has {self._draws()}"
            )
        epoch = check_integer("epoch of the state", state["epoch"], 0)
        if epoch > self.epochs:
            raise ValueError(f"state has {epoch} epochs done, and the phases end at {self.epochs}")
        history = [dict(row) for row in state["history"]]
        for row in history:
            here = self._course(int(row["epoch"]))
            if any(row[name] != value for name, value in here.items()):
                past, present = (
                    ", ".join(f"{name} {course[name]:g}" for name in here) for course in (row, here)
                )
                raise ValueError(
                    f"state has trained epoch {row['epoch']:g} with {past}, where phases and "
                    f"schedule here have {present}"
                )
        weights = copy.deepcopy(self.model.state_dict())
        try:
            self.model.load_state_dict(state["model"])
            load_optimizer(self.optimizer, state["optimizer"])
        except Exception as error:
            self.model.load_state_dict(weights)
            raise ValueError(f"state is of another model or optimizer: {error}") from error
        self.epoch, self.history = epoch, history
        self._method = copy.deepcopy(state.get("method"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint: whole, or not at all."""
        save_whole(self.state_dict(), path)

    def load(self, path: str | os.PathLike[str]) -> Training:
        """Take up a checkpoint of `save`; returns itself."""
        self.load_state_dict(torch.load(path, map_location=self.x.device, weights_only=True))
        return self

    # --- one epoch --------------------------------------------------------------------------------

    def _run_epoch(self, on_step: Callable[[], object] | None) -> None:
        phase = self.phase(self.epoch)
        if self.epoch == phase.start and not self.carry:  # as new: for some that is not empty
            self.optimizer.load_state_dict(_made(self._make, self.model).state_dict())
        factor = self.schedule(self.epoch / self.epochs)
        for group, lr in zip(self.optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * factor
        self.model.train()
        sam = SAM(
            self.optimizer,
            phase.rho,
            self.model,
            rule=phase.rule,
            method=phase.method,
            generator=self._generator,
        )
        if self.epoch > phase.start:
            sam.load_method(self._method)
        losses = []
        passes = self.history[-1]["passes"] if self.history else 0.0

        def count(*_: object) -> None:
            nonlocal passes
            passes += 1

        with self._drawing():
            for x, y in self._batches():
                counting = self.model.register_forward_hook(count)
                try:
                    if phase.attack is not None:
                        with self._casting():
                            x = phase.attack(self.model, x, y, generator=self._generator)
                    losses.append(sam.step(partial(self._loss, x, y)))
                finally:
                    counting.remove()
                if on_step is not None:
                    on_step()
        self.history.append(
            {
                "epoch": float(self.epoch),
                **self._described(phase, factor),
                "loss": float(torch.stack(losses).mean()),
                "passes": passes,
            }
        )
        self._method = sam.state_dict().get("method")
        self.epoch += 1

    def _course(self, epoch: int) -> dict[str, float]:
        """What an epoch trains with, as its history has it."""
        return self._described(self.phase(epoch), self.schedule(epoch / self.epochs))

    def _described(self, phase: Phase, factor: float) -> dict[str, float]:
        """The learning rate is that of the first group."""
        return {
            "lr": float(self._lrs[0] * factor),
            "rho": float(phase.rho),
            "attacked": float(phase.attack is not None),
        }

    def _loss(self, x: Tensor, y: Tensor, examples: Tensor | slice = slice(None)) -> Tensor:
        with self._casting():
            return self.loss_fn(self.model(x[examples]), y[examples])

    def _casting(self) -> AbstractContextManager[object]:
        if self.autocast is None:  # and not one that is disabled: there may be one around us
            return nullcontext()
        return torch.autocast(self.x.device.type, self.autocast)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x), generator=self._generator, device=self.x.device)
        for part in order.split(self.batch):
            x = self.x[part]
            yield (x if self.augment is None else self.augment(x, self._generator)), self.y[part]

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Random numbers of this epoch inside; outside, the global ones are as they were."""
        # far enough apart that no epoch of one seed is an epoch of another
        number = (self.seed * 0x9E3779B97F4A7C15 + self.epoch) % 2**63
        outside = RandomState([self.x.device])
        self._inside = True
        try:
            random.seed(number)
            np.random.seed([number >> 32, number % 2**32])
            self._generator.manual_seed(number)
            torch.default_generator.manual_seed(number)
            if self.x.device.type not in ("cpu", "meta"):
                torch.get_device_module(self.x.device).manual_seed(number)
            yield
        finally:
            self._inside = False
            outside.restore()

    def _draws(self) -> dict[str, int]:
        """What the random numbers of an epoch depend on besides the epoch."""
        return {"seed": self.seed, "batch": self.batch, "examples": len(self.x)}


def _made(
    make: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer], model: nn.Module
) -> torch.optim.Optimizer:
    if not callable(make) or isinstance(make, torch.optim.Optimizer):
        raise TypeError(
            "optimizer must make the optimizer from the parameters, such as "
            f"partial(torch.optim.SGD, lr=0.1), got {make!r:.80}"
        )
    made = make(model.parameters())
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer, which {made!r:.80} is not")
    own = {id(p) for p in model.parameters()}
    # one that had them from elsewhere would make a branch train the trunk's model
    if not own.issuperset(id(p) for group in made.param_groups for p in group["params"]):
        raise ValueError(
            f"optimizer must take the parameters it is called with, and no others, got {make!r:.80}"
        )
    return made


def _checked_phases(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    listed = tuple(phases) if isinstance(phases, Iterable) else ()
    if not listed or not all(isinstance(phase, Phase) for phase in listed):
        raise ValueError(f"phases must be a list of one Phase or more, got {phases!r:.80}")
    if listed[0].start != 0 or any(one.stop != two.start for one, two in pairwise(listed)):
        spans = ", ".join(f"[{phase.start}, {phase.stop})" for phase in listed)
        raise ValueError(f"phases must follow each other from epoch 0 without a gap, got {spans}")
    return listed


# --- without phases -------------------------------------------------------------------------------


def descend(closure: Closure, params: Sequence[Tensor], lr: float, steps: int) -> None:
    """Plain gradient descent on ``closure()``, in place.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    for step in range(steps):
        loss = closure()
        if step % 100 == 0 and not math.isfinite(float(loss.detach())):
            raise FloatingPointError(
                f"the loss is {float(loss.detach())} after {step} steps with lr={lr}"
            )
        with torch.no_grad():
            for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.sub_(lr * g)


# --- around it ------------------------------------------------------------------------------------


def squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Half the sum of squares over the outputs (N, K), mean over examples; y (N,) are labels.

    Source: the convention of Cohen et al. 2021 (arXiv:2103.00065).
    """
    targets = one_hot(y, outputs.shape[1]).to(outputs)
    return 0.5 * (outputs - targets).square().sum(1).mean()


def crop_and_flip(pad: int = 4, flip: bool = True) -> Augmentation:
    """Each image shifted by up to `pad` pixels either way, zeros moving in, and every other one
    mirrored, on the device: the usual augmentation of CIFAR (He et al. 2016).

    Returns:
        ``augment(x, generator)`` for images (N, C, H, W); draws from the generator, which must be
        on the device of `x`.
    """
    check_integer("pad", pad, 0)

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"x must be images (N, C, H, W), got shape {tuple(x.shape)}")
        n, _, height, width = x.shape

        def draw(high: int) -> Tensor:
            return torch.randint(high, (n, 1), generator=generator, device=x.device)

        rows = torch.arange(height, device=x.device) + draw(2 * pad + 1)
        columns = torch.arange(width, device=x.device) + draw(2 * pad + 1)
        if flip:
            columns = torch.where(draw(2) == 1, columns.flip(1), columns)
        padded = nn.functional.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
        which = torch.arange(n, device=x.device)[:, None, None]
        return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    return augment


@torch.no_grad()
def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss_fn: LossFn = nn.functional.cross_entropy,
    batch: int = 1000,
) -> tuple[float, float]:
    """Mean loss and share of wrong predictions on a data set, the model in evaluation mode.

    Args:
        model: its modes are as before afterwards, those of its parts too.
        x, y: inputs (N, ...) and labels (N,).
        loss_fn: ``loss_fn(model(x), y)`` is the mean loss of a batch.
        batch: examples a pass.

    Returns:
        Loss, and error between 0 and 1.

    Raises:
        TypeError, ValueError: x and y are no tensors, or do not hold one entry an example, or none
            at all.
    """
    check_integer("batch", batch, 1)
    check_examples(x, y)
    losses: list[tuple[Tensor, int]] = []  # read at the end, and float64 is not everywhere
    wrong = torch.zeros((), dtype=torch.int64, device=x.device)
    with evaluating(model):
        for inputs, targets in zip(x.split(batch), y.split(batch), strict=True):
            outputs = model(inputs)
            losses.append((loss_fn(outputs, targets), len(inputs)))
            wrong += (outputs.argmax(1) != targets).sum()
    total = math.fsum(float(loss) * count for loss, count in losses)
    return total / len(x), float(wrong) / len(x)
