"""List the methods of a comparison, and fit what they need on some labels with one seed."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from scipy.stats import hmean
from torch import Tensor

from ....chain.denoise import Denoiser
from ....chain.noise import stream
from ....control.policy import Policy
from ....data.labelled import LabelledImages
from ....data.labels import NULL
from ....guide.classifier_guidance import ClassifierGuidance
from ....guide.free_guidance import FreeGuidance
from ....guide.method import Method
from ....guide.noisy import NoisyClassifier, fit_noisy
from ....guide.particles import TDS, FeynmanKac
from ....guide.reconstruction import DPS, MPGD
from ....guide.selection import BestOf, Importance, Rejection
from ....guide.strength import STRENGTH, Knob, Scores
from ....learn.fit import fit
from ....learn.labelled import Labelled
from ....prior.prior import open_prior
from ....reward.classifiers import BATCH, DEEP, ClassifierSettings, epochs_of
from ....reward.fit import AUGMENTATIONS, Recipe
from ....reward.reward import prior_table
from ....reward.scorer import Architecture
from ....run.folder import RunFolder
from ....run.run import Run, configured
from ....system.folders import clear
from ....system.progress import Phase, silent, timed

PARTICLES = 8  # for each sample
SPREADS = ({"spread": 0.0}, {"spread": 0.25}, {"spread": 1.0})  # beside the usual 0.5: from never to always
Rows = list[dict[str, Any]]
Trial = tuple[dict[str, Any], float, Scores | None]  # settings, strength, and scores, None if it could not be sampled
MOST_UPDATES = 3000  # of a noise-aware p̂; its best epoch is kept


@dataclass
class FittedModels:
    """Hold a prior, p̂ and controls fitted on n labels with one seed; fit what a baseline needs when it is asked for."""

    run: Run  # with p̂ and the controls
    data: dict[str, LabelledImages]  # of each control
    parts: dict[str, tuple[LabelledImages, LabelledImages]]  # of the data: those that p̂ was fitted and calibrated on
    classifiers: dict[str, ClassifierSettings]  # of each control, that p̂ was fitted with
    x_prior: Tensor  # (G · M, *), samples of the prior, M for each condition in turn
    labels: int  # n, of each control
    seconds: dict[str, float] = field(default_factory=dict)  # duration of each fit
    phase: Phase = silent

    @property
    def seed(self) -> int:
        return self.run.config.seed

    @cached_property
    def variance(self) -> float:
        """The mean variance of a dimension of the prior's x_0."""
        return float(self.x_prior.flatten(1).var(0).mean())

    @cached_property
    @torch.no_grad()
    def table(self) -> Tensor:
        """The rewards (G, M, K) of this p̂ on the prior's samples."""
        return prior_table(self.run.reward, self.run.conditions, self.x_prior)

    def x_0(self, data: LabelledImages) -> Tensor:
        """Return labelled images (n, *) in the prior's space."""
        return data.through(self.run.prior.encode).x

    def save(self, folder: Path) -> None:
        """Write p̂ and the controls as a run folder that appears whole."""
        part = folder.with_name(f".{folder.name}.part")
        clear(part, ("*",))
        config, target = self.run.config, RunFolder(part)
        if isinstance(config.prompts, str):
            shutil.copy(config.prompts, target.prompts)
            config = config.with_(prompts=str(target.prompts.resolve()))
        config.write(target.config)
        for name, panel in self.run.panels.items():
            panel.save(RunFolder(part).classifier(name))
        self.run.save_controls(RunFolder(part))
        os.replace(part, folder)

    @cached_property
    def noisy(self) -> dict[str, NoisyClassifier]:
        """p̂(y | x_t, t) of each control, fitted on the labels of p̂; raises ValueError if p̂ depends on c."""
        with timed(self.seconds, "noisy classifier"):
            return {name: self.fit_noisy(name) for name in self.data}

    def fit_noisy(self, name: str) -> NoisyClassifier:
        """Fit p̂(y | x_t, t) as p̂ was fitted, but as deep as shapes need, since it has to see through noise."""
        run, p_hat = self.run, self.run.panels[name].classifier
        if p_hat.conditional:
            raise ValueError(f"the classifier of {name!r} is p̂(y | x, c), of which there is no noise-aware kind here.")
        settings = self.classifiers[name]
        fitting, held_out = ((self.x_0(part), part.labels[name]) for part in self.parts[name])
        architecture = Architecture(p_hat.head.name, p_hat.shape.get("grid", 4), DEEP, p_hat.balanced)
        epochs = epochs_of(min(settings.updates, MOST_UPDATES), fitting[0])
        recipe = Recipe(epochs, BATCH, augment=AUGMENTATIONS[settings.augment])
        return fit_noisy(
            *fitting, p_hat.classes, run.prior.denoiser.schedule, run.times, held_out, architecture, recipe,
            seed=self.seed, progress=self.phase(f"noise-aware p̂ of {name}", epochs),
        )  # fmt: skip

    @cached_property
    def regressed(self) -> Policy:
        """Controls regressed on the labelled data for classifier-free guidance, with CTRL's size, updates and rates."""
        config = self.run.config
        # on networks of their own: the run's adapters stay in its prior
        run = Run.start(config, configured(open_prior(config.prior, config.size), config), self.run.panels)
        labels = {
            name: torch.cat(
                [d.labels[name] if other == name else torch.full((len(d),), NULL) for other, d in self.data.items()]
            )
            for name in self.data
        }
        x_0 = torch.cat([self.x_0(data) for data in self.data.values()])
        cond = {} if self.run.classes is None else {"c": torch.cat([self.conditions_of(name) for name in self.data])}
        updates = sum(getattr(config, learner).updates for learner in config.learners)
        learner = Labelled(x_0, labels, cond, run.times, config.weighted.batch, micro=config.micro_batch)
        losses = learner(run.policy, run.reward, run.training_conditions, stream(self.seed, "labelled"))
        rates = {"embedding": config.weighted.lr_embedding, "adapter": config.weighted.lr_adapter}
        advance = self.phase("classifier-free guidance", updates)
        with timed(self.seconds, "free guidance"):
            for _ in fit(run.policy, losses, updates, rates, config.ema_decay):
                advance()
        return run.policy

    def conditions_of(self, name: str) -> Tensor:
        """Return the prior's c of a control's labelled images, its null class if the data do not say c."""
        config, prior = self.run.config, self.run.prior
        if condition := config.settings_of(name).condition:
            return torch.tensor(self.run.known_classes)[self.data[name].labels[condition]]
        if prior.null is None:
            raise ValueError(f"the data of {name!r} do not say c, and the prior has no class for none to train on.")
        return torch.full((len(self.data[name]),), prior.null)


@dataclass(frozen=True)
class MethodSpec:
    """Describe how a comparison makes and tries a method."""

    title: str  # in pictures and tables
    method: Callable[..., Method]  # from fitted models and settings
    denoiser: Callable[[FittedModels], Denoiser] = lambda models: models.run.prior.denoiser  # that it is called with
    knob: Knob = STRENGTH  # what turns it up
    trials: tuple[dict[str, Any], ...] = ()  # other settings, each tried where the knob is best
    front: bool = True  # whether every value of the knob gets a row, not only the chosen one and strength 1

    def make(self, models: FittedModels, **settings: Any) -> tuple[Method, Denoiser]:
        """Return the method with these settings, and the denoiser to call it with."""
        return self.method(models, **settings), self.denoiser(models)

    def point(self, value: float) -> tuple[dict[str, Any], float]:
        """Return settings and strength at a value of the knob."""
        return ({self.knob.setting: value}, 1.0) if self.knob.setting else ({}, float(value))

    def value(self, settings: dict[str, Any], strength: float) -> float:
        """Return the knob's value of a trial."""
        return settings[self.knob.setting] if self.knob.setting else strength

    def on_knob(self, tried: Sequence[Trial]) -> dict[float, Scores | None]:
        """Return the scores of the trials that differ by the knob alone, by its value."""
        values = ((self.value(settings, strength), settings, strength, scores) for settings, strength, scores in tried)
        return {value: scores for value, *trial, scores in values if self.point(value) == tuple(trial)}

    def grid(self, strengths: Sequence[float]) -> list[float]:
        """Return the values of the knob that trials begin with."""
        return list(self.knob.grid or map(float, strengths))

    def next_trial(self, tried: Sequence[Trial], strengths: Sequence[float]) -> tuple[dict[str, Any], float] | None:
        """Return the settings and the strength to try next; None if enough were tried.

        First the grid, then what widens it until the best lies inside, then the other settings at the best. What could
        not be sampled at a value is not tried at more.
        """
        on_knob = self.on_knob(tried)
        failed = min((value for value, scores in on_knob.items() if scores is None), default=float("inf"))
        missing = [value for value in self.grid(strengths) if value < failed and value not in on_knob]
        value = missing[0] if missing else self.knob.wider(on_knob)
        if value is not None:
            return self.point(value)
        if (best := self.knob.best(on_knob)) is None:
            return None
        settings, strength = self.point(best)
        done = [trial[:2] for trial in tried]
        others = (({**settings, **other}, strength) for other in self.trials)
        return next((other for other in others if other not in done), None)


# a baseline is one file in guide/ and one row here; from outside the package: METHODS["mine"] = MethodSpec(…)
METHODS = {
    "ctrl": MethodSpec("CTRL", lambda models: FreeGuidance(together=True), lambda models: models.run.policy),
    "classifier-guidance": MethodSpec("classifier guidance", lambda models: ClassifierGuidance(models.noisy)),
    "free-guidance": MethodSpec("classifier-free guidance", lambda _: FreeGuidance(), lambda models: models.regressed),
    "dps": MethodSpec("DPS", lambda models: DPS()),
    "mpgd": MethodSpec("MPGD", lambda models: MPGD(variance=models.variance)),
    "tds": MethodSpec(
        "TDS", lambda models, **settings: TDS(particles=PARTICLES, **settings), trials=SPREADS, front=False
    ),
    "feynman-kac": MethodSpec(
        "Feynman–Kac steering", lambda models, **settings: FeynmanKac(particles=PARTICLES, **settings),
        trials=(*SPREADS, {"potential": "max"}, *({"potential": "max", **spread} for spread in SPREADS[1:])),
        front=False,
    ),
    "importance": MethodSpec("importance", lambda _: Importance(particles=PARTICLES), front=False),
    "best-of": MethodSpec(
        "best of n", lambda models, **settings: BestOf(**settings),
        knob=Knob("n", (2, 4, 8, 16), least=1, most=64, off=1), front=False,
    ),
    "rejection": MethodSpec("rejection", lambda models: Rejection(), front=False),
}  # fmt: skip


def criteria(row: dict[str, Any]) -> tuple[float, float | None]:
    """Return what a trial is chosen by, more is better: by the first its settings, by the second its nearest strength.

    The first is the harmonic mean of accuracy and coverage: wrong labels lower the accuracy; samples that look like no
    real x with that y, or like few of them, the coverage. The second is the gap, with its sign turned, of a method that
    has one.
    """
    gap = row["gap_nats"]
    return float(hmean([row["accuracy"], row["coverage"]])), None if gap is None else -gap


def trials_of(rows: Rows, name: str) -> list[Trial]:
    """Return settings, strength and criteria of a method's trials; rows without figures could not be sampled."""
    trials = [row for row in rows if row["trial"] and row["method"] == name]
    return [(row["settings"], row["strength"], criteria(row) if "accuracy" in row else None) for row in trials]


def choose_settings(rows: Rows, left_out: Rows = ()) -> dict[str, dict[str, Any]]:
    """Choose each method's best trial by the first of the `criteria`, and name the strength with the least gap."""
    chosen = {}
    for name in dict.fromkeys(row["method"] for row in rows if row["trial"]):
        trials = [row for row in rows if row["trial"] and row["method"] == name]
        spec = METHODS.get(name, MethodSpec(name, FreeGuidance))  # a row that was kept may outlive its method
        row_at = spec.on_knob([(row["settings"], row["strength"], row) for row in trials])
        tried = spec.on_knob(trials_of([*rows, *left_out], name))
        best, at = max(trials, key=lambda row: criteria(row)[0]), spec.knob.best(tried)
        if at is not None and criteria(row_at[at])[0] == criteria(best)[0]:
            best = row_at[at]  # of equals the nearest to 1
        chosen[name] = {key: best[key] for key in ("settings", "strength", "accuracy", "coverage")}
        chosen[name] |= {"trials": len(trials), "on_edge": spec.knob.on_edge(tried)}
        if (near := spec.knob.best(tried, 1)) is not None:
            chosen[name]["nearest"] = {key: row_at[near][key] for key in ("strength", "gap_nats", "gap_stderr")}
    return chosen
