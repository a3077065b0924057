"""What a policy with intervals must equal: one without them that is given null labels outside."""

import torch

from ctrl_diffusion.chain.denoise import Denoiser
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.data.labels import NULL
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl


class Silenced(Denoiser):
    """A policy whose controls have no interval, called with null labels outside those that are given by name."""

    def __init__(self, policy, intervals):
        super().__init__()
        self.policy, self.intervals = policy, intervals
        self.schedule, self.shape, self.start = policy.schedule, policy.shape, policy.start

    @property
    def prior(self):
        return self.policy.prior

    def forward(self, x_t, t, labels=None, strength=1.0, **cond):
        sigma = self.schedule(t)[1].expand(len(x_t))
        nulled = {}
        for name, y in (labels or {}).items():
            off, on = self.intervals.get(name) or (0.0, 1e9)
            nulled[name] = torch.where((off <= sigma) & (sigma <= on), y, NULL)
        return self.policy(x_t, t, nulled, strength, **cond)


def talkative(schedule, intervals, dtype=torch.float32):
    """A policy whose controls, by name with their intervals, have something to say; its prior is a mixture."""
    prior = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=dtype), 0.5, schedule)
    controls = [SideControl(name, ("a", "b"), prior, width=8, interval=bounds) for name, bounds in intervals.items()]
    policy = Policy(prior, *controls).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(policy.trainable()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=dtype))
    return policy


def silenced(schedule, intervals, dtype=torch.float32):
    """The same policy, told by its labels where to be silent."""
    return Silenced(talkative(schedule, dict.fromkeys(intervals), dtype), intervals)


def calls_of(denoiser):
    """A list that is given the times of every call of a denoiser from now on."""
    times = []
    denoiser.register_forward_pre_hook(lambda module, args, options: times.append(args[1]), with_kwargs=True)
    return times
