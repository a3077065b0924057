"""The baselines: what else samples p(x | c) p̂(y | x)^γ, each on the Gaussian step and the reward that CTRL has.

A method is a dataclass of its hyper-parameters, called with a prior, a reward and what is asked for; it gives samples
and says what they cost. The strength w multiplies the reward in every method; at w = 0 all are the prior, bit for bit.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..chain.denoise import Denoiser
from ..chain.paths import default_batch, paths
from ..chain.rollout import Times
from ..chain.rows import parts, rows_of
from ..data.labels import Labels
from ..reward.reward import Reward

Cond = dict[str, Tensor]
Earned = Callable[..., Tensor]  # (x (B, *), labels, cond, …) → reward in nats (B,)


@dataclass
class Cost:
    """What one sample took, on average: rows that went through.

    Args:
        network: evaluations of the denoiser, the read-out among them; a prior guided by a prompt looks twice in each.
        classifier: evaluations of the reward, or of a noise-aware classifier.
        network_gradients: times a gradient was carried back through the denoiser.
        classifier_gradients: the same of the reward.
    """

    network: float
    classifier: float
    network_gradients: float
    classifier_gradients: float


@dataclass
class Guided:
    """Samples x_0 (B, *) on the CPU, in the order of the labels, and what one of them cost."""

    x_0: Tensor
    cost: Cost


@contextmanager
def counted(denoiser: Denoiser, earned: Earned) -> Iterator[tuple[Counter, Earned]]:
    """Inside, rows that go through the prior or the reward given are counted, forwards and backwards, as in `Cost`."""
    rows: Counter = Counter()

    def saw(kind: str, out: Tensor) -> None:
        n = len(out)
        rows[kind] += n
        if out.requires_grad:
            out.register_hook(lambda _: rows.update({f"{kind}_gradients": n}))

    def watched(*given: Any) -> Tensor:
        out = earned(*given)
        saw("classifier", out)
        return out

    hook = denoiser.prior.register_forward_hook(lambda module, given, x_hat: saw("network", x_hat))
    try:
        yield rows, watched
    finally:
        hook.remove()


@dataclass
class Asked:
    """What is asked of a prior.

    Args:
        denoiser: the prior, or a policy.
        earned: the reward.
        labels, cond: n rows each.
        strength: w.
    """

    denoiser: Denoiser
    earned: Earned
    labels: Labels
    cond: Cond
    strength: float

    def __len__(self) -> int:
        return len(next(iter(self.labels.values())))

    def rows(self, rows: slice | Tensor) -> "Asked":
        """The same of some rows, or of rows again and again."""
        return replace(self, labels=rows_of(self.labels, rows), cond=rows_of(self.cond, rows))

    def reward(self, x: Tensor, *given: Any) -> Tensor:
        """w times the reward (n,) of x (n, *)."""
        return self.strength * self.earned(x, self.labels, self.cond, *given)

    def rewards(self, x_0: Tensor) -> Tensor:
        """The same of many samples, a few at a time: decoded images are many times their latents."""
        few = parts(len(x_0), default_batch(self.denoiser))
        return torch.cat([self.rows(rows).reward(x_0[rows]) for rows in few])


@dataclass(kw_only=True)
class Method(ABC):
    """A way to sample with a reward.

    Args:
        eta: churn of the chain.
        batch: paths at a time; None for `chain.paths.default_batch`.
    """

    eta: float = 1.0
    batch: int | None = None

    def __call__(
        self,
        denoiser: Denoiser,
        reward: Reward,
        labels: Labels,
        cond: Cond | None,
        times: Times,
        generator: torch.Generator,
        strength: float = 1.0,
    ) -> Guided:
        """Samples, one for each row of the labels.

        Args:
            denoiser: the prior; for `FreeGuidance` a policy.
            reward: γ log p̂(y | x_0).
            labels, cond: B rows each; a null label asks for nothing.
            times: the chain's grid.
            generator: of all noise.
            strength: w, what the reward is multiplied by; 0 is the prior.
        """
        with torch.no_grad(), counted(denoiser, self.followed(reward)) as (rows, earned):
            asked = Asked(denoiser, earned, labels, cond or {}, strength)
            x_0 = self.sample(asked, times, generator) if strength else self.of_prior(asked, times, generator)
        return Guided(x_0, Cost(**{field.name: rows[field.name] / len(asked) for field in fields(Cost)}))

    def of_prior(self, asked: Asked, times: Times, generator: torch.Generator) -> Tensor:
        """Samples x_0 (n, *) of the prior on the CPU, a row each."""
        prior = asked.denoiser.prior
        return paths(prior, len(asked), times, generator, asked.cond, eta=self.eta, batch=self.batch).x_0

    def followed(self, reward: Reward) -> Earned:
        """What the method asks in the reward's place: by default the reward itself."""
        return reward

    @abstractmethod
    def sample(self, asked: Asked, times: Times, generator: torch.Generator) -> Tensor:
        """x_0 (n, *) on the CPU at a strength that is not 0."""
