"""Reward-weighted regression: the warm start.

Draw x_0 from the prior once. For a pair (c, y) the target is those samples weighted by w = p̂(y | x_0)^γ, so draw from
them by weight, add noise and regress the denoiser. With re-noising taken as the reverse of the prior's chain this
minimises the forward KL of paths, Σ_i E ½ (a_i/std_i)² ‖x̂_g(x_{t_i}) − x_0‖² + const, where mean_i = a_i x̂ + b_i x_t:
it finds every mode and costs a plain training step. It is the cross-entropy method of stochastic control.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..control import Policy
from ..data import Conditions
from ..reward import Reward, prior_table
from ..rollout import Times
from ..schedule import per_sample
from ..transition import half_square, step, transition
from . import Step


@dataclass
class Weighted:
    """The learner.

    Args:
        x_0: (G · M, *), samples of the prior, M for each of the G conditions in turn.
        times: the chain's grid.
        batch: samples an update.
        eta: churn of the chain.
    """

    x_0: Tensor
    times: Times
    batch: int = 256
    eta: float = 1.0

    def __call__(
        self, policy: Policy, reward: Reward, conditions: Conditions, generator: torch.Generator
    ) -> Iterator[Step]:
        """Losses without end."""
        with torch.no_grad():
            weights = prior_table(reward, conditions, self.x_0).softmax(1)  # (G, M, K)
        # for each pair the cumulated weights over its condition's samples
        cumulated, members = weights.transpose(1, 2).flatten(0, 1).double().cumsum(1), weights.shape[1]
        t_grid, s_grid = (torch.tensor(times, dtype=torch.float64) for times in (self.times[:-1], self.times[1:]))
        steps = len(t_grid)
        alpha, sigma = policy.schedule(t_grid)
        while True:
            pair = conditions.draw(self.batch, generator)
            labels, cond = conditions.of(pair)
            ticket = torch.rand(self.batch, 1, generator=generator, dtype=torch.float64)
            member = torch.searchsorted(cumulated[pair], ticket).squeeze(1).clamp(max=members - 1)
            x_0 = self.x_0[pair // conditions.classes * members + member]
            # stratified over the steps of the chain
            offset = torch.rand((), generator=generator)
            place = torch.randperm(self.batch, generator=generator) + offset
            i = (place * steps / self.batch).long().clamp(max=steps - 1)
            noise = torch.randn(x_0.shape, generator=generator)
            x_t = per_sample(alpha[i], x_0) * x_0 + per_sample(sigma[i], x_0) * noise
            here = transition(policy, x_t, t_grid[i], s_grid[i], self.eta, labels=labels, **cond)
            # the same step, had the denoiser known the sample
            there = step(policy.schedule, x_0, x_t, t_grid[i], s_grid[i], self.eta)
            loss = steps * half_square(here.control(there)).mean()
            yield Step(loss, {"forward_nats": float(loss.detach())})
