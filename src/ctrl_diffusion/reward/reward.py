"""Compute the reward γ log p̂(y | x_0), in nats; the rewards of independent controls add."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from ..chain.codec import Codec
from ..chain.rows import parts, rows_of
from ..control.conditions import Conditions
from ..data.labels import NULL, Labels
from ..system.files import some_of

ENOUGH = 10.0  # hits of a pair, from which on its log Z is an estimate and not a guess (`evaluate/certificate.py`)
SHOWN = 4  # pairs in a message


class Likelihood(Protocol):
    """Describe p(y | x) of one control: a `Classifier`, a scikit-learn one (`Estimator`), or a closed form.

    A true attribute `conditional` says that it is p(y | x, c), whose `log_prob` takes the prior's conditions as
    keywords; a true attribute `latent` that x are the latents of a latent model. One that is a density, not the
    probability of a class, has its largest log as the attribute `bound`.
    """

    @property
    def log_prob(self) -> Callable[..., Tensor]:
        """Take x (B, *), and return log p(y | x) in nats (B, K)."""
        ...


class Density(Likelihood, Protocol):
    """Describe p(y | x) of a y on a scale."""

    @property
    def log_prob_at(self) -> Callable[..., Tensor]:
        """Take x (B, *) and places y (B,), and return log p(y | x) in nats (B,)."""
        ...


class Reward:
    """Compute r(x_0, y, c) = γ Σ_controls log p̂(y | x_0), or p̂(y | x_0, c).

    Args:
        classifiers: one per control.
        gamma: γ ≥ 0; 1 targets the posterior itself.
        codec: decodes x_0 to the images p̂ takes; None for the identity.
        device: where p̂ is; None for where x_0 is.
    """

    def __init__(
        self, classifiers: Mapping[str, Likelihood], gamma: float = 1.0, codec: Codec | None = None,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        if gamma < 0:
            raise ValueError(f"gamma must not be negative, got {gamma}. 1.0 asks for the posterior.")
        self.classifiers, self.gamma, self.codec, self.device = classifiers, gamma, codec or Codec(), device

    def at(self, gamma: float) -> "Reward":
        """Return the same reward at another γ."""
        return Reward(self.classifiers, gamma, self.codec, self.device)

    def __call__(
        self, x_0: Tensor, labels: Labels, cond: dict[str, Tensor] | None = None, gamma: Tensor | None = None
    ) -> Tensor:
        """Return the reward (B,) of x_0 (B, *) under conditions of B rows each; a null label earns nothing.

        Each row may have a γ (B,) of its own, in place of the reward's.
        """
        if gamma is not None:
            log_p = self.at(1.0)(x_0, labels, cond)
            return gamma.to(log_p) * log_p
        if self.codec.latent and not torch.is_grad_enabled() and len(x_0) > self.codec.batch:
            rows = parts(len(x_0), self.codec.batch)
            return torch.cat([self(x_0[r], rows_of(labels, r), rows_of(cond or {}, r)) for r in rows])
        total = x_0.new_zeros(len(x_0))
        for name, x in self.views(x_0, labels).items():
            y = labels[name].to(x.device)
            if y.is_floating_point():  # places on a scale
                density = cast(Density, self.classifiers[name])
                rewards = self.gamma * density.log_prob_at(x, y, **self.conditions_of(name, x, cond))
            else:
                rewards = self.table(name, x, cond).gather(1, y.clamp(min=0)[:, None]).squeeze(1)
            total = total + torch.where(y == NULL, 0.0, rewards).to(total)
        return total

    def bound(self, labels: Labels) -> float:
        """Return what no reward of these labels exceeds, in nats: γ Σ of each control's largest log p̂, 0 of classes.

        A null label earns 0, which may be more than a density's largest log.

        Raises ValueError for a place on a scale under a p̂ that does not say how large its density can be.
        """
        total = 0.0
        for name, y in labels.items():
            bound = getattr(self.classifiers[name], "bound", None if y.is_floating_point() else 0.0)
            if bound is None:
                kind = type(self.classifiers[name]).__name__
                raise ValueError(
                    f"p̂ of {name!r} is a density, which may exceed 1, and {kind} does not say its largest log. Give it "
                    "an attribute `bound`."
                )
            total += self.gamma * (max(bound, 0.0) if (y == NULL).any() else bound)
        return total

    def views(self, x_0: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return what each control's p̂ takes of x_0 (B, *): x_0 itself, or the images of a latent model."""
        x = x_0.to(self.device)
        latent = {name for name in names if getattr(self.classifiers[name], "latent", False)}
        images = self.codec.decode(x) if len(latent) < len(names) else x
        return {name: x if name in latent else images for name in names}

    def table(self, name: str, x: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """Return one control's reward of every class (B, K), of x (B, *) as its p̂ takes it."""
        return self.gamma * self.classifiers[name].log_prob(x, **self.conditions_of(name, x, cond))

    def conditions_of(self, name: str, x: Tensor, cond: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Return the conditions that a control's p̂ depends on: all or none, on the device of x."""
        conditional = getattr(self.classifiers[name], "conditional", False)
        return {key: row.to(x.device) for key, row in (cond or {}).items()} if conditional else {}


class Conditioned:
    """Translate the prior's c into the form that a p̂(y | x, c) takes; a subclass says which."""

    conditional = True

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self.latent = getattr(likelihood, "latent", False)
        if hasattr(likelihood, "bound"):
            self.bound = likelihood.bound

    def log_prob(self, x: Tensor, c: Tensor) -> Tensor:
        """Return log p̂(y | x, c) in nats (B, K); raise ValueError as `translated` does."""
        return self.likelihood.log_prob(x, self.translated(c))

    def log_prob_at(self, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        """Return log p̂(y | x, c) in nats at places y (B,) on a scale: (B,); raise as `log_prob` does."""
        return cast(Density, self.likelihood).log_prob_at(x, y, self.translated(c))

    def translated(self, c: Tensor) -> Tensor:
        """Return what the likelihood is given of the prior's classes c (B,)."""
        raise NotImplementedError


class Among(Conditioned):
    """Renumber c for a p̂(y | x, c) that numbers some of the prior's `classes` 0 … n − 1."""

    def __init__(self, likelihood: Likelihood, classes: Sequence[int]) -> None:
        super().__init__(likelihood)
        self.classes = torch.tensor(classes)

    def translated(self, c: Tensor) -> Tensor:
        """Return the likelihood's numbers of c (B,); raise ValueError for a c the labels do not have."""
        same = c[:, None] == self.classes.to(c.device)
        if not same.any(1).all():
            raise ValueError(f"p̂(y | x, c) knows c in {self.classes.tolist()}, got {c.unique().tolist()}.")
        return same.int().argmax(1)


class Embedded(Conditioned):
    """Give a p̂(y | x, c) the embedding of c, so that it answers for c without any label.

    `embed` turns numbers (n,) into vectors (n, F).
    """

    def __init__(self, likelihood: Likelihood, embed: Callable[[Tensor], Tensor]) -> None:
        super().__init__(likelihood)
        self.embed = embed

    def translated(self, c: Tensor) -> Tensor:
        """Return the embeddings of c: (B, F), each looked up once."""
        different, which = c.cpu().unique(return_inverse=True)
        return self.embed(different)[which].to(c.device)


def prior_table(reward: Reward, conditions: Conditions, x_0: Tensor) -> Tensor:
    """Return the reward of every y (G, M, K) on prior samples x_0 (G · M, *), M for each condition in turn.

    Of a population all samples are one table, (1, M, K), and x_0 (M, *) have the conditions of `Conditions.spread`.

    Raises ValueError if a reward is not finite.
    """
    group = conditions.spread(len(x_0))
    tables: dict[str, list[Tensor]] = {name: [] for name in conditions.controls}
    for rows in parts(len(x_0), reward.codec.batch):
        for name, x in reward.views(x_0[rows], tables).items():
            tables[name].append(reward.table(name, x, conditions.cond_of(group[rows])).to(x_0))
    total = x_0.new_zeros(len(x_0), conditions.classes)
    for (name, batches), classes in zip(tables.items(), conditions.combinations.unbind(1), strict=True):
        table = torch.cat(batches)
        wrong = ~table.isfinite()
        if wrong.any():
            y = int(wrong.any(0).nonzero()[0])
            raise ValueError(
                f"the reward of {name!r} is not finite on samples of the prior: {float(table[wrong[:, y], y][0])} for "
                f"class {y} on {int(wrong[:, y].sum())} of {len(table)}. p̂ must give every class a probability above 0."
            )
        total = total + torch.where(classes == NULL, 0.0, table[:, classes.clamp(min=0)])
    return total.view(conditions.strata // conditions.classes, -1, conditions.classes)


def hits(table: Tensor, gamma: float = 1.0) -> Tensor:
    """Count the samples that have each y, Σ_m p̂(y | x_m): (G, K), from rewards γ log p̂ (G, M, K).

    As 0 ≤ p̂ ≤ 1, the relative variance of Z's estimate Σ p̂/M is at most one over its expectation, and the samples'
    effective number under p̂ at least as large. Both need the power γ where γ > 1: a few surest samples own p̂^γ. Where
    γ < 1, p̂^γ would count samples that do not have y, which is the more so the smaller γ; p̂ itself is counted. Of a y
    on a scale p̂ is a density, of about one level's width; as that may exceed 1, a sample counts for one at most.
    """
    if gamma == 0:  # Z is 1, whatever p̂
        return table.new_full((table.shape[0], table.shape[2]), table.shape[1])
    log_p = table * max(1.0, 1 / gamma)
    return (log_p - log_p.amax(1, keepdim=True).clamp(min=0)).exp().sum(1)


def rarest(conditions: Conditions, counts: Tensor) -> str | None:
    """Name the pairs (c, y) with too few hits, of the hits (pairs,), the fewest first; None if all have enough."""
    few = counts.argsort()[: int((counts < ENOUGH).sum())].tolist()
    if not few:
        return None
    return some_of([f"{conditions.name_of(pair)} ({float(counts[pair]):.1f} hits)" for pair in few], SHOWN, "; ")


def warn_of_rare(conditions: Conditions, table: Tensor, learner: str, gamma: float) -> None:
    """Warn of pairs that too few of a learner's prior samples have, before it learns; rewards (G, M, K) are at γ."""
    if few := rarest(conditions, hits(table, gamma).flatten()):
        warnings.warn(
            f"{learner} learns from a handful of {table.shape[1]} prior samples: {few}. Raise {learner}.cache.",
            stacklevel=2,
        )
