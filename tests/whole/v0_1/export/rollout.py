"""Simulate the reverse process and keep what the learners and the certificate read off it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .denoise import Denoiser
from .transition import Gaussian, half_square, transition

Times = tuple[float, ...]
EVERY = slice(None)
PriorStep = Callable[[Tensor], Gaussian]  # of x_t
# x_t, z, the prior's mean → x_s and the whitened control
OwnStep = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass
class Trajectory:
    """N steps of B paths.

    Args:
        times: t_0 > … > t_N.
        x: states (N + 1, B, *).
        z: noise of each step (N, B, *), x_{i+1} = mean_i + std_i z_i.
        x_0: (B, *), the prior's denoiser at the last state; None if not read.
        kl: (N, B), KL of each step against the prior's in nats; None if not compared.
        log_ratio: (N, B), log p_g/p_pre of each step in nats, same expectation as kl; None if not compared.
    """

    times: Times
    x: Tensor
    z: Tensor
    x_0: Tensor | None
    kl: Tensor | None = None
    log_ratio: Tensor | None = None

    def kept(self, device: torch.device) -> "Trajectory":
        """The same with states and noise, which are nearly all of it, on another device."""
        return replace(self, x=self.x.to(device), z=self.z.to(device))

    @classmethod
    def joined(cls, parts: "list[Trajectory]") -> "Trajectory":
        """Paths of one chain as one."""
        if len(parts) == 1:
            return parts[0]
        rows = {name: [getattr(part, name) for part in parts] for name in ("x", "z", "kl", "log_ratio")}
        found = {name: None if each[0] is None else torch.cat(each, dim=1) for name, each in rows.items()}
        read = [part.x_0 for part in parts if part.x_0 is not None]
        return cls(parts[0].times, x_0=torch.cat(read) if read else None, **found)


def normal(
    shape: Sequence[int], like: Tensor | Denoiser, generator: torch.Generator | None = None, rows: slice = EVERY
) -> Tensor:
    """Standard normal noise where `like` is, drawn where the generator is: a seed means the same on every device.

    Some rows of it are what they are among all.
    """
    dtype = like.dtype if isinstance(like, Tensor) else None
    source = generator.device if generator else "cpu"
    return torch.randn(*shape, generator=generator, dtype=dtype, device=source)[rows].to(like.device)


def read_out(denoiser: Denoiser, x_end: Tensor, t_end: float, **cond: Tensor) -> Tensor:
    """x_0 (B, *) from the chain's last state: always the prior's denoiser, part of the reward map."""
    return denoiser.prior(x_end, t_end, **cond)


class Checkpointed(torch.autograd.Function):
    """A step of a chain that keeps its state and noise alone, and is computed again on the way back.

    As `torch.utils.checkpoint` does, but without a hook on every tensor that a network saves (docs/performance.md),
    without a graph on the way there, and on the way back with the graph of one evaluation at a time, the prior's first.
    """

    @staticmethod
    def forward(
        context: Any, own: OwnStep, prior: PriorStep | None, x_t: Tensor, z: Tensor, *trained: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """x_s and the whitened control; `trained` are the parameters that own has a gradient for."""
        context.own, context.prior = own, prior
        context.save_for_backward(x_t, z, *trained)
        context.set_materialize_grads(False)
        return own(x_t, z, prior(x_t).mean if prior else None)

    @staticmethod
    @once_differentiable
    def backward(context: Any, of_x_s: Tensor | None, of_u: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient for the state, the noise and the parameters."""
        x_t, z, *trained = context.saved_tensors
        asked = context.needs_input_grad[2:]
        x_t, z = (tensor.detach().requires_grad_(need) for tensor, need in zip((x_t, z), asked, strict=False))
        through_prior = None
        if context.prior and x_t.requires_grad and of_u is not None:  # u = (mean_g − mean_pre)/std
            with torch.enable_grad():
                pre = context.prior(x_t)
            (through_prior,) = torch.autograd.grad(pre.mean, x_t, -(of_u / pre.std))
        with torch.enable_grad():
            # the gradient of u does not depend on where the prior's mean is
            x_s, u = context.own(x_t, z, x_t.detach() if context.prior else None)
            # what the prior asks of x_t is the first of the sum, as if both networks were one graph
            told = [(x_s, of_x_s), (u, of_u), (x_t.view_as(x_t), through_prior)]
        # a step whose labels are all null depends on no parameter
        told = [(y, given) for y, given in told if given is not None and y.requires_grad]
        wanted = [tensor for tensor, need in zip((x_t, z, *trained), asked, strict=True) if need]
        outputs, given = zip(*told, strict=True) if told else ((), ())
        found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True))
        return None, None, *(next(found) if need else None for need in asked)


def rollout(
    denoiser: Denoiser,
    x_1: Tensor,
    times: Times,
    eta: float = 1.0,
    generator: torch.Generator | None = None,
    compare: bool = False,
    read: bool = True,
    cond: dict[str, Tensor] | None = None,
    at_state: Callable[[int, Tensor], Tensor] | None = None,
    noise: Sequence[Tensor] | None = None,
    **control,
) -> Trajectory:
    """Simulate from noise to data.

    Under a gradient the graph holds the states only: every step is computed again on the way back (checkpointing), with
    its labels set inside.

    Args:
        denoiser: prior or policy.
        x_1: (B, *), standard normal.
        times: the chain's grid (`Schedule.times`).
        eta: churn.
        generator: of the steps' noise.
        compare: also measure each step against the prior (one more evaluation a step).
        read: whether x_0 is asked for (one evaluation).
        cond: the prior's own conditions, B rows each.
        at_state: (i, x_i) → x_i, called before every step and at the end; cuts or clips the gradient.
        noise: of each step (B, *); drawn if None.
        control: labels and strength, for a policy.
    """
    cond = {name: row.to(x_1.device) for name, row in (cond or {}).items()}
    trained = [p for p in denoiser.parameters() if p.requires_grad] if torch.is_grad_enabled() else []

    def own(x_t: Tensor, z: Tensor, mean: Tensor | None, t: float, s: float) -> tuple[Tensor, Tensor | None]:
        here = transition(denoiser, x_t, t, s, eta, **control, **cond)
        return here.rsample(z), None if mean is None else here.control(Gaussian(mean, here.std))

    def prior(x_t: Tensor, t: float, s: float) -> Gaussian:
        return transition(denoiser.prior, x_t, t, s, eta, **cond)

    x_t, states, drawn, kl, log_ratio = x_1, [x_1], [], [], []
    for i, (t, s) in enumerate(pairwise(times)):
        z = normal(x_t.shape, x_t, generator) if noise is None else noise[i]
        if at_state:
            x_t = at_state(i, x_t)
        step = partial(own, t=t, s=s), partial(prior, t=t, s=s) if compare else None
        if torch.is_grad_enabled():
            x_t, u = Checkpointed.apply(*step, x_t, z, *trained)
        else:
            x_t, u = step[0](x_t, z, step[1](x_t).mean if compare else None)
        states.append(x_t)
        drawn.append(z)
        if u is not None:
            kl.append(half_square(u))
            log_ratio.append(kl[-1] + (u * z).flatten(1).sum(1))
    end = at_state(len(times) - 1, x_t) if at_state else x_t
    x_0 = read_out(denoiser, end, times[-1], **cond) if read else None
    compared = {"kl": torch.stack(kl), "log_ratio": torch.stack(log_ratio)} if compare else {}
    return Trajectory(times, torch.stack(states), torch.stack(drawn), x_0, **compared)
