"""Simulate the reverse process and keep what the learners and the certificate read off it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .denoise import Denoiser
from .transition import half_square, transition

Times = tuple[float, ...]
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # (x_t, z) → x_s, the whitened control


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


def normal(shape: Sequence[int], like: Tensor | Denoiser, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise where `like` is, drawn where the generator is: a seed means the same on every device."""
    dtype = like.dtype if isinstance(like, Tensor) else None
    source = generator.device if generator else "cpu"
    return torch.randn(*shape, generator=generator, dtype=dtype, device=source).to(like.device)


def read_out(denoiser: Denoiser, x_end: Tensor, t_end: float, **cond: Tensor) -> Tensor:
    """x_0 (B, *) from the chain's last state: always the prior's denoiser, part of the reward map."""
    return denoiser.prior(x_end, t_end, **cond)


class Checkpointed(torch.autograd.Function):
    """A step that keeps nothing but its state and noise, and is computed again on the way back.

    As `torch.utils.checkpoint` does, but without a hook on every tensor that a network saves, which on small networks
    costs a sixth of the whole (docs/performance.md), and without a graph on the way there.
    """

    @staticmethod
    def forward(context: Any, step: Step, x_t: Tensor, z: Tensor, *trained: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the step makes of x_t and z; `trained` are the parameters it has a gradient for."""
        context.step = step
        context.save_for_backward(x_t, z, *trained)
        context.set_materialize_grads(False)
        return step(x_t, z)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient for the state, the noise and the parameters."""
        x_t, z, *trained = context.saved_tensors
        asked = context.needs_input_grad[1:]
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip((x_t, z), asked, strict=False)]
            made = context.step(*inputs)
        # a step whose labels are all null depends on no parameter
        told = [(y, g) for y, g in zip(made, gradients, strict=True) if g is not None and y.requires_grad]
        wanted = [tensor for tensor, need in zip((*inputs, *trained), asked, strict=True) if need]
        outputs, given = zip(*told, strict=True) if told else ((), ())
        found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True))
        return None, *(next(found) if need else None for need in asked)


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
    cond = {name: row.to(x_1.device) for name, row in (cond or {}).items()}
    trained = [p for p in denoiser.parameters() if p.requires_grad] if torch.is_grad_enabled() else []

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
            x_t, u = Checkpointed.apply(partial(advance, t=t, s=s), x_t, z, *trained)
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
