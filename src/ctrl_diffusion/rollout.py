"""Simulate the reverse process and keep what the learners and the certificate read off it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .denoise import Denoiser
from .transition import half_square, transition

Times = tuple[float, ...]
EVERY = slice(None)


@dataclass
class Trajectory:
    """N steps of B paths.

    Args:
        times: t_0 > … > t_N.
        x: states (N + 1, B, *).
        z: noise of each step (N, B, *), x_{i+1} = mean_i + std_i z_i.
        x_0: (B, *), the prior's denoiser at the last state.
        kl: (N, B), KL of each step against the prior's in nats; None if not compared.
        log_ratio: (N, B), log p_g/p_pre of each step in nats, same expectation as kl; None if not compared.
    """

    times: Times
    x: Tensor
    z: Tensor
    x_0: Tensor
    kl: Tensor | None = None
    log_ratio: Tensor | None = None

    @classmethod
    def joined(cls, parts: "list[Trajectory]") -> "Trajectory":
        """Paths of one chain as one."""
        if len(parts) == 1:
            return parts[0]
        rows = {name: [getattr(part, name) for part in parts] for name in ("x", "z", "kl", "log_ratio")}
        found = {name: None if each[0] is None else torch.cat(each, dim=1) for name, each in rows.items()}
        return cls(parts[0].times, x_0=torch.cat([part.x_0 for part in parts]), **found)


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


def rollout(
    denoiser: Denoiser,
    x_1: Tensor,
    times: Times,
    eta: float = 1.0,
    generator: torch.Generator | None = None,
    compare: bool = False,
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
        cond: the prior's own conditions, B rows each.
        at_state: (i, x_i) → x_i, called before every step and at the end; cuts or clips the gradient.
        noise: of each step (B, *); drawn if None.
        control: labels and strength, for a policy.
    """
    cond = cond or {}

    def advance(x_t: Tensor, z: Tensor, t: float, s: float) -> tuple[Tensor, Tensor | None]:
        here = transition(denoiser, x_t, t, s, eta, **control, **cond)
        u = here.control(transition(denoiser.prior, x_t, t, s, eta, **cond)) if compare else None
        return here.rsample(z), u

    x_t, states, drawn, kl, log_ratio = x_1, [x_1], [], [], []
    for i, (t, s) in enumerate(pairwise(times)):
        z = normal(x_t.shape, x_t, generator) if noise is None else noise[i]
        if at_state:
            x_t = at_state(i, x_t)
        if torch.is_grad_enabled():
            x_t, u = checkpoint(advance, x_t, z, t, s, use_reentrant=False, preserve_rng_state=False)
        else:
            x_t, u = advance(x_t, z, t, s)
        states.append(x_t)
        drawn.append(z)
        if u is not None:
            kl.append(half_square(u))
            log_ratio.append(kl[-1] + (u * z).flatten(1).sum(1))
    x_0 = read_out(denoiser, at_state(len(times) - 1, x_t) if at_state else x_t, times[-1], **cond)
    compared = {"kl": torch.stack(kl), "log_ratio": torch.stack(log_ratio)} if compare else {}
    return Trajectory(times, torch.stack(states), torch.stack(drawn), x_0, **compared)
