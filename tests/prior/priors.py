"""Priors, policies and learners that tests of the families share."""

import json

import torch
from pipelines import LARGE

from ctrl_diffusion.chain.paths import PriorPaths
from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.learn.adjoint import Adjoint
from ctrl_diffusion.learn.backprop import Backprop
from ctrl_diffusion.learn.contrast import Contrast
from ctrl_diffusion.learn.ppo import PPO
from ctrl_diffusion.learn.weighted import Weighted
from ctrl_diffusion.prior.prior import Prior

PROMPTS = ["a seven", "two"]
SIZE = dict.fromkeys((*LARGE, "SDXL"), (32, 48))  # SDXL and PixArt-α are told height and width


def opened(folders, name, **options):
    prior = Prior.from_pretrained(folders[name][0], SIZE.get(name))
    return prior.with_prompts(PROMPTS, **options) if prior.text else prior


def condition_of(prior, n=2):
    return {} if prior.classes is None else {"c": torch.arange(n) % 2}


def assert_close(actual, expected):
    # 1e-4; the states of an ε-model that never was trained grow to hundreds, of which that is less than eight ulps
    torch.testing.assert_close(actual, expected, rtol=0, atol=max(1e-4, 1e-6 * float(expected.abs().max())))


def controlled(prior, seed=0, scale=0.1):
    """A policy whose control does something."""
    control = LoRAControl("ink", "1234", prior.denoiser, rank=4, seed=seed)
    with torch.no_grad():
        for parameters in control.parameter_groups().values():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * scale)
        control.table.weight[-1].zero_()
    return Policy(prior.denoiser, control)


def half_stored(folders, name, dtype):
    """A pipeline's prior whose network has its weights in half precision."""
    prior = opened(folders, name)
    prior.denoiser.network.to(dtype)
    return prior


class Darkness:
    """p(y | x) of classes by the mean of the images."""

    def __init__(self, classes=2):
        self.slopes = torch.linspace(100, -100, classes)

    def log_prob(self, x):
        return (x.flatten(1).mean(1, keepdim=True) * self.slopes).log_softmax(1)


def states_to(x_0, times):
    """Return paths to x_0 whose states are x_0 with noise, and whose x̂ is zero."""
    steps = torch.arange(len(times) - 1).expand(len(x_0), -1)
    noise = torch.randn(*steps.shape, *x_0.shape[1:], generator=torch.Generator().manual_seed(5))
    states = (x_0[:, None].cpu() + noise) / 2
    return PriorPaths(x_0.cpu(), steps, states, torch.zeros_like(states))


# each update sees every step of the rollout
LEARNERS = {
    "contrast": lambda times, x_0: Contrast(states_to(x_0, times), times, batch=24),
    "weighted": lambda times, x_0: Weighted(x_0, times, batch=32),
    "adjoint": lambda times, x_0: Adjoint(times, 16, regressed=3),
    "backprop": lambda times, x_0: Backprop(times, 16),
    "ppo": lambda times, x_0: PPO(times, 16, surrogates=3),
}


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])
