"""Read samples: what p̂ says of each, what the ruler or the judge sees, and the sentences above them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.labels import NULL, Labels
from ...evaluate.rulers.table import RULERS
from ...evaluate.verdict import gap_line
from ...reward.reward import Conditioned
from ...reward.scorer import Scorer
from ...run.config import ControlSettings
from ...run.run import Run
from .request import Request


class Reading(NamedTuple):
    """Hold what is read of one picture about one control."""

    control: str
    says: str  # the label p̂ finds likeliest, or its mean on a scale; blank where p̂ does not know c
    share: float | None  # p̂ of that label; None on a scale
    sees: str  # the label that the ruler sees, else the judge; – if there is nothing to measure
    by: str  # "ruler" or "judge"; blank if the run has neither
    right: bool | None  # whether it sees the label asked for; None if none was, or nothing is seen


class Picture(NamedTuple):
    """Hold one picture (C, H, W) with what is read of it."""

    image: Tensor
    readings: Sequence[Reading]
    outside: bool | None  # whether it left the region p̂ knows; None if that is not known
    c: str  # the name of its condition; blank of an unconditional prior

    @property
    def right(self) -> bool | None:
        """Whether it has every label asked for; None if none was asked for, or one could not be seen."""
        seen = [reading.right for reading in self.readings if reading.right is not None]
        return all(seen) if seen else None


@torch.no_grad()
def read(run: Run, x_0: Tensor, images: Tensor, cond: dict[str, Tensor], labels: Labels) -> list[Picture]:
    """Read samples x_0 (n, *), with their images, of conditions and labels of n rows each."""
    device = run.prior.denoiser.device
    c = cond.get("c")
    known = c is None or run.known_classes is None or set(c.tolist()) <= set(run.known_classes)
    by_control = []
    for settings in run.config.controls:
        y = labels.get(settings.name, torch.full((len(x_0),), NULL))
        by_control.append(read_control(run, settings, (x_0.to(device), images.to(device)), c, y, known))
    has_region = all(panel.support for panel in run.panels.values())
    outside = run.is_outside(x_0.to(device), images.to(device)).tolist() if has_region else [None] * len(x_0)
    names = [""] * len(x_0) if c is None else [run.prior.class_names[i] for i in c.tolist()]
    rows = zip(images.clamp(-1, 1), zip(*by_control, strict=True), outside, names, strict=True)
    return [Picture(image, readings, out, name) for image, readings, out, name in rows]


def read_control(
    run: Run, settings: ControlSettings, x: tuple[Tensor, Tensor], c: Tensor | None, y: Tensor, known: bool
) -> list[Reading]:
    """Read samples and their images (n, *) about one control, asked for labels y (n,); `known`: p̂ may be asked of c."""
    panel = run.panels[settings.name]
    space, images, count = panel.space, x[1], len(y)
    p_hat, judge = (network and run.conditioned(network) for network in (panel.classifier, panel.judge))
    says, shares = [""] * count, [None] * count
    if known or not needs_known(p_hat):
        says, shares = opinion(run, settings.name, p_hat, x[0] if panel.latent else images, c)
    asked = judge and (known or not needs_known(judge))
    by = RULERS[settings.ruler].by if settings.ruler else "judge" if asked else ""
    if not by:
        return [Reading(settings.name, *pair, "", "", None) for pair in zip(says, shares, strict=True)]
    if space.scale:
        seen = run.measure_scale(settings, images.cpu(), c).clamp(0, space.size - 1)
    else:
        seen = run.ruler_of(settings)(images.cpu(), c) if settings.ruler else log_p(judge, images, c).argmax(1).cpu()
    same = (space.nearest(seen) == space.nearest(y)).tolist()
    right = [None if label == NULL else hit for label, hit in zip(y.tolist(), same, strict=True)]
    texts = [short(space.text_of(label)) or "–" for label in seen.nan_to_num(NULL).tolist()]
    return [Reading(settings.name, *row[:3], by, row[3]) for row in zip(says, shares, texts, right, strict=True)]


def needs_known(network: Scorer | Conditioned) -> bool:
    """Return whether a classifier can be asked only of conditions it was fitted on."""
    return hasattr(network, "classes") and isinstance(network, Conditioned)


def log_p(network: Scorer | Conditioned, x: Tensor, c: Tensor | None) -> Tensor:
    """Return log p(y | x), or log p(y | x, c), (n, K)."""
    return network.log_prob(x, c.to(x.device)) if network.conditional else network.log_prob(x)


def opinion(
    run: Run, name: str, p_hat: Scorer | Conditioned, x: Tensor, c: Tensor | None
) -> tuple[list[str], list[float | None]]:
    """Return what p̂ says of each x (n, *), and how surely: the probability of a class, None on a scale."""
    panel = run.panels[name]
    if not panel.space.scale:
        probability, label = log_p(p_hat, x, c).exp().max(1)
        return [panel.space.values[i] for i in label.tolist()], probability.tolist()
    condition = [p_hat.translated(c.to(x.device))] if p_hat.conditional else []
    scores = panel.classifier.scores(x, *condition)
    places = panel.classifier.head.density(scores, panel.classifier.temperature).mean.cpu()
    texts = [short(panel.space.text_of(place)) for place in places.clamp(0, panel.space.size - 1).tolist()]
    return texts, [None] * len(texts)


def short(text: str) -> str:
    """Write a number with three digits; leave other texts."""
    try:
        return f"{float(text):.3g}" if "." in text else text
    except ValueError:
        return text


def tally(pictures: Sequence[Picture]) -> tuple[int, int]:
    """Count the pictures that have what was asked for, and those of which that is known."""
    known = [picture.right for picture in pictures if picture.right is not None]
    return sum(known), len(known)


def target_accuracy(run: Run, metrics: dict[str, Any] | None, request: Request) -> float | None:
    """Return the share that a perfect learner with this p̂ has right; None where it was not measured for the request.

    It was for the run's γ and with every label asked for.
    """
    if metrics is None or set(request.labels) != set(run.names):
        return None
    if request.gamma is not None and request.gamma != run.config.gamma:
        rows = metrics.get("gammas") or []
        return next((row["target_accuracy"] for row in rows if row["gamma"] == request.gamma), None)
    return metrics["target"]["accuracy"]


def certificate_sentence(run: Run, metrics: dict[str, Any] | None, request: Request) -> str:
    """Say how far these samples are from the exact conditional at most, or why nothing is certified for them."""
    gamma = run.config.gamma if request.gamma is None else request.gamma
    if not request.labels or request.strength == 0:
        return "Without a label, or at strength 0, this is the prior itself: there is nothing to certify."
    if metrics is None:
        return "No certificate: this run has no metrics.json."
    changed = [] if request.strength == 1 else [f"strength {request.strength:g}"]
    changed += [] if request.steps == run.config.steps else [f"{request.steps} steps"]
    certificate = metrics["certificate"]
    if gamma != run.config.gamma:
        rows = [row for row in metrics.get("gammas") or [] if row["gamma"] == gamma and row["gap_nats"] is not None]
        changed += [] if rows else [f"γ = {gamma:g}"]
        certificate = {**rows[0], "uncertified": [], "on_paths": None} if rows else certificate
    if set(request.labels) != set(run.names):
        changed.append("only some labels")
    if changed:
        return (
            f"No certificate for {' and '.join(changed)}: it holds for strength 1 and {run.config.steps} steps"
            f"{', every label asked for' if len(run.names) > 1 else ''}."
        )
    if certificate["gap_nats"] is None:
        return f"No certificate: {gap_line(certificate)}."
    if certificate.get("uncertified"):
        return f"Certificate, of the distance from the exact conditional: {gap_line(certificate)}."
    return f"Certificate: {gap_line(certificate)} from the exact conditional, on average over all labels."
