"""Who takes part in a comparison: each method as it is made from what is fitted on some labels with one seed."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...chain.denoise import Denoiser
from ...chain.noise import stream
from ...control.policy import Policy
from ...data.labelled import LabelledImages
from ...data.labels import NULL
from ...guide.classifier_guidance import ClassifierGuidance
from ...guide.free_guidance import FreeGuidance
from ...guide.method import Method
from ...guide.noisy import NoisyClassifier, fit_noisy
from ...guide.particles import TDS, FeynmanKac
from ...guide.reconstruction import DPS, MPGD
from ...guide.selection import BestOf, Importance, Rejection
from ...learn.fit import fit
from ...learn.labelled import Labelled
from ...prior.prior import open_prior
from ...reward.classifiers import BATCH, DEEP, epochs_of
from ...reward.fit import AUGMENTATIONS
from ...reward.reward import prior_table
from ...reward.scorer import Classifier
from ...run.folder import RunFolder
from ...run.run import Run, configured
from ...system.folders import clear
from ...system.progress import Phase, silent, timed

PARTICLES = 8  # for each sample
MOST_UPDATES = 3000  # of a noise-aware p̂, of which the best epoch is kept


@dataclass(frozen=True)
class Entrant:
    """A method as it takes part.

    Args:
        title: what a picture calls it.
        make: from a cell and settings to the method and the denoiser it is called with.
        trials: settings to choose from, all at strength 1; None for the strengths.
        front: whether all trials are shown, not the chosen one alone.
    """

    title: str
    make: Callable[..., tuple[Method, Denoiser]]
    trials: tuple[dict[str, Any], ...] | None = None
    front: bool = True


ENTRANTS = {
    "ctrl": Entrant("CTRL", lambda cell: (FreeGuidance(together=True), cell.run.policy)),
    "classifier-guidance": Entrant(
        "classifier guidance", lambda cell: (ClassifierGuidance(cell.noisy), cell.run.prior.denoiser)
    ),
    "free-guidance": Entrant("classifier-free guidance", lambda cell: (FreeGuidance(), cell.regressed)),
    "dps": Entrant("DPS", lambda cell: (DPS(), cell.run.prior.denoiser)),
    "mpgd": Entrant("MPGD", lambda cell: (MPGD(variance=cell.variance), cell.run.prior.denoiser)),
    "tds": Entrant(
        "TDS",
        lambda cell, **settings: (TDS(particles=PARTICLES, **settings), cell.run.prior.denoiser),
        tuple({"spread": spread} for spread in (0.1, 0.3, 0.5, 1.0)),
        front=False,
    ),
    "feynman-kac": Entrant(
        "Feynman–Kac steering",
        lambda cell, **settings: (FeynmanKac(particles=PARTICLES, **settings), cell.run.prior.denoiser),
        tuple({"potential": p, "spread": spread} for p in ("difference", "max") for spread in (0.5, 1.0)),
        front=False,
    ),
    "importance": Entrant(
        "importance", lambda cell: (Importance(particles=PARTICLES), cell.run.prior.denoiser), ({},), front=False
    ),
    "best-of": Entrant(
        "best of n",
        lambda cell, **settings: (BestOf(**settings), cell.run.prior.denoiser),
        tuple({"n": n} for n in (2, 4, 8, 16)),
        front=False,
    ),
    "rejection": Entrant("rejection", lambda cell: (Rejection(), cell.run.prior.denoiser), ({},), front=False),
}


@dataclass
class Cell:
    """What is fitted on some labels with one seed.

    Args:
        run: with p̂ and the control of these labels.
        data: the labelled images of each control.
        parts: those p̂ was fitted and calibrated on.
        x_prior: (G · M, *), samples of the prior, M for each condition in turn.
        labels: how many, of each control.
        seconds: what a fit took.
        phase: told of progress.
    """

    run: Run
    data: dict[str, LabelledImages]
    parts: dict[str, tuple[LabelledImages, LabelledImages]]
    x_prior: Tensor
    labels: int
    seconds: dict[str, float] = field(default_factory=dict)
    phase: Phase = silent

    @property
    def seed(self) -> int:
        """Of everything random in it."""
        return self.run.config.seed

    @cached_property
    def variance(self) -> float:
        """Of a dimension of the prior's x_0, its mean."""
        return float(self.x_prior.flatten(1).var(0).mean())

    @cached_property
    @torch.no_grad()
    def table(self) -> Tensor:
        """The rewards (G, M, K) of this p̂ on the prior's samples."""
        return prior_table(self.run.reward, self.run.conditions, self.x_prior)

    def seen(self, data: LabelledImages) -> Tensor:
        """Labelled images as the prior's network has them (n, *): latents, if it is of these."""
        return data.through(self.run.prior.encode).x

    def save(self, folder: Path) -> None:
        """Write p̂ and the control as a run folder that appears whole."""
        part = folder.with_name(f".{folder.name}.part")
        clear(part, ("*",))
        self.run.config.write(RunFolder(part).config)
        for name, panel in self.run.panels.items():
            panel.save(RunFolder(part).classifier(name))
        self.run.save_controls(RunFolder(part))
        os.replace(part, folder)

    @cached_property
    def noisy(self) -> dict[str, NoisyClassifier]:
        """p̂(y | x_t, t) of each control, on the labels that p̂ had.

        Raises:
            ValueError: p̂ depends on c.
        """
        with timed(self.seconds, "noisy classifier"):
            return {name: self.noise_aware(name) for name in self.data}

    def noise_aware(self, name: str) -> NoisyClassifier:
        """The network of p̂ but as deep as shapes need, since it has to see through noise; else as p̂ is fitted."""
        run, p_hat = self.run, self.run.panels[name].classifier
        if p_hat.conditional:
            raise ValueError(f"the classifier of {name!r} is p̂(y | x, c), of which there is no noise-aware kind here.")
        settings = run.config.settings_of(name).classifier
        fitting, held_out = ((self.seen(part), part.labels[name]) for part in self.parts[name])
        updates = min(settings.updates, MOST_UPDATES)
        epochs = epochs_of(settings.model_copy(update={"updates": updates}), fitting[0])
        advance = self.phase(f"noise-aware p̂ of {name}", epochs)
        return fit_noisy(
            *fitting, p_hat.classes, run.prior.denoiser.schedule, run.times, held_out, AUGMENTATIONS[settings.augment],
            self.seed, head=p_hat.head, grid=p_hat.shape["grid"] if isinstance(p_hat, Classifier) else 4, depth=DEEP,
            epochs=epochs, batch=BATCH, balanced=p_hat.balanced, progress=advance,
        )  # fmt: skip

    @cached_property
    def regressed(self) -> Policy:
        """A control of the same size on the same prior, regressed on the labelled data: classifier-free guidance.

        With as many updates as CTRL's learners take in all, at the rates of its own regression.
        """
        config, run = self.run.config, fresh(self.run)
        labels = {
            name: torch.cat(
                [
                    part.labels[name] if owner == name else torch.full((len(part),), NULL)
                    for owner, part in self.data.items()
                ]
            )
            for name in self.data
        }
        x_0 = torch.cat([self.seen(part) for part in self.data.values()])
        cond = {} if config.classes is None else {"c": torch.cat([self.classes_of(name) for name in self.data])}
        updates = sum(getattr(config, learner).updates for learner in config.learners)
        learner = Labelled(x_0, labels, cond, run.times, config.weighted.batch, micro=config.micro_batch)
        losses = learner(run.policy, run.reward, run.training_conditions, stream(self.seed, "labelled"))
        rates = {"embedding": config.weighted.lr_embedding, "adapter": config.weighted.lr_adapter}
        advance = self.phase("classifier-free guidance", updates)
        with timed(self.seconds, "free guidance"):
            for _ in fit(run.policy, losses, updates, rates, config.ema_decay):
                advance()
        return run.policy

    def classes_of(self, name: str) -> Tensor:
        """The prior's c of a control's labelled images; its class for none where the data do not say.

        Raises:
            ValueError: it has no such class.
        """
        config, prior = self.run.config, self.run.prior
        if condition := config.settings_of(name).condition:
            return torch.tensor(config.classes)[self.data[name].labels[condition]]
        if prior.null is None:
            raise ValueError(f"the data of {name!r} do not say c, and the prior has no class for none to train on.")
        return torch.full((len(self.data[name]),), prior.null)


def fresh(run: Run) -> Run:
    """The same prior and p̂ with untrained controls, on networks of their own: adapters stay where they are put."""
    config = run.config.model_copy(deep=True)
    return Run.start(config, configured(open_prior(config.prior, config.size), config), run.panels)
