"""Define the testbed's tasks and their exact answers."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..chain.denoise import Denoiser
from ..chain.schedule import Cosine, RectifiedFlow, Schedule
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..data.labels import Labels
from ..reward.reward import Reward, prior_table
from .lattice import SPACING, LatticeChain, Outcome
from .mixtures import ComponentLabel, GaussianMixture, LinearGaussian, Logistic
from .side_control import SideControl

RADIUS, SIGMA_END = 1.33, 0.1
SCHEDULES: dict[str, Schedule] = {"vp": Cosine(), "flow": RectifiedFlow()}
LIKELIHOODS = ("logistic", "two controls", "linear-Gaussian", "component")


@dataclass(frozen=True)
class Task:
    """Name a prior, likelihoods and a chain."""

    schedule: str  # vp or flow
    likelihood: str  # of LIKELIHOODS
    gamma: float = 1.0
    dim: int = 2  # of x; the ring lies in the first two dimensions
    steps: int = 25  # of the chain
    spread: float = 0.4  # standard deviation of the components
    nullable: bool = False  # whether a control may be null as long as another is not
    gammas: tuple[float, ...] = ()  # others that the controls are trained for

    def prior(self, dtype: torch.dtype = torch.float32) -> GaussianMixture:
        """Make the ring."""
        angle = torch.arange(8, dtype=dtype) * (math.pi / 4)
        means = torch.zeros(8, self.dim, dtype=dtype)
        means[:, 0], means[:, 1] = RADIUS * angle.cos(), RADIUS * angle.sin()
        to_the_right = (1 + 0.8 * angle.cos()) / 8
        weights = torch.stack([torch.full_like(angle, 1 / 8), to_the_right])
        return GaussianMixture(means, self.spread, SCHEDULES[self.schedule], weights)

    def likelihoods(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Return p(y | x) of each control."""
        right, up = torch.eye(max(self.dim, 2), dtype=dtype)[:2, : self.dim]
        if self.likelihood == "logistic":
            return {"side": Logistic(right)}
        if self.likelihood == "two controls":
            return {"side": Logistic(right), "height": Logistic(up, 0.3)}
        if self.likelihood == "linear-Gaussian":
            return {"place": LinearGaussian(0.6 * right + 0.8 * up, torch.tensor([-1.0, 0.0, 1.0], dtype=dtype), 0.3)}
        prior = self.prior(dtype)
        return {"component": ComponentLabel(GaussianMixture(prior.means, self.spread, prior.schedule))}

    @property
    def title(self) -> str:
        """Title of a picture, with every unusual value."""
        unusual = [f"{self.steps} steps"] * (self.steps != 25) + [f"spread {self.spread}"] * (self.spread != 0.4)
        return f"{self.likelihood}, {self.schedule}\n{', '.join(unusual)}".strip()

    @property
    def conditions(self) -> Conditions:
        """Both conditions with every y, and with every part of it if controls may be null."""
        sizes = {name: likelihood.classes for name, likelihood in self.likelihoods().items()}
        gammas = (self.gamma, *self.gammas) if self.gammas else ()
        return Conditions({"c": torch.arange(2)}, sizes, tuple(sizes) if self.nullable else (), gammas)

    def radius_of(self, conditions: Conditions) -> float:
        """Return the radius within which the components lie under every c."""
        return RADIUS

    @property
    def c_of_controls(self) -> dict[str, int]:
        """How a side control is told c: how many conditions there are, or coordinates."""
        return {"conditions": self.conditions.groups}

    @property
    def times(self) -> tuple[float, ...]:
        """The chain's grid, uniform in t."""
        return SCHEDULES[self.schedule].times(self.steps, SIGMA_END)

    def reward(self, dtype: torch.dtype = torch.float32) -> Reward:
        """Return γ Σ log p(y | x)."""
        return Reward(self.likelihoods(dtype), self.gamma)


GROWING = Task("flow", "linear-Gaussian")  # the task whose dimensions and steps grow


class Answers:
    """Answer exactly, on lattices (D ≤ 2), for every pair (c, y) of a task, or of few conditions of a population."""

    def __init__(self, task: Task, spacing: float = SPACING, conditions: Conditions | None = None) -> None:
        self.task, self.conditions = task, conditions or task.conditions
        prior, radius = task.prior(torch.float64), task.radius_of(self.conditions)
        cond = [self.conditions.cond_of(torch.tensor([g])) for g in range(self.conditions.groups)]
        self.chains = [LatticeChain(prior, task.times, radius, task.spread, cond=row, spacing=spacing) for row in cond]
        x_0 = torch.cat([chain.x_0 for chain in self.chains])
        self.rewards = prior_table(task.reward(torch.float64), self.conditions, x_0)  # (G, P, K)

    def of(self, pair: int) -> tuple[LatticeChain, Tensor]:
        """Return the chain of a pair and its reward (P,)."""
        g, y = divmod(pair, self.conditions.classes)
        return self.chains[g], self.rewards[g, :, y]

    @cached_property
    def floors(self) -> Tensor:
        """log Z − J of the best policy with the prior's std, for each pair (P,)."""
        return torch.tensor([self.gap(self.best(pair), pair) for pair in range(self.conditions.pairs)])

    def gap(self, outcome: Outcome, pair: int) -> float:
        """Return log Z − J of an outcome for a pair."""
        chain, reward = self.of(pair)
        return chain.log_z(reward) - outcome.objective

    def best(self, pair: int) -> Outcome:
        """Return the outcome of the best policy with the prior's std for a pair."""
        chain, reward = self.of(pair)
        return chain.outcome(chain.best(reward), reward)

    def plugged_in(self, pair: int) -> Outcome:
        """Return the outcome of the exact E[x_0 | x_t, y] for a pair, in place of the prior's x̂."""
        chain, reward = self.of(pair)
        log_p = chain.prior.log_density(chain.lattices[-1].points, chain.times[-1], chain.cond["c"])
        return chain.outcome(chain.plugged_in(log_p + reward), reward)

    def outcome(self, policy: Denoiser, pair: int) -> Outcome:
        """Return the outcome of a policy, or of another denoiser that takes labels, for a pair."""
        chain, reward = self.of(pair)
        labels, _ = self.conditions.of(torch.tensor([pair]))
        gamma = {"gamma": self.task.gamma} if self.task.gammas else {}
        return chain.outcome(list(chain.steps(Doubled(policy, **gamma), **labels)), reward)


class Doubled(Denoiser):
    """Call a policy, or another denoiser that takes labels, in single precision from double precision."""

    def __init__(self, policy: Denoiser, **gamma: float) -> None:
        super().__init__()
        self.policy, self.schedule, self.shape, self.gamma = policy, policy.schedule, policy.shape, gamma

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: float, labels: Labels | None = None, **cond: Tensor) -> Tensor:
        return self.policy(x_t.float(), t, labels=labels, **self.gamma, **cond).double()


def new_policy(task: Task, seed: int = 0) -> Policy:
    """Make a policy of the prior with untrained controls, which is still the prior."""
    prior, sizes = task.prior(), task.conditions.controls
    values = {name: [str(y) for y in range(size)] for name, size in sizes.items()}
    both = (task.gamma, *task.gammas)
    options = {**task.c_of_controls, "seed": seed, "gammas": (min(both), max(both)) if task.gammas else None}
    controls = [SideControl(name, values[name], prior, **options) for name in values]
    return Policy(prior, *controls, gamma=task.gamma)
