"""Simulate the reverse process and keep what the learners and the certificate need of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .denoise import Denoiser
from .noise import normal
from .transition import Gaussian, half_square, transition

Times = tuple[float, ...]
PriorStep = Callable[[Tensor], Gaussian]  # of x_t
# x_t, z, the prior's mean → x_s and the whitened control
ControlledStep = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass
class Trajectory:
    """Hold N steps of B paths."""

    times: Times  # t_0 > … > t_N
    x: Tensor  # states (N + 1, B, *)
    z: Tensor  # noise of each step (N, B, *), x_{i+1} = mean_i + std_i z_i
    x_0: Tensor | None  # (B, *), the prior's denoiser at the last state; None if not read out
    kl: Tensor | None = None  # (N, B), KL of each step against the prior's in nats; None if not compared
    log_ratio: Tensor | None = None  # (N, B), log p_g/p_pre of each step, same expectation as kl; None if not compared

    @property
    def end(self) -> Tensor:
        """x_0 of a path that was read out."""
        assert self.x_0 is not None
        return self.x_0

    def to(self, device: torch.device) -> "Trajectory":
        """Move states and noise, which are nearly all of it, to another device."""
        return replace(self, x=self.x.to(device), z=self.z.to(device))

    @classmethod
    def from_parts(cls, parts: "list[Trajectory]") -> "Trajectory":
        """Concatenate the paths of micro-batches."""
        if len(parts) == 1:
            return parts[0]

        def joined(name: str, dim: int) -> Tensor | None:
            values = [value for part in parts if (value := getattr(part, name)) is not None]
            return torch.cat(values, dim) if values else None

        x, z = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("x", "z"))
        return cls(parts[0].times, x, z, joined("x_0", 0), joined("kl", 1), joined("log_ratio", 1))


def read_out(denoiser: Denoiser, x_end: Tensor, t_end: float, **cond: Tensor) -> Tensor:
    """Return x_0 (B, *) of the chain's last state: always by the prior's denoiser, as part of the reward."""
    return denoiser.prior(x_end, t_end, **cond)


class Checkpointed(torch.autograd.Function):
    """Take a step of a chain that keeps its state and noise alone and is recomputed on the way back.

    As `torch.utils.checkpoint` does, but without a hook on every tensor that a network saves (docs/why/performance.md),
    without a graph on the way there, and on the way back with the graph of one evaluation at a time, the prior's first.
    """

    @staticmethod
    def forward(
        context: Any, step: ControlledStep, prior: PriorStep | None, x_t: Tensor, z: Tensor, *trained: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return x_s and the whitened control; `trained` are the parameters that `step` has a gradient for."""
        context.step, context.prior = step, prior
        context.save_for_backward(x_t, z, *trained)
        context.set_materialize_grads(False)
        return step(x_t, z, prior(x_t).mean if prior else None)

    @staticmethod
    @once_differentiable
    def backward(context: Any, grad_x_s: Tensor | None, grad_u: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the state, the noise and the parameters."""
        x_t, z, *trained = context.saved_tensors
        needs = context.needs_input_grad[2:]
        x_t, z = (tensor.detach().requires_grad_(need) for tensor, need in zip((x_t, z), needs, strict=False))
        grad_prior = None
        if context.prior and x_t.requires_grad and grad_u is not None:  # u = (mean_g − mean_pre)/std
            with torch.enable_grad():
                pre = context.prior(x_t)
            (grad_prior,) = torch.autograd.grad(pre.mean, x_t, -(grad_u / pre.std))
        with torch.enable_grad():
            # the gradient of u does not depend on where the prior's mean is
            x_s, u = context.step(x_t, z, x_t.detach() if context.prior else None)
            # the prior's part of x_t's gradient comes first in the sum, as if both networks were one graph
            pairs = [(x_s, grad_x_s), (u, grad_u), (x_t.view_as(x_t), grad_prior)]
        # a step whose labels are all null depends on no parameter
        pairs = [(output, grad) for output, grad in pairs if grad is not None and output.requires_grad]
        inputs = [tensor for tensor, need in zip((x_t, z, *trained), needs, strict=True) if need]
        outputs, grads = zip(*pairs, strict=True) if pairs else ((), ())
        gradients = iter(torch.autograd.grad(outputs, inputs, grads, allow_unused=True))
        return None, None, *(next(gradients) if need else None for need in needs)


def rollout(
    denoiser: Denoiser, x_1: Tensor, times: Times, eta: float = 1.0, generator: torch.Generator | None = None,
    compare: bool = False, read: bool = True, cond: dict[str, Tensor] | None = None,
    at_state: Callable[[int, Tensor], Tensor] | None = None, noise: Sequence[Tensor] | None = None, **control: Any,
) -> Trajectory:  # fmt: skip
    """Simulate from noise to data.

    Under a gradient the graph holds the states only: every step is recomputed on the way back (checkpointing), with its
    labels set inside.

    Args:
        x_1: (B, *), standard normal.
        times: the chain's grid (`Schedule.times`).
        eta: churn.
        compare: also measure each step against the prior (one more evaluation a step at which a control speaks).
        read: also read out x_0 (one evaluation).
        cond: the prior's own conditions, B rows each.
        at_state: (i, x_i) → x_i, called before every step and at the end; cuts or clips the gradient.
        noise: of each step (B, *); None draws it from the generator.
        control: labels, strength and gamma, for a policy.
    """
    cond = {name: row.to(x_1.device) for name, row in (cond or {}).items()}
    trained = [p for p in denoiser.parameters() if p.requires_grad] if torch.is_grad_enabled() else []

    def controlled(x_t: Tensor, z: Tensor, mean: Tensor | None, t: float, s: float) -> tuple[Tensor, Tensor | None]:
        step = transition(denoiser, x_t, t, s, eta, **control, **cond)
        return step.rsample(z), None if mean is None else step.control(Gaussian(mean, step.std))

    def prior(x_t: Tensor, t: float, s: float) -> Gaussian:
        return transition(denoiser.prior, x_t, t, s, eta, **cond)

    x_t, states, noises, kl, log_ratio = x_1, [x_1], [], [], []
    for i, (t, s) in enumerate(pairwise(times)):
        z = normal(x_t.shape, x_t, generator) if noise is None else noise[i]
        if at_state:
            x_t = at_state(i, x_t)
        speaks = denoiser.speaks(t, **control)
        step, prior_step = partial(controlled, t=t, s=s), partial(prior, t=t, s=s) if compare and speaks else None
        if torch.is_grad_enabled():
            x_t, u = Checkpointed.apply(step, prior_step, x_t, z, *(trained if speaks else ()))  # type: ignore[no-untyped-call]
        else:
            x_t, u = step(x_t, z, prior_step(x_t).mean if prior_step else None)
        states.append(x_t)
        noises.append(z)
        if compare:
            kl.append(x_t.new_zeros(len(x_t)) if u is None else half_square(u))
            log_ratio.append(kl[-1] if u is None else kl[-1] + (u * z).flatten(1).sum(1))
    end = at_state(len(times) - 1, x_t) if at_state else x_t
    x_0 = read_out(denoiser, end, times[-1], **cond) if read else None
    compared = {"kl": torch.stack(kl), "log_ratio": torch.stack(log_ratio)} if compare else {}
    return Trajectory(times, torch.stack(states), torch.stack(noises), x_0, **compared)
