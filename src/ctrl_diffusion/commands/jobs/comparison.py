"""Compute the rows of a comparison: fit on each number of labels with each seed, try settings, sample and score."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import hmean
from sklearn.model_selection import train_test_split
from torch import Tensor

from ...chain.codec import Codec
from ...chain.denoise import Denoiser
from ...chain.noise import stream
from ...chain.paths import paths
from ...data.images import Levels
from ...data.labelled import LabelledImages
from ...evaluate.certificate import certify
from ...evaluate.fidelity import Yardstick
from ...evaluate.judge import Observation, SecondOpinion
from ...evaluate.scores import score_samples, score_target
from ...guide.method import Method
from ...guide.steered import Guidance
from ...prior.prior import open_prior
from ...reward.classifiers import WITH_RULER, Fitter
from ...run.config import ControlSettings
from ...run.measure import prior_samples, repeats_of
from ...run.prepare import encoder_of, read_data, select_classes
from ...run.run import Run, configured
from ...run.stages import train
from ...system.progress import DEFAULT, JobOptions, timed
from .methods import METHODS, FittedModels

STRENGTHS = (0.5, 1.0, 2.0, 4.0)
OF_SUBSET = (0.8, 0.2)  # fit, calibration; the labels outside the subset are held out
Rows = list[dict[str, Any]]


def subset(data: LabelledImages, column: str, n: int, seed: int) -> tuple[LabelledImages, LabelledImages | None]:
    """Split into n rows, stratified by a column, and the rest; raise ValueError if there are fewer."""
    if n > len(data):
        raise ValueError(f"--labels {n}: {column} has {len(data)} labelled images. Ask for no more.")
    if n == len(data):
        return data, None
    rows, rest = train_test_split(
        torch.arange(len(data)).numpy(), train_size=n, stratify=data.strata(column).numpy(), random_state=seed
    )
    return data[rows], data[rest]


def read_again(run: Run, settings: ControlSettings, source: str, levels: Levels | None = None) -> LabelledImages:
    """Read the labelled images of a run's control as its training did, those of its judge with the others' levels."""
    data = read_data(source, settings, run.prior, run.panels[settings.name].values, levels=levels)
    return select_classes(data, settings.condition, run.config.classes) if settings.condition else data


def choose_settings(rows: Rows) -> dict[str, dict[str, Any]]:
    """Choose each method's trial with the largest harmonic mean of accuracy and coverage.

    Wrong labels lower the accuracy; samples that look like no real x with that y, or like few of them, the coverage.
    """
    chosen = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        trials = [row for row in rows if row["trial"] and row["method"] == name]
        best = max(trials, key=lambda row: hmean([row["accuracy"], row["coverage"]]))
        chosen[name] = {key: best[key] for key in ("settings", "strength", "accuracy", "coverage")}
        chosen[name]["trials"] = len(trials)
    return chosen


@dataclass
class Comparison:
    """Compare methods on one run, with the rows that are finished so far."""

    run: Run
    out: Path  # the folder of the comparison
    methods: list[str]  # names in METHODS
    strengths: tuple[float, ...] = STRENGTHS  # trials of the methods that have no other settings
    n: int = 1000  # samples for a row, at least
    rows: Rows = field(default_factory=list)  # of compare.json
    cells: Rows = field(default_factory=list)  # of compare.json: `describe` for each number of labels and seed
    options: JobOptions = DEFAULT

    def __post_init__(self) -> None:
        run = self.run
        if fixed := [control.name for control in run.config.controls if control.settled_from]:
            raise ValueError(
                f"{', '.join(fixed)}: trained in another run, whose labels are not here. Compare a run whose "
                "controls were trained together."
            )
        self.data = {control.name: read_again(run, control, control.data) for control in run.config.controls}
        self.judge: SecondOpinion = replace(run.second_opinion, outside=None)
        self.repeats = repeats_of(self.n, run.conditions)
        self.phase = self.options.phase

    @cached_property
    def x_prior(self) -> Tensor:
        """Samples of the prior, equally many for each condition in turn: the same for every row."""
        return prior_samples(self.run, self.run.config.evaluation.prior_samples, "prior samples for log Z", self.phase)

    @cached_property
    def prior_observation(self) -> Observation:
        return self.judge.measure(self.x_prior, self.run.conditions)

    @cached_property
    @torch.no_grad()
    def yardstick(self) -> Yardstick:
        """Every real image whose condition c is known, and the diversity of the prior's samples."""
        run, judge, batches, groups = self.run, replace(self.judge, codec=Codec()), [], []
        for settings in run.config.controls:
            if run.config.classes is not None and not settings.condition:
                continue
            levels, source = self.data[settings.name].levels, settings.judge_data
            judged = [read_again(run, settings, source, levels)] if source else []
            for data in [self.data[settings.name], *judged]:
                group = data.labels[settings.condition] if settings.condition else torch.zeros(len(data)).long()
                for rows in torch.arange(len(data)).split(run.prior.codec.batch):
                    batches.append(judge.measure_batch(data.x[rows].to(judge.device), group[rows]))
                groups.append(group)
        if not batches:
            raise ValueError("no data say the prior's condition c: there is nothing real to compare with. --condition.")
        real, group = Observation.cat(batches), torch.cat(groups)
        return Yardstick.from_observations(run.conditions, real, group, self.prior_observation)

    @property
    def labelled(self) -> int:
        """The run's number of labels, of the control that has the most."""
        return max(len(data) for data in self.data.values())

    def run_models(self) -> FittedModels:
        """Return the models of the run itself."""
        seed = self.run.config.seed
        parts = {name: tuple(data.split(name, WITH_RULER, seed)[:2]) for name, data in self.data.items()}
        return FittedModels(self.run, self.data, parts, self.x_prior, self.labelled, phase=self.phase)

    def split(self, n: int, seed: int) -> dict[str, list[LabelledImages]]:
        """Split n labels of each control in three: to fit, to calibrate, held out (the run's other labels, if any)."""
        parts = {}
        for name, data in self.data.items():
            part, rest = subset(data, name, n, seed)
            parts[name] = [*part.split(name, OF_SUBSET, seed), rest] if rest else part.split(name, WITH_RULER, seed)
        return parts

    def fit_models(self, n: int, seed: int) -> FittedModels:
        """Fit p̂ and the controls on n labels of each control, or load them if that was done before."""
        folder, images = self.out / "cells" / f"{n}-labels-seed-{seed}", self.split(n, seed)
        parts = {name: tuple(three[:2]) for name, three in images.items()}
        data = {name: subset(data, name, n, seed)[0] for name, data in self.data.items()}
        if folder.is_dir():
            run = Run.load(folder, self.run.config.device, self.options.trust)
            return FittedModels(run, data, parts, self.x_prior, n, phase=self.phase)
        config = self.run.config.with_(seed=seed)
        prior, panels, seconds = configured(open_prior(config.prior, config.size), config), {}, {}
        with timed(seconds, "classifier"):
            for settings in config.controls:
                name, condition = settings.name, settings.condition if settings.classifier.conditional else None
                fitter = Fitter(name, condition, settings.classifier, seed, prior.denoiser.device)
                advance = self.phase(f"classifier of {name}", fitter.epochs(images[name][0]))
                panels[name], _ = fitter.posterior(images[name], advance, encoder_of(prior))
                if not panels[name].informed:
                    warnings.warn(
                        f"{n} labels, seed {seed}: p̂ of {name!r} is not clearly better than chance. Training would "
                        "refuse it; the methods that use it are compared all the same.",
                        stacklevel=2,
                    )
        run = Run.start(config, prior, panels)
        models = FittedModels(run, data, parts, self.x_prior, n, seconds, self.phase)
        with timed(seconds, "ctrl"):
            for _ in train(run, self.phase):
                pass
        models.save(folder)
        return models

    @torch.no_grad()
    def row(
        self, models: FittedModels, method: Method, denoiser: Denoiser, strength: float, trial: bool, with_gap: bool
    ) -> dict[str, Any]:
        """Sample by a method and score the samples; add its gap to the exact conditional if it is a Gaussian chain."""
        conditions = self.run.conditions
        labels, cond = conditions.of(conditions.all(self.repeats))
        generator, begin = stream(models.seed, "trial" if trial else "compare"), time.perf_counter()
        samples = method(denoiser, models.run.reward, labels, cond, self.run.times, generator, strength)
        seconds = time.perf_counter() - begin
        observation = self.judge.measure(samples.x_0, conditions)
        score, fidelity = score_samples(observation, conditions), self.yardstick.fidelity(observation.features)
        has_gap = with_gap and isinstance(method, Guidance)
        gap, stderr = self.gap(models, method, denoiser, strength) if has_gap else (None, None)
        names = ("accuracy", "accuracy_stderr", "judge_accuracy", "macro_f1", "class_accuracy")
        return {
            **{name: getattr(score, name) for name in names}, **asdict(fidelity), "gap_nats": gap, "gap_stderr": stderr,
            **asdict(samples.cost), "seconds": round(seconds, 2),
        }  # fmt: skip

    def gap(self, models: FittedModels, method: Guidance, denoiser: Denoiser, strength: float) -> tuple[float, float]:
        """Return log Z − J of a guided sampler under these models' p̂, and its standard error, in nats.

        On half as many paths, simulated for this: comparing with the prior is not part of what a sample costs.
        """
        run, conditions = models.run, self.run.conditions
        labels, cond = conditions.of(conditions.all(max(2, self.repeats // 2)))
        guided, n = method.steered(denoiser, run.reward), len(next(iter(labels.values())))
        generator = stream(models.seed, "gap")
        x_0, kl, log_ratio = paths(guided, n, run.times, generator, cond, labels, strength, compare=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a poor log Z from the method's own paths: the gap says as much
            certificate = certify(conditions, models.table, run.reward(x_0, labels, cond), kl, log_ratio)
        return certificate.gap, certificate.stderr

    def describe(self, models: FittedModels) -> dict[str, Any]:
        """Return what an exact sampler would score with these models' p̂, how good that is, and how long fits took."""
        target, panels = score_target(self.prior_observation, models.table, self.run.conditions), models.run.panels
        return {
            "labels": models.labels,
            "seed": models.seed,
            "target_accuracy": target.accuracy,
            "target_class_accuracy": target.class_accuracy,
            "classifier_accuracy": {name: panel.quality.accuracy for name, panel in panels.items()},
            "classifier_nll": {name: panel.quality.nll for name, panel in panels.items()},
            "uninformed": [name for name, panel in panels.items() if not panel.informed],
            "seconds": {name: round(seconds, 1) for name, seconds in models.seconds.items()},
        }

    def prior(self) -> dict[str, Any]:
        """Return the figures of the prior, which ignores y: an equal share of its samples stands for each label."""
        conditions = self.run.conditions
        members = len(self.x_prior) // conditions.groups
        share = min(self.repeats, members // conditions.classes)
        rows = torch.arange(len(self.x_prior)).view(-1, members)[:, : share * conditions.classes].flatten()
        observation = self.prior_observation[rows]
        score, fidelity = score_samples(observation, conditions), self.yardstick.fidelity(observation.features)
        return {"accuracy": score.accuracy, "class_accuracy": score.class_accuracy, **asdict(fidelity)}

    def missing_rows(
        self, fit: Callable[[], FittedModels], labels: int, seed: int, trial: bool, chosen: dict[str, dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """Compute the missing rows of one number of labels and seed; fit models only if a row needs them."""
        models = None
        for name in self.methods:
            spec = METHODS[name]
            trials = spec.settings(self.strengths)
            if not trial and name not in chosen:
                continue  # its trials said that it cannot sample this run
            if not trial and not spec.front:
                trials = [(chosen[name]["settings"], chosen[name]["strength"])]
            advance = self.phase(f"{spec.title}, {labels} labels, seed {seed}", len(trials))
            for settings, strength in trials:
                key = {"method": name, "labels": labels, "seed": seed, "strength": strength, "settings": settings}
                key["trial"] = trial
                if not any(all(row[name] == value for name, value in key.items()) for row in self.rows):
                    models = models or fit()
                    gap = not trial and strength in (1.0, chosen[name]["strength"])
                    try:
                        row = key | self.row(models, *spec.make(models, **settings), strength, trial, gap)
                    except ValueError as error:
                        warnings.warn(f"{name} is left out: {error}", stacklevel=2)
                        break
                    self.rows.append(row)
                    yield row
                advance(1)
        if chosen and (labels, seed) not in [(cell["labels"], cell["seed"]) for cell in self.cells]:
            self.cells.append(self.describe(models or fit()))

    def compute(self, models: FittedModels, cells: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Compute every missing row: of the trials on the run's own models, then of each (labels, seed)."""
        yield from self.missing_rows(lambda: models, models.labels, models.seed, True, {})
        chosen = choose_settings(self.rows)
        for n, seed in cells:
            same = (n, seed) == (models.labels, models.seed)
            fit = (lambda: models) if same else partial(self.fit_models, n, seed)
            yield from self.missing_rows(fit, n, seed, False, chosen)
