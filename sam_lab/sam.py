r"""Sharpness-aware minimization around any torch optimizer.

A SAM step is an ordinary step with a gradient from somewhere else: the optimizer stays at the
weights $w$ but sees the gradient at $w + \epsilon$, where the loss, to first order, is worst within
a radius rho. `SAM` stands *beside* the optimizer: it takes the weights to $w + \epsilon$ and back,
and leaves the optimizer, its state and its parameter groups alone. Schedulers, gradient clipping,
GradScaler and checkpoints therefore work as they always do.

Two forms. ``sam.step(closure)`` is the whole step; ``with sam.perturbed():`` is its middle, for
loops that have more to do:

1. clear the gradients; forward and backward at $w$, over one batch or several;
2. ``with sam.perturbed():`` forward and backward at $w + \epsilon$, over the same data;
3. unscale and clip the gradients, then ``optimizer.step()`` and the schedulers.

Clipping comes after the block, where it bounds the step. Before the block it would do nothing: the
perturbation has the length rho whatever the length of the gradient (`unnormalized` apart).

Weight decay of the optimizer takes part in the step and not in the perturbation. The original code
has it in both; to have that, leave it out of the optimizer and add it to the loss.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sam_lab._checks import check_nonnegative
from sam_lab.objective import Closure
from sam_lab.perturbations import HALF, Rule, dithered, global_norm, sam, shard
from sam_lab.state import RandomState, kept_buffers, load_optimizer

__all__ = ["SAM"]


class SAM:
    """Sharpness-aware minimization around any `torch.optim.Optimizer`.

    Args:
        optimizer: takes the step; its parameter groups say what is perturbed. A group with a
            number under the key "rho" has that radius, 0 for none, unless the optimizer has a rho
            of its own (Adadelta).
        rho: radius of the perturbation, in units of the weights; a number, or a schedule that maps
            the number of steps taken so far to one. Where it is 0 the step is the optimizer's own,
            bit for bit, and `step` leaves the second pass out.
        model: the module that is trained. Given, its buffers (running statistics of BatchNorm and
            the like) are as the clean pass left them after the perturbed one. FSDP2 needs it too,
            or a block after an evaluation may find the gathered weights of before.
        rule: what the perturbation is, a function of `sam_lab.perturbations` or one like them. If
            it has a state (`state_dict` and `load_state_dict`), checkpoints include it.
        generator: handed to the rule as `generator=`, for rules that draw; part of checkpoints.
        same_rng: `step` runs the perturbed pass with the random numbers of the clean one, so that
            both see the same dropout masks. SAM compares the loss at two points: it should be one
            function. It is also what makes rho = 0 the optimizer's own step. (`perturbed` does so
            if it is given the state from before the clean pass.)
        sync: under DistributedDataParallel (give it as `model`), whether `step` perturbs every
            process along the gradient of the whole batch. If not, each perturbs along that of its
            own part ("m-sharpness", Foret et al. 2021), which saves one all-reduce a step. Not
            with `static_graph=True`, which torch's `no_sync` does not support.

    Attributes:
        steps: how many steps the optimizer has taken since.

    In half precision most of a perturbation is lost: bfloat16 has 8 bits, and a change of a weight
    by less than half a unit in the last place is rounded away. Keep the parameters in float32 and
    compute in `torch.autocast`: what it rounds then is noise beside the perturbation, not the
    perturbation itself, whose mean stays. Where parameters must be of half precision, the rule
    `perturbations.dithered` does the same for them. Without it, such parameters cause a warning.

    Raises:
        TypeError, ValueError: an argument, or a parameter, is not as described.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> sam = SAM(torch.optim.SGD([w], lr=0.1), rho=0.05)
        >>> sam.step(lambda: w.square().sum())
        tensor(5.)

    Source: Foret et al. 2021, algorithm 1 (arXiv:2010.01412).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float | Callable[[int], float] = 0.05,
        model: nn.Module | None = None,
        *,
        rule: Rule = sam,
        generator: torch.Generator | None = None,
        same_rng: bool = True,
        sync: bool = True,
    ) -> None:
        _check_arguments(optimizer, model, rule, generator, sync)
        self.optimizer, self.rho, self.model, self.rule = optimizer, rho, model, rule
        self.generator, self.same_rng, self.sync = generator, same_rng, sync
        self.steps = 0
        self._draws = generator is not None and "generator" in inspect.signature(rule).parameters
        self._skipped = 0
        self._unread: Tensor | None = None  # skipped on an accelerator, not yet asked for
        self._inside = False
        modules = () if model is None else model.modules()
        self._sharded: list[Any] = [module for module in modules if hasattr(module, "reshard")]
        self.radii()  # a bad one is an error now
        _warn_of_half_precision(self.params, rule)
        self._watch()

    # --- the step ---------------------------------------------------------------------------------

    def step(self, closure: Closure | Iterable[Closure], perturb: str = "batch") -> Tensor:
        """One step: the gradient at w, the gradient at w + eps, the optimizer's step from w.

        Args:
            closure: evaluates the loss at the current weights and returns it, without backward;
                or several, one a micro-batch, whose mean is the loss.
            perturb: with several closures, along which gradient to perturb: that of the whole
                "batch", which gives the step of one large batch, or of each "micro" batch by
                itself, which averages the gradients at as many perturbed points ("m-sharpness").

        Returns:
            The loss at w, detached, on its device.

        The gradients that the optimizer has used stay in `.grad`; older ones are cleared first. A
        gradient that is not finite skips the step: neither weights nor the optimizer's state
        change, and `skipped` counts it. On an accelerator, where knowing this would mean to wait,
        the optimizer gets a gradient of zeros instead.

        To clip the gradient, let the optimizer do it, before its step (a hook returns nothing)::

            def clip(*_):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

            optimizer.register_step_pre_hook(clip)

        Raises:
            TypeError, ValueError: a closure returns no scalar loss, has called backward on it, or
                is none; a gradient is sparse.
        """
        closures = _checked_closures(closure, perturb)
        with torch.enable_grad():
            if not any(self.radii()):
                self._clear()
                loss = self._backward(closures)
            elif perturb == "batch" or len(closures) == 1:
                loss = self._two_passes(closures)
            else:
                loss = self._two_passes_each(closures)
        self._finish()
        return loss

    def _two_passes(self, closures: Sequence[Closure]) -> Tensor:
        """The loss at w; the gradient at w + eps is in `.grad` afterwards."""
        before = self.random_state() if self.same_rng else None
        self._clear()
        with self._unsynced():
            loss = self._backward(closures)
        with self.perturbed(random_state=before):
            self._backward(closures)
        return loss

    def _two_passes_each(self, closures: Sequence[Closure]) -> Tensor:
        """The same with a perturbed point of its own for each closure, gradients averaged."""
        params = self.params
        # sums of our own: DistributedDataParallel may write the next gradients over these
        sums: list[Tensor | None] = [None] * len(params)
        losses = []
        for closure in closures:
            losses.append(self._two_passes([closure]))
            for i, p in enumerate(params):
                if p.grad is not None:
                    part = p.grad / len(closures)
                    total = sums[i]
                    sums[i] = part if total is None else total.add_(part)
        for p, total in zip(params, sums, strict=True):
            p.grad = total
        return torch.stack(losses).mean()

    @contextmanager
    def perturbed(
        self,
        grads: Sequence[Tensor | None] | None = None,
        *,
        random_state: RandomState | None = None,
        scale: float | Tensor | None = None,
    ) -> Iterator[None]:
        """Weights at w + eps inside; exactly as they were afterwards, whatever happens inside.

        The perturbation follows the gradients in `.grad`, which are cleared, so that a backward
        inside leaves there what the optimizer is to see. The gradient of several batches may be
        gathered before the block, and again within. Taking an optimizer step inside is an error.

        Args:
            grads: gradients to follow instead, one (or None) for each of `params`. Then `.grad`
                is left alone and a backward inside adds to it, so that micro-batches can be
                perturbed one by one.
            random_state: what `random_state()` returned before the clean pass: the block then runs
                with the same random numbers, and they go on afterwards as if it had not run.
            scale: what a GradScaler has multiplied the loss with. Only rules that depend on the
                scale of the loss need it: `unnormalized`.

        Raises:
            RuntimeError: called inside itself, or an optimizer step is taken inside.
            ValueError: a gradient is sparse, or does not fit its parameter.
        """
        if self._inside:
            raise RuntimeError("perturbed() inside perturbed(): the weights are at w + eps already")
        moved = self._moved(*self._perturbation(grads, scale))
        if grads is None:
            self._clear()
        with (
            moved,
            self._replayed(random_state),
            kept_buffers(self.model),
            self.optimizer.register_step_pre_hook(_refuse),
        ):
            yield

    @contextmanager
    def _moved(self, params: list[Tensor], epsilon: list[Tensor]) -> Iterator[None]:
        """The weights at w + eps inside, and exactly as they were afterwards."""
        saved = [torch.empty_like(p) for p in params]
        with torch.no_grad():
            if params:
                torch._foreach_copy_(saved, params)
        try:
            self._inside = True
            with torch.no_grad():
                if params:
                    torch._foreach_add_(params, epsilon)
            del epsilon
            self._forget_copies()
            yield
        finally:
            with torch.no_grad():
                if params:
                    torch._foreach_copy_(params, saved)
            self._forget_copies()
            self._inside = False

    @contextmanager
    def _replayed(self, before: RandomState | None) -> Iterator[None]:
        """Random numbers from that state on inside; afterwards as if it had not run."""
        if before is None:
            yield
            return
        now = self.random_state()
        try:
            before.restore()
            yield
        finally:
            now.restore()

    def _perturbation(
        self, grads: Sequence[Tensor | None] | None, scale: float | Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The weights to perturb, of parameters with a gradient and a radius, and by what.

        Sharded ones (`DTensor`) as the shards of this process.
        """
        all_params = self.params
        if grads is None:
            grads = [p.grad for p in all_params]
        elif len(grads) != len(all_params):
            raise ValueError(
                f"grads must have one entry for each of the {len(all_params)} parameters that "
                f"require grad, got {len(grads)}"
            )
        radii_of = self.radii()
        if any(radii_of) and all(g is None for g in grads):
            raise RuntimeError(
                "no parameter has a gradient: perturbed() needs a backward before it"
            )
        params, directions, radii = [], [], []
        for p, g, radius in zip(all_params, grads, radii_of, strict=True):
            if g is None or radius == 0:
                continue
            self._check_kind(p, g)
            if g.shape != p.shape:
                raise ValueError(
                    f"grads: {self._name(p)} has the shape {tuple(p.shape)}, its gradient "
                    f"{tuple(g.shape)}"
                )
            params.append(p)
            directions.append(g)
            radii.append(radius)
        if not params:
            return [], []
        with torch.no_grad():
            if scale is not None:
                # of float16 gradients the quotient would underflow
                directions = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in directions]
                directions = [g / scale for g in directions]
            rho = radii[0] if len(set(radii)) == 1 else radii
            drawn = {"generator": self.generator} if self._draws else {}
            epsilon = self.rule(params, directions, rho, **drawn)
            return [shard(p) for p in params], [shard(e) for e in epsilon]

    # --- what is perturbed ------------------------------------------------------------------------

    @property
    def params(self) -> list[Tensor]:
        """The optimizer's parameters that require grad, in the order of its groups."""
        return [
            p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad
        ]

    def radii(self) -> list[float]:
        """The radius that the next step has for each of `params`."""
        if callable(self.rho):
            rho = check_nonnegative(f"rho({self.steps})", self.rho(self.steps))
        else:
            rho = check_nonnegative("rho", self.rho)
        radii = []
        for i, group in enumerate(self.optimizer.param_groups):
            own = None if "rho" in self.optimizer.defaults else group.get("rho")
            radius = rho if own is None else check_nonnegative(f"rho of parameter group {i}", own)
            radii += [radius for p in group["params"] if p.requires_grad]
        return radii

    def random_state(self) -> RandomState:
        """The state of all random numbers now, to be given to `perturbed`."""
        return RandomState({p.device for p in self.params})

    @property
    def skipped(self) -> int:
        """How many calls of `step` were skipped for a gradient that was not finite."""
        if self._unread is not None:
            self._skipped += int(self._unread)
            self._unread = None
        return self._skipped

    # --- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint has to hold besides the model, the optimizer's state included.

        Numbers, tensors and containers of them: ``torch.load(..., weights_only=True)`` reads it.
        Radius and rule are arguments, and not part of it.
        """
        stateful = getattr(self.rule, "state_dict", None)
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "skipped": self.skipped,
            "generator": None if self.generator is None else self.generator.get_state(),
            "rule": None if stateful is None else stateful(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a run that was saved; training goes on bit for bit.

        Raises:
            ValueError: the state is not one of `state_dict`, or of a SAM with another rule,
                generator or optimizer. Nothing has been loaded then.
        """
        mine = {"optimizer", "steps", "skipped", "generator", "rule"}
        if not isinstance(state, Mapping) or set(state) != mine:
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state must have the keys {sorted(mine)}, got {got}")
        for name, has in (
            ("generator", self.generator is not None),
            ("rule", hasattr(self.rule, "state_dict")),
        ):
            if has != (state[name] is not None):
                there, here = ("no state", "one") if has else ("a state", "none")
                raise ValueError(f"state has {there} of a {name}, and this SAM has {here}")
        steps, skipped = int(state["steps"]), int(state["skipped"])
        if self.generator is not None:
            try:
                torch.Generator(self.generator.device).set_state(state["generator"].cpu())
            except (AttributeError, RuntimeError, TypeError) as error:
                raise ValueError(f"state is not of a generator like this one: {error}") from error
        rule: Any = self.rule
        was = None if state["rule"] is None else rule.state_dict()
        try:
            if was is not None:
                rule.load_state_dict(state["rule"])
            load_optimizer(self.optimizer, state["optimizer"])
        except Exception:
            if was is not None:
                rule.load_state_dict(was)
            raise
        if self.generator is not None:
            self.generator.set_state(state["generator"].cpu())
        self.steps, self._skipped, self._unread = steps, skipped, None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a copy's optimizer comes without hooks
        self.__dict__.update(state)
        self._watch()

    # --- gradients --------------------------------------------------------------------------------

    def _backward(self, closures: Sequence[Closure]) -> Tensor:
        """The mean loss, detached; its gradient is added to `.grad`."""
        params = self.params
        losses = []
        for closure in closures:
            grads = [p.grad for p in params]
            loss = closure()
            if any(p.grad is not g for p, g in zip(params, grads, strict=True)):
                raise ValueError(
                    "the closure must leave the gradients alone: return the loss without calling "
                    "backward on it"
                )
            if not isinstance(loss, Tensor):
                raise TypeError(f"the closure must return the loss, a tensor; got {loss!r:.80}")
            if loss.numel() != 1 or not loss.requires_grad:
                raise ValueError(
                    "the closure must return a scalar loss that depends on the parameters; got "
                    f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
                )
            part = loss.reshape(()) if len(closures) == 1 else loss.reshape(()) / len(closures)
            try:
                part.backward()
            except RuntimeError as error:
                if "second time" in str(error):
                    message = "the closure must run the model anew each time, backward needs it"
                    raise ValueError(message) from error
                raise
            losses.append(loss.detach().reshape(()))
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def _unsynced(self) -> AbstractContextManager[Any]:
        """The forward has to be inside too: it decides whether the backward will synchronise."""
        local = None if self.sync else getattr(self.model, "no_sync", None)
        return nullcontext() if local is None else local()

    def _finish(self) -> None:
        """The optimizer's step, unless the gradient is not finite."""
        owners = [p for p in self.params if p.grad is not None]
        grads = [p.grad for p in owners if p.grad is not None]
        if not grads:
            self.optimizer.step()
            return
        for p, grad in zip(owners, grads, strict=True):
            self._check_kind(p, grad)
        finite = torch.isfinite(global_norm(grads))
        if finite.device.type == "cpu":  # the host knows already, and nothing waits
            if finite:
                self.optimizer.step()
            else:
                self._skipped += 1
            return
        for p, grad in zip(owners, grads, strict=True):
            p.grad = torch.where(finite.to(grad.device), grad, 0)
        self.optimizer.step()
        missed = (~finite).long()
        self._unread = missed if self._unread is None else self._unread + missed

    # --- around the step --------------------------------------------------------------------------

    def __repr__(self) -> str:
        name = type(self.optimizer).__name__
        return f"SAM({name}, rho={self.rho}, rule={_rule_name(self.rule)})"

    def _check_kind(self, p: Tensor, g: Tensor) -> None:
        if g.layout != torch.strided or g.is_complex():
            raise ValueError(
                "SAM needs dense and real gradients; that of "
                f"{self._name(p)} is {g.dtype}, {g.layout} (an embedding: give sparse=False)"
            )

    def _forget_copies(self) -> None:
        """Drop the copies that a forward would take in place of weights that have changed."""
        torch.clear_autocast_cache()  # a surrounding autocast block keeps low-precision ones
        for module in self._sharded:  # FSDP2 keeps the root's gathered ones after a forward
            module.reshard()

    def _clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _name(self, p: Tensor) -> str:
        named = self.model.named_parameters() if self.model is not None else ()
        for name, q in named:
            if q is p:
                return f"parameter {name!r}"
        return f"a parameter of shape {tuple(p.shape)} (give SAM the model to have its name)"

    def _watch(self) -> None:
        """Count the optimizer's steps, whoever takes them; one that a scaler skips is none."""
        reference = weakref.ref(self)

        def count(*_: Any) -> None:
            owner = reference()
            if owner is not None:
                owner.steps += 1

        # an optimizer may outlive many of us: the hook goes when we do
        weakref.finalize(self, self.optimizer.register_step_post_hook(count).remove)


def _processes() -> int:
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def _rule_name(rule: Rule) -> str:
    return getattr(rule, "__name__", None) or repr(rule)


def _refuse(*_: Any) -> None:
    raise RuntimeError(
        "optimizer.step() inside perturbed() would step from the perturbed weights, and be undone: "
        "take it after the block"
    )


# --- what comes in --------------------------------------------------------------------------------


def _check_arguments(optimizer: Any, model: Any, rule: Any, generator: Any, sync: bool) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, ready made: "
            f"SAM(torch.optim.SGD(model.parameters(), lr=0.1)); got {optimizer!r:.80}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "optimizer must step along one gradient, which LBFGS does not: it evaluates the "
            "loss as often as it likes"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    if not callable(rule):
        raise TypeError(f"rule must be a function of sam_lab.perturbations, got {rule!r:.80}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {generator!r:.80}")
    if not sync and not hasattr(model, "no_sync") and _processes() > 1:
        raise ValueError(
            "sync=False needs model=, wrapped in DistributedDataParallel: it is the wrapper "
            f"that can leave gradients apart; got {type(model).__name__}"
        )
    drawing = inspect.signature(rule).parameters.get("generator")
    if generator is None and drawing and drawing.default is drawing.empty:
        raise ValueError(
            f"the rule {_rule_name(rule)} draws random numbers: give generator=torch.Generator()"
        )


def _warn_of_half_precision(params: Sequence[Tensor], rule: Rule) -> None:
    if getattr(rule, "func", rule) is dithered:  # a partial has the rule inside
        return
    if any(p.dtype in HALF for p in params):
        warnings.warn(
            "some parameters are of half precision, which rounds most of a perturbation away: "
            "keep them in float32 and compute in torch.autocast, or give SAM rule=dithered",
            stacklevel=3,
        )


def _checked_closures(closure: Any, perturb: str) -> list[Closure]:
    if perturb not in ("batch", "micro"):
        raise ValueError(f'perturb must be "batch" or "micro", got {perturb!r}')
    try:
        closures = [closure] if callable(closure) else list(closure)
    except TypeError:
        closures = []
    if not closures or not all(map(callable, closures)):
        raise TypeError(f"closure must be a function or a list of functions, got {closure!r:.80}")
    return closures
