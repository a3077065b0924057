"""Say what a LoRA is held against: one value of a classifier's label, or a rule that rates images."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...data.labelled import to_pixels
from ...data.rules import Rule, load_rule
from ...prior.prior import Prior
from ...reward.panel import Panel
from ...reward.reward import Among, Conditioned, Embedded, Likelihood, Reward


class Chosen:
    """Give log p̂ of one value y of a likelihood: one class, K = 1."""

    def __init__(self, likelihood: Likelihood, y: int) -> None:
        self.likelihood, self.y = likelihood, y
        self.conditional = getattr(likelihood, "conditional", False)
        self.latent = getattr(likelihood, "latent", False)

    def log_prob(self, x: Tensor, *arguments: Tensor, **cond: Tensor) -> Tensor:
        """Return log p̂(y | x) in nats (B, 1)."""
        return self.likelihood.log_prob(x, *arguments, **cond)[:, [self.y]]


class Rating:
    """Rate images by a rule, a function of a PIL image: in place of log p̂, up to a constant, (B, 1)."""

    def __init__(self, name: str, rule: Rule) -> None:
        self.name, self.rule = name, rule

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the ratings (B, 1) of images x (B, C, H, W); raise ValueError as `rate` does."""
        return torch.tensor([[self.rate(Image.fromarray(pixels))] for pixels in to_pixels(x)])

    def rate(self, image: Image.Image) -> float:
        """Return the rating of an image; refuse (ValueError) a rule that fails or returns no finite number."""
        try:
            rating = self.rule(image)
        except Exception as error:  # the user's own code
            raise ValueError(f"the rule {self.name} failed on an image: {type(error).__name__}: {error}.") from error
        try:
            number = float(rating)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(rating, str) or not math.isfinite(number):
            raise ValueError(f"the rule {self.name} must return a number for every image, got {rating!r}.")
        return number


@dataclass(frozen=True)
class Aim:
    """Hold the reward γ log p̂(y | x_0), or γ times a rating, that a LoRA is held against."""

    name: str  # of the label, or of the rule
    value: str  # y; "high" of a rule
    gamma: float
    likelihood: Any  # of K = 1
    bounded: bool  # whether the likelihood is a probability; a rating has no known largest value

    def reward(self, prior: Prior) -> Reward:
        """Return the reward of a prior's samples."""
        return Reward({self.name: self.likelihood}, self.gamma, prior.codec, prior.denoiser.device)

    def metrics(self) -> dict[str, Any]:
        """Return the figures by the names certify.json uses."""
        return {"kind": "classifier" if self.bounded else "rule", "name": self.name, "value": self.value,
                "gamma": self.gamma}  # fmt: skip


def aim_at_value(panel: Panel, value: str, gamma: float, prior: Prior, classes: list[int] | None) -> Aim:
    """Return the aim of one value of a classifier's label, on a prior's classes; refuse (ValueError) what is none.

    Of a y on a scale the value must be one of its levels.
    """
    name = panel.control
    if panel.shape != prior.image_shape:
        shapes = " and the base makes ".join(" × ".join(map(str, shape)) for shape in (panel.shape, prior.image_shape))
        raise ValueError(f"--classifier: p̂ of {name!r} takes images of {shapes}. Fit it with ctrl classifier --prior.")
    if panel.latent and not prior.latent:
        raise ValueError(f"--classifier: p̂ of {name!r} takes latents, and this base has none. Fit it with --prior.")
    y = panel.space.label_of(value, f"--value: {name}")
    if y != round(y):
        raise ValueError(f"--value {value}: must be a level of {name}: {', '.join(panel.values)}.")
    return Aim(name, panel.values[int(y)], gamma, Chosen(conditioned(panel, prior, classes), int(y)), True)


def conditioned(panel: Panel, prior: Prior, classes: list[int] | None) -> Likelihood | Conditioned:
    """Return a panel's p̂ of the prior's c; refuse (ValueError) one that does not know the prior's classes."""
    p_hat = panel.classifier
    if getattr(p_hat, "embedding", 0):
        return Embedded(p_hat, prior.embedding_of)
    if not p_hat.conditional:
        return p_hat
    known = [prior.names.get(value, -1) for value in panel.condition_values]
    if classes is None or (others := [c for c in classes if c not in known]):
        what = "this base has no class" if classes is None else f"it knows no {prior.class_names[others[0]]!r}"
        raise ValueError(f"--classifier: p̂({panel.control} | x, {panel.condition}) is given the class, and {what}.")
    return Among(p_hat, known)


def aim_at_rule(name: str, gamma: float, shape: tuple[int, ...]) -> Aim:
    """Return the aim of a rule, MODULE:FUNCTION, which is tried on a grey image of a shape (C, H, W) first."""
    rating = Rating(name, load_rule(name))
    rating.log_prob(torch.zeros(1, *shape))
    return Aim(name.rpartition(":")[2], "high", gamma, rating, False)
