"""Simulate the reverse process and keep what the learners and the certificate read off it."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .denoise import Denoiser
from .transition import half_square, transition

Times = tuple[float, ...]


@dataclass
class Trajectory:
    """N steps of B paths.

    Args:
        times: t_0 > … > t_N.
        x: states (N + 1, B, *).
        x_0: (B, *), the prior's denoiser at the last state.
        kl: (N, B), KL of each step against the prior's in nats; None if not compared.
        log_ratio: (N, B), log p_g/p_pre of each step in nats, same expectation as kl; None if not compared.
    """

    times: Times
    x: Tensor
    x_0: Tensor
    kl: Tensor | None = None
    log_ratio: Tensor | None = None


def read_out(denoiser: Denoiser, x_end: Tensor, t_end: float, **cond: Tensor) -> Tensor:
    """x_0 (B, *) from the chain's last state: always the prior's denoiser, part of the reward map."""
    return denoiser.prior(x_end, t_end, **cond)


def rollout(
    denoiser: Denoiser,
    x_1: Tensor,
    times: Times,
    eta: float = 1.0,
    generator: torch.Generator | None = None,
    compare: bool = False,
    cond: dict[str, Tensor] | None = None,
    **control,
) -> Trajectory:
    """Simulate from noise to data.

    Args:
        denoiser: prior or policy.
        x_1: (B, *), standard normal.
        times: the chain's grid (`Schedule.times`).
        eta: churn.
        generator: of the steps' noise.
        compare: also measure each step against the prior (one more evaluation a step).
        cond: the prior's own conditions, B rows each.
        control: labels and strength, for a policy.
    """
    cond = cond or {}
    x_t, states, kl, log_ratio = x_1, [x_1], [], []
    for t, s in pairwise(times):
        here = transition(denoiser, x_t, t, s, eta, **control, **cond)
        z = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype, device=x_t.device)
        if compare:
            u = here.control(transition(denoiser.prior, x_t, t, s, eta, **cond))
            kl.append(half_square(u))
            log_ratio.append(kl[-1] + (u * z).flatten(1).sum(1))
        x_t = here.rsample(z)
        states.append(x_t)
    x_0 = read_out(denoiser, x_t, times[-1], **cond)
    compared = {"kl": torch.stack(kl), "log_ratio": torch.stack(log_ratio)} if compare else {}
    return Trajectory(times, torch.stack(states), x_0, **compared)
