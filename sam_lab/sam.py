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

How often the loss is looked at, and what descends, can be something else: a `method` of
`sam_lab.methods` is another member of the family, from GSAM to Momentum-SAM, and has
``sam.step(closure)``.

Weight decay of the optimizer takes part in the step and not in the perturbation. The original code
has it in both; to have that, leave it out of the optimizer and add it to the loss.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sam_lab._checks import check_nonnegative
from sam_lab.methods import Method, State, plain
from sam_lab.objective import Closure
from sam_lab.perturbations import HALF, Rule, dithered, global_norm, sam, shard
from sam_lab.state import RandomState, check_state, kept_buffers, load_optimizer

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
        method: how often a step looks at the loss and what descends, a function of
            `sam_lab.methods` or one like them. Its state is part of checkpoints.
        generator: handed to rule and method as `generator=`, where they draw; part of checkpoints.
        same_rng: `step` runs the perturbed pass with the random numbers of the clean one, so that
            both see the same dropout masks. SAM compares the loss at two points: it should be one
            function. It is also what makes rho = 0 the optimizer's own step. (`perturbed` does so
            if it is given the state from before the clean pass.)
        sync: under DistributedDataParallel (give it as `model`), whether `step` perturbs every
            process along the gradient of the whole batch. If not, each perturbs along that of its
            own part ("m-sharpness", Foret et al. 2021), which saves one all-reduce a step. Not
            with `static_graph=True`, which torch's `no_sync` does not support, nor with a method.

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
        method: Method = plain,
        generator: torch.Generator | None = None,
        same_rng: bool = True,
        sync: bool = True,
    ) -> None:
        _check_arguments(optimizer, model, rule, method, generator, sync)
        self.optimizer, self.rho, self.model, self.rule = optimizer, rho, model, rule
        self.method, self.generator, self.same_rng, self.sync = method, generator, same_rng, sync
        self.steps = 0
        self._state: State = {}  # of the method
        self._draws, self._method_draws = (
            generator is not None and "generator" in inspect.signature(function).parameters
            for function in (rule, method)
        )
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

        With a method, the gradients that it looks at and the direction that it makes of them.

        Args:
            closure: evaluates the loss at the current weights and returns it, without backward;
                or several, one a micro-batch, whose mean is the loss. One that takes a keyword
                `examples`, an index into its batch that is all of it by default, may return the
                losses (N,) of those, whose mean is the loss.
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
        if self._inside:
            raise RuntimeError("step() inside perturbed(): the weights are at w + eps already")
        state = self._state
        seen: list[Tensor] = []
        with torch.enable_grad():
            if not any(self.radii()):
                self._clear()
                loss, _ = self._backward(closures)
            elif perturb == "batch" or len(closures) == 1:
                loss, state, seen = self._directed(closures)
            else:
                loss = self._directed_each(closures)
        # plain SAM needs the gradient at the end to be finite; others may keep what they saw before
        self._finish(state, [] if self.method is plain else seen)
        return loss

    def _directed(self, closures: Sequence[Closure]) -> tuple[Tensor, State, list[Tensor]]:
        """The first look's loss, the method's next state, the losses of all looks.

        The direction is in `.grad` afterwards.
        """
        look = _Look(self, closures)
        drawn = {"generator": self.generator} if self._method_draws else {}
        self._check_state(self._state)
        with torch.no_grad():
            direction, state = self.method(look, dict(self._state), **drawn)
        if not look.seen:
            raise ValueError(f"the method {_name_of(self.method)} has not looked at the loss")
        look.descend(direction)
        self._check_state(state)
        return look.seen[0], state, look.seen

    def _directed_each(self, closures: Sequence[Closure]) -> Tensor:
        """The same for each closure by itself, directions averaged."""
        params = self.params
        # sums of our own: DistributedDataParallel may write the next gradients over these
        sums: list[Tensor | None] = [None] * len(params)
        losses = []
        for closure in closures:
            loss, state, _ = self._directed([closure])
            if state:
                raise ValueError(
                    f'perturb="micro" is for methods without a state, and {_name_of(self.method)} '
                    "has one, which one step should change once"
                )
            losses.append(loss)
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
            RuntimeError: called inside itself, or an optimizer step is taken inside, or this SAM
                has a method other than `plain`, whose step has another middle.
            ValueError: a gradient is sparse, or does not fit its parameter.
        """
        if self._inside:
            raise RuntimeError("perturbed() inside perturbed(): the weights are at w + eps already")
        if self.method is not plain:
            raise RuntimeError(
                "perturbed() is the middle of a plain step, and this SAM has the method "
                f"{_name_of(self.method)}, which needs step(closure)"
            )
        moved = self._moved(*self._perturbation(grads, scale))
        if grads is None:
            self._clear()
        with moved, self._again(random_state):
            yield

    @contextmanager
    def _again(self, random_state: RandomState | None) -> Iterator[None]:
        """A further pass of a step, which leaves random numbers and buffers to the first."""
        with self._replayed(random_state), kept_buffers(self.model):
            yield

    @contextmanager
    def _moved(self, params: list[Tensor], epsilon: list[Tensor]) -> Iterator[None]:
        """The weights at w + eps inside, and exactly as they were afterwards."""
        saved = [torch.empty_like(p) for p in params]
        with torch.no_grad():
            if params:
                torch._foreach_copy_(saved, params)
        refusing = self.optimizer.register_step_pre_hook(_refuse)
        try:
            self._inside = True
            with torch.no_grad():
                if params:
                    torch._foreach_add_(params, epsilon)
            del epsilon
            self._forget_copies()
            yield
        finally:
            refusing.remove()
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
        params, epsilon = self._ruled(grads, scale)
        return [shard(p) for p in params], [shard(e) for e in epsilon]

    def _ruled(
        self,
        grads: Sequence[Tensor | None] | None,
        scale: float | Tensor | None = None,
        rule: Rule | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The same before they are shards; by another rule if one is given."""
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
        self._check_kinds(params, directions)
        with torch.no_grad():
            if scale is not None:
                # of float16 gradients the quotient would underflow
                directions = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in directions]
                directions = [g / scale for g in directions]
            rho = radii[0] if len(set(radii)) == 1 else radii
            if rule is not None:
                return params, rule(params, directions, rho)
            drawn = {"generator": self.generator} if self._draws else {}
            return params, self.rule(params, directions, rho, **drawn)

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
        # to hash a device takes a microsecond, which many small parameters would feel
        return RandomState({p.device for p in self.params if not p.is_cpu})

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
        of_method = {"name": _name_of(self.method), "state": dict(self._state)}
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "skipped": self.skipped,
            "generator": None if self.generator is None else self.generator.get_state(),
            "rule": None if stateful is None else stateful(),
            **({"method": of_method} if self._state else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a run that was saved; training goes on bit for bit.

        Raises:
            ValueError: the state is not one of `state_dict`, or of a SAM with another rule,
                generator or optimizer. Nothing has been loaded then.
        """
        check_state(state, ("optimizer", "steps", "skipped", "generator", "rule"), ("method",))
        for name, has in (
            ("generator", self.generator is not None),
            ("rule", hasattr(self.rule, "state_dict")),
        ):
            if has != (state[name] is not None):
                there, here = ("no state", "one") if has else ("a state", "none")
                raise ValueError(f"state has {there} of a {name}, and this SAM has {here}")
        of_method = self._checked_method(state.get("method"))
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
        self._state = of_method

    def load_method(self, saved: Mapping[str, Any] | None) -> None:
        """Take up a copy of the state of a method, which `state_dict` has under "method", alone.

        Raises:
            ValueError: it is of another method, or of other parameters.
        """
        self._state = self._checked_method(saved)

    def _checked_method(self, saved: Mapping[str, Any] | None) -> State:
        """A copy of the method's state as it was saved, on the devices of the parameters."""
        if saved is None:
            return {}
        if saved["name"] != _name_of(self.method):
            raise ValueError(
                f"state is of the method {saved['name']}, and this SAM has {_name_of(self.method)}"
            )
        self._check_state(saved["state"])
        return {
            name: [
                t.detach().to(p.device, copy=True) for t, p in zip(value, self.params, strict=True)
            ]
            if isinstance(value, list)
            else value
            for name, value in saved["state"].items()
        }

    def _check_state(self, state: Any) -> None:
        name = _name_of(self.method)
        if not isinstance(state, dict):
            raise TypeError(f"the method {name} must return a dict as its state, got {state!r:.80}")
        shapes = [p.shape for p in self.params] if state else []
        for key, value in state.items():
            if isinstance(value, list):
                if [getattr(t, "shape", None) for t in value] != shapes:
                    raise ValueError(
                        f"the state {key!r} of the method {name} must have one tensor for each of "
                        f"the {len(shapes)} parameters that require grad, of its shape"
                    )
            elif not isinstance(value, bool | int | float | str):
                raise TypeError(
                    f"the state {key!r} of the method {name} must be a number or a list of "
                    f"tensors, got {type(value).__name__}"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a copy's optimizer comes without hooks
        self.__dict__.update(state)
        self._watch()

    # --- gradients --------------------------------------------------------------------------------

    def _backward(
        self, closures: Sequence[Closure], examples: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The mean loss, detached, whose gradient is added to `.grad`; and those of examples.

        Those are there where there is one closure, and it takes `examples`.
        """
        params = self.params
        losses, each = [], None
        for closure in closures:
            grads = [p.grad for p in params]
            loss = self._evaluated(closure, examples)
            if any(p.grad is not g for p, g in zip(params, grads, strict=True)):
                raise ValueError(
                    "the closure must leave the gradients alone: return the loss without calling "
                    "backward on it"
                )
            if loss.ndim and _takes_examples(closure):
                each, loss = loss.detach(), loss.mean()
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
        if len(losses) == 1:
            return losses[0], each
        return torch.stack(losses).mean(), None

    @staticmethod
    def _evaluated(closure: Callable[..., Any], examples: Tensor | None = None) -> Tensor:
        """What the closure returns: a loss, or losses (N,) of the examples that are named."""
        loss = closure() if examples is None else closure(examples=examples)
        if not isinstance(loss, Tensor):
            raise TypeError(f"the closure must return the loss, a tensor; got {loss!r:.80}")
        return loss

    def _unsynced(self) -> AbstractContextManager[Any]:
        """The forward has to be inside too: it decides whether the backward will synchronise."""
        local = None if self.sync else getattr(self.model, "no_sync", None)
        return nullcontext() if local is None else local()

    def _finish(self, state: State, seen: Sequence[Tensor]) -> None:
        """The optimizer's step and the method's new state, unless something is not finite."""
        owners = [p for p in self.params if p.grad is not None]
        grads = [p.grad for p in owners if p.grad is not None]
        if not grads:
            self.optimizer.step()
            self._state = state
            return
        self._check_kinds(owners, grads)
        old = {id(t) for value in self._state.values() if isinstance(value, list) for t in value}
        new = [t for value in state.values() if isinstance(value, list) for t in value]
        finite = torch.isfinite(global_norm([*grads, *seen, *(t for t in new if id(t) not in old)]))
        if finite.device.type == "cpu":  # the host knows already, and nothing waits
            if finite:
                self.optimizer.step()
                self._state = state
            else:
                self._skipped += 1
            return
        for p, grad in zip(owners, grads, strict=True):
            p.grad = torch.where(finite.to(grad.device), grad, 0)
        self.optimizer.step()
        self._state = {
            name: _chosen(finite, value, self._state.get(name))
            if isinstance(value, list)
            else value
            for name, value in state.items()
        }
        missed = (~finite).long()
        self._unread = missed if self._unread is None else self._unread + missed

    # --- around the step --------------------------------------------------------------------------

    def __repr__(self) -> str:
        name = type(self.optimizer).__name__
        method = "" if self.method is plain else f", method={_name_of(self.method)}"
        return f"SAM({name}, rho={self.rho}, rule={_rule_name(self.rule)}{method})"

    def _check_kinds(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        # many small parameters would feel a call for each, or a search for names
        if all(g.layout is torch.strided and not g.is_complex() for g in grads):
            return
        for p, g in zip(params, grads, strict=True):
            if g.layout is torch.strided and not g.is_complex():
                continue
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


class _Look:
    """The oracle of one step; what it does for a method says `sam_lab.methods.Look`."""

    def __init__(self, sam: SAM, closures: Sequence[Closure]) -> None:
        self._sam, self._closures, self.params = sam, closures, sam.params
        self._before = sam.random_state() if sam.same_rng else None
        self.seen: list[Tensor] = []  # the loss of each look
        self._each: Tensor | None = None
        self._reached = [False] * len(self.params)
        self._zeros: dict[int, Tensor] = {}  # in place of gradients that are not there
        # its gradients are views that the next pass writes over
        self._views = bool(getattr(sam.model, "gradient_as_bucket_view", False))

    @property
    def loss(self) -> Tensor:
        if not self.seen:
            raise ValueError("look.loss needs a look before it")
        return self.seen[-1]

    @property
    def rho(self) -> float:
        radii = {radius for radius in self._sam.radii() if radius}
        if len(radii) != 1:
            raise ValueError(
                f"the method {_name_of(self._sam.method)} divides by rho and needs one for all "
                f"that is perturbed, got {sorted(radii)}"
            )
        return radii.pop()

    def __call__(self) -> list[Tensor]:
        with nullcontext() if self.seen else self._sam._unsynced():
            return self._gradient(nullcontext())

    def along(self, direction: Sequence[Tensor], rule: Rule | None = None) -> list[Tensor]:
        params, epsilon = self._sam._ruled(self._present(direction), rule=rule)
        del direction
        moved = self._sam._moved([shard(p) for p in params], [shard(e) for e in epsilon])
        del epsilon
        return self._gradient(moved)

    def at(self, epsilon: Sequence[Tensor], examples: Tensor | None = None) -> list[Tensor]:
        return self._gradient(self._moved(epsilon), examples)

    def epsilon(self, direction: Sequence[Tensor], rule: Rule | None = None) -> list[Tensor]:
        params, moved = self._sam._ruled(self._present(direction), rule=rule)
        found = {id(p): e for p, e in zip(params, moved, strict=True)}
        return [found[id(p)] if id(p) in found else torch.zeros_like(p) for p in self.params]

    def losses(self, epsilon: Sequence[Tensor] | None = None) -> Tensor:
        self._check_examples()
        if epsilon is None:
            if not self.seen:
                raise ValueError("look.losses() needs a look before it")
            return self._checked_each(self._each)
        with self._moved(epsilon), self._again():
            losses = self._checked_each(self._sam._evaluated(self._closures[0]))
        self.seen.append(losses.mean())
        return losses

    def momentum(self) -> list[Tensor]:
        found, optimizer = [], self._sam.optimizer
        for group in optimizer.param_groups:
            key = "momentum_buffer" if group.get("momentum") else "exp_avg"
            if key == "exp_avg" and "betas" not in group:
                raise ValueError(
                    f"the method {_name_of(self._sam.method)} needs an optimizer with momentum, "
                    f"which this {type(optimizer).__name__} does not keep"
                )
            for p in group["params"]:
                if p.requires_grad:
                    average = optimizer.state.get(p, {}).get(key)
                    found.append(torch.zeros_like(p) if average is None else average)
        return found

    def descend(self, direction: Sequence[Tensor]) -> None:
        """Leave the direction in `.grad`; nothing where no look has found a gradient."""
        name = _name_of(self._sam.method)
        shapes = [p.shape for p in self.params]
        if [getattr(d, "shape", None) for d in direction] != shapes:
            raise ValueError(
                f"the method {name} must return one tensor for each of the {len(shapes)} "
                "parameters that require grad, of its shape"
            )
        for p, d in zip(self.params, self._present(direction), strict=True):
            if d is not None and (d.dtype is not p.dtype or d.requires_grad):
                d = d.detach().to(p.dtype)
            p.grad = d

    def _gradient(
        self, moved: AbstractContextManager[Any], examples: Tensor | None = None
    ) -> list[Tensor]:
        """A pass within that context, and the gradient, which `.grad` then has no more."""
        if examples is not None:
            self._check_examples()
        with moved, self._again(), torch.enable_grad():
            self._sam._clear()
            loss, self._each = self._sam._backward(self._closures, examples)
        self.seen.append(loss)
        grads: list[Tensor] = []
        reached = [p for p in self.params if p.grad is not None]
        self._sam._check_kinds(reached, [p.grad for p in reached if p.grad is not None])
        for i, p in enumerate(self.params):
            if p.grad is None:
                if i not in self._zeros:
                    self._zeros[i] = torch.zeros_like(p)
                grads.append(self._zeros[i])
                continue
            self._reached[i] = True
            grads.append(p.grad.clone() if self._views else p.grad)
            p.grad = None
        return grads

    def _again(self) -> AbstractContextManager[Any]:
        """The first look moves running statistics and random numbers, others do not."""
        return self._sam._again(self._before) if self.seen else nullcontext()

    def _moved(self, epsilon: Sequence[Tensor]) -> AbstractContextManager[Any]:
        return self._sam._moved([shard(p) for p in self.params], [shard(e) for e in epsilon])

    def _present(self, direction: Sequence[Tensor]) -> list[Tensor | None]:
        """A direction with None where there is no gradient: it is neither moved nor used."""
        return [
            None if d is self._zeros.get(i, ...) or (self.seen and not reached) else d
            for i, (d, reached) in enumerate(zip(direction, self._reached, strict=True))
        ]

    def _check_examples(self) -> None:
        if len(self._closures) != 1 or not _takes_examples(self._closures[0]):
            self._refuse_examples()
        if _processes() > 1:
            raise ValueError(
                f"the method {_name_of(self._sam.method)} selects among the examples of one "
                f"process, and there are {_processes()}"
            )

    def _checked_each(self, losses: Tensor | None) -> Tensor:
        if losses is None or losses.ndim != 1:
            self._refuse_examples()
        return losses

    def _refuse_examples(self) -> NoReturn:
        raise ValueError(
            f"the method {_name_of(self._sam.method)} selects examples: give step one closure that "
            "takes examples=, an index into the batch, and returns their losses (N,)"
        )


def _processes() -> int:
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def _rule_name(rule: Rule) -> str:
    return getattr(rule, "__name__", None) or repr(rule)


def _name_of(method: Any) -> str:
    return _rule_name(getattr(method, "func", method))  # a partial has the method inside


def _takes_examples(closure: Callable[..., Any]) -> bool:
    return "examples" in inspect.signature(closure).parameters


def _chosen(finite: Tensor, new: list[Tensor], old: list[Tensor] | None) -> list[Tensor]:
    """The new state where all is finite, else the old, zeros if there was none."""
    before: Sequence[Tensor | int] = [0] * len(new) if old is None else old
    return [torch.where(finite.to(t.device), t, was) for t, was in zip(new, before, strict=True)]


def _refuse(*_: Any) -> None:
    raise RuntimeError(
        "optimizer.step() inside perturbed() would step from the perturbed weights, and be undone: "
        "take it after the block"
    )


# --- what comes in --------------------------------------------------------------------------------


def _check_arguments(
    optimizer: Any, model: Any, rule: Any, method: Any, generator: Any, sync: bool
) -> None:
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
    if not callable(method):
        raise TypeError(f"method must be a function of sam_lab.methods, got {method!r:.80}")
    if not sync and method is not plain:
        raise ValueError(
            f"sync=False is for plain SAM: the method {_name_of(method)} blends gradients, which "
            "have to be those of the whole batch"
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {generator!r:.80}")
    if not sync and not hasattr(model, "no_sync") and _processes() > 1:
        raise ValueError(
            "sync=False needs model=, wrapped in DistributedDataParallel: it is the wrapper "
            f"that can leave gradients apart; got {type(model).__name__}"
        )
    for kind, function, name in (
        ("rule", rule, _rule_name(rule)),
        ("method", method, _name_of(method)),
    ):
        drawing = inspect.signature(function).parameters.get("generator")
        if generator is None and drawing and drawing.default is drawing.empty:
            raise ValueError(
                f"the {kind} {name} draws random numbers: give generator=torch.Generator()"
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
