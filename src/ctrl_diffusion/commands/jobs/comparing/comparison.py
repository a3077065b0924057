"""Compute the rows of a comparison: fit on each number of labels with each seed, try settings, sample and score."""

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from ....chain.codec import Codec
from ....chain.denoise import Denoiser
from ....chain.noise import stream
from ....chain.paths import paths
from ....data.images import Levels
from ....data.labelled import LabelledImages
from ....evaluate.certificate import certify
from ....evaluate.fidelity import NEIGHBOURS, Fidelity, Yardstick
from ....evaluate.judge import Observation, SecondOpinion
from ....evaluate.scores import score_samples, score_target
from ....guide.method import Method
from ....guide.steered import Guidance
from ....prior.prior import open_prior
from ....reward.classifiers import WITH_JUDGE, WITH_RULER, ClassifierSettings, Fitter, settings_of, shares_of
from ....reward.reward import ENOUGH, hits
from ....run.config import ControlSettings
from ....run.measure import prior_samples, repeats_of
from ....run.prepare import encoder_of, read_data, select_classes
from ....run.run import Run, configured
from ....run.stages import train
from ....system.files import finite_or_none
from ....system.progress import DEFAULT, JobOptions, timed
from .methods import METHODS, FittedModels, Rows, choose_settings, trials_of

STRENGTHS = (0.5, 1.0, 2.0, 4.0)
FEWEST_REAL = 2 * (NEIGHBOURS + 1)  # images of a label, half of which may be held out
OF_SUBSET = (0.8, 0.2)  # fit, calibration; the labels outside the subset are held out


def subset(data: LabelledImages, column: str, n: int, seed: int) -> tuple[LabelledImages, LabelledImages | None]:
    """Split into n rows, stratified by a column, and the rest; raise ValueError if there are fewer."""
    if n > len(data):
        raise ValueError(f"--labels {n}: {column} has {len(data)} labelled images. Ask for no more.")
    if n == len(data):
        return data, None
    strata = data.strata(column).numpy()
    rows, rest = train_test_split(torch.arange(len(data)).numpy(), train_size=n, stratify=strata, random_state=seed)
    return data[rows], data[rest]


def read_again(run: Run, settings: ControlSettings, source: str, levels: Levels | None = None) -> LabelledImages:
    """Read the labelled images of a run's control as its training did, those of its judge with the others' levels."""
    data = read_data(source, settings, run.prior, run.panels[settings.name].values, levels=levels)
    embed = run.prior.embedding_of if run.panels[settings.name].classifier.embedding else None
    return select_classes(data, settings.condition, run.known_classes, embed) if settings.condition else data


def without(data: LabelledImages, digests: Collection[bytes]) -> LabelledImages:
    """Return the rows whose image is none of some, whatever it is called."""
    if not digests:
        return data
    return data[torch.tensor([digest not in digests for digest in data.digests()]).nonzero().squeeze(1)]


def judge_digests(run: Run, settings: ControlSettings, data: LabelledImages) -> set[bytes]:
    """Return the digests of the images that the judge of a control was fitted on, the run's `data` or others.

    Raises ValueError if they are not known and the judge alone measures y.
    """
    panel, seed = run.panels[settings.name], run.config.seed
    if panel.judge is None:
        return set()
    if panel.judge_images is not None:
        return set(map(bytes, panel.judge_images.tolist()))
    if not settings.classifier_from:  # of a run made before they were written
        if settings.judge_data:
            return set(read_data(settings.judge_data, settings, run.prior, panel.values, condition=False).digests())
        return set() if settings.ruler else set(data.split(settings.name, WITH_JUDGE, seed)[-1].digests())
    said = f"{settings.classifier_from} does not say which images the judge of {settings.name!r} was fitted on"
    if not settings.ruler:
        raise ValueError(f"{said}: methods might be fitted on them. Fit it again with ctrl classifier, and train anew.")
    warnings.warn(f"{said}: methods may be fitted on them. Go by the ruler, not by the judge.", stacklevel=2)
    return set()


def figures_of(fidelity: Fidelity) -> dict[str, float | None]:
    """Return the figures of a fidelity by name, None for one that no (c, y) has."""
    return {name: None if math.isnan(value) else value for name, value in asdict(fidelity).items()}


@dataclass
class Comparison:
    """Compare methods on one run, with the rows that are finished so far."""

    run: Run
    out: Path  # the folder of the comparison
    methods: list[str]  # names in METHODS
    strengths: tuple[float, ...] = STRENGTHS  # trials begin with these; a best on their edge widens them
    n: int = 1000  # samples for a row, at least
    rows: Rows = field(default_factory=list)  # of compare.json
    cells: Rows = field(default_factory=list)  # of compare.json: `describe` for each number of labels and seed
    left_out: Rows = field(default_factory=list)  # of compare.json: what could not be sampled, and why
    options: JobOptions = DEFAULT

    def __post_init__(self) -> None:
        run = self.run
        if fixed := [control.name for control in run.config.controls if control.settled_from]:
            raise ValueError(
                f"{', '.join(fixed)}: trained in another run, whose labels are not here. Compare a run whose "
                "controls were trained together."
            )
        self.classifiers = {c.name: self.classifier_settings(c) for c in run.config.controls}
        self.data: dict[str, LabelledImages] = {}  # of each control: what methods may be fitted on
        self.judged: dict[str, LabelledImages] = {}  # the rest of its data, which its judge was fitted on
        self.parts: dict[str, tuple[LabelledImages, LabelledImages]] = {}  # what the run's own p̂ was fitted on
        for control in run.config.controls:
            self.set_apart(control)
        self.judge: SecondOpinion = replace(run.second_opinion, outside=None)
        self.repeats, self.phase = repeats_of(self.n, run.conditions), self.options.phase

    def classifier_settings(self, control: ControlSettings) -> ClassifierSettings:
        """Return what the run's p̂ of a control was fitted with."""
        panel = self.run.panels[control.name]
        return settings_of(panel, control.classifier) if control.classifier_from else control.classifier

    def set_apart(self, control: ControlSettings) -> None:
        """Read a control's data, and keep the images of its judge, and copies of them, from whatever is fitted."""
        name, whole = control.name, read_again(self.run, control, control.data)
        judged = judge_digests(self.run, control, whole)
        self.data[name] = without(whole, judged)
        if judged:
            self.judged[name] = without(whole, self.data[name].digests())
        if control.classifier_from:  # what that p̂ was fitted on is not known
            parts = self.data[name].split(name, WITH_RULER, self.run.config.seed)
        else:
            parts = whole.split(name, shares_of(bool(control.ruler), bool(control.judge_data)), self.run.config.seed)
        self.parts[name] = tuple(without(part, judged) for part in parts[:2])

    @cached_property
    def x_prior(self) -> Tensor:
        """Samples of the prior, equally many for each condition in turn: the same for every row."""
        members, conditions = self.run.config.evaluation.prior_samples, self.run.conditions
        return prior_samples(self.run, conditions, members, "prior samples for log Z", self.phase)

    @cached_property
    def prior_observation(self) -> Observation:
        return self.judge.measure(self.x_prior, self.run.conditions)

    @cached_property
    @torch.no_grad()
    def yardstick(self) -> Yardstick:
        """Real images whose condition c is known, and the diversity of the prior's samples.

        They are those no method was fitted on, the judge's own, unless some label has too few among these.
        """
        apart, fitted = [], []
        seen = {digest for data in self.data.values() for digest in data.digests()}
        for settings in self.run.config.controls:
            if self.run.classes is not None and not settings.condition:
                continue
            fitted += self.observe(self.data[settings.name], settings.condition)
            sources = [self.judged[settings.name]] if settings.name in self.judged else []
            if settings.judge_data:
                levels = self.data[settings.name].levels
                sources.append(read_again(self.run, settings, settings.judge_data, levels))
            for data in (without(source, seen) for source in sources):
                apart += self.observe(data, settings.condition)
                seen.update(data.digests())
        if not apart + fitted:
            raise ValueError("no data say the prior's condition c: there is nothing real to compare with. --condition.")
        counts = [self.count_labels(observations) for observations in (apart, fitted)]
        if short := ((counts[0] < FEWEST_REAL) & (counts[1] > 0)).any():
            warnings.warn(
                f"fewer than {FEWEST_REAL} real x of some label were kept from the methods: these are compared with "
                "what they were fitted on, too, and a copy of that comes near. Name other images as judge_data.",
                stacklevel=2,
            )
        observations, groups = zip(*(apart + fitted if short else apart), strict=True)
        real, group = Observation.cat(list(observations)), torch.cat(groups)
        arguments = self.run.conditions, real, group, self.prior_observation
        return Yardstick.from_observations(*arguments, held_out=self.repeats, seed=self.run.config.seed)

    def observe(self, data: LabelledImages, condition: str | None) -> list[tuple[Observation, Tensor]]:
        """Measure the real images of the conditions measured, batch by batch; return these conditions (n,) too."""
        judge, batches = replace(self.judge, codec=Codec()), []
        number = data.labels[condition] if condition else torch.zeros(len(data)).long()
        group = judge.groups_of(number, self.run.conditions)
        for rows in (group >= 0).nonzero().flatten().split(self.run.prior.codec.batch) if (group >= 0).any() else ():
            batches.append((judge.measure_batch(data.x[rows].to(judge.device), number[rows]), group[rows]))
        return batches

    def count_labels(self, observations: list[tuple[Observation, Tensor]]) -> Tensor:
        """Count the real images of each label: (K,)."""
        labels = [self.run.conditions.label_of(observation.labels) + 1 for observation, _ in observations]  # null is 0
        return torch.cat([*labels, torch.empty(0).long()]).bincount(minlength=self.run.conditions.classes + 1)[1:]

    def real(self) -> dict[str, Any] | None:
        """Return the figures of real x that were held out, as many as samples or half of those there are."""
        fidelity, held_out = self.yardstick.fidelity_of_real(), self.yardstick.held_out
        if fidelity is None:
            warnings.warn("too few real x of any (c, y) to hold some out: there is no row of real data.", stacklevel=2)
            return None
        counts = {"n": sum(map(len, held_out)), "n_compared": sum(map(len, self.yardstick.real))}
        return {**counts, "n_samples": self.repeats * self.run.conditions.pairs, **figures_of(fidelity)}

    @property
    def labelled(self) -> int:
        """The run's number of labels that methods may be fitted on, of the control that has the most."""
        return max(len(data) for data in self.data.values())

    def run_models(self) -> FittedModels:
        """Return the models of the run itself."""
        arguments = self.run, self.data, self.parts, self.classifiers, self.x_prior, self.labelled
        return FittedModels(*arguments, phase=self.phase)

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
            run.split = self.run.split  # of one seed, so that all are measured on the same conditions c
            return FittedModels(run, data, parts, self.classifiers, self.x_prior, n, phase=self.phase)
        config = self.run.config.with_(seed=seed)
        prior, panels, seconds = configured(open_prior(config.prior, config.size), config), {}, {}
        with timed(seconds, "classifier"):
            for settings in config.controls:
                name, classifier = settings.name, self.classifiers[settings.name]
                condition = settings.condition if classifier.conditional else None
                fitter = Fitter(name, condition, classifier, seed, prior.denoiser.device)
                advance = self.phase(f"classifier of {name}", fitter.epochs(images[name][0]))
                panels[name], _ = fitter.posterior(images[name], advance, encoder_of(prior))
                if not panels[name].informed:
                    text = f"{n} labels, seed {seed}: p̂ of {name!r} is not clearly better than chance. Training would"
                    text += " refuse it; the methods that use it are compared all the same."
                    warnings.warn(text, stacklevel=2)
        run = Run.start(config, prior, panels)
        run.split = self.run.split
        models = FittedModels(run, data, parts, self.classifiers, self.x_prior, n, seconds, self.phase)
        with timed(seconds, "ctrl"):
            for _ in train(run, self.phase):
                pass
        models.save(folder)
        return models

    @torch.no_grad()
    def row(
        self, models: FittedModels, method: Method, denoiser: Denoiser, strength: float, trial: bool
    ) -> dict[str, Any]:
        """Sample by a method and score the samples; add its gap to the exact conditional if it is a Gaussian chain.

        Raises ValueError if the method cannot sample, or what it draws is not finite, as guidance turned up too far.
        """
        conditions = self.run.conditions
        labels, cond = conditions.of(conditions.all(self.repeats))
        generator, begin = stream(models.seed, "trial" if trial else "compare"), time.perf_counter()
        samples = method(denoiser, models.run.reward, labels, cond, self.run.times, generator, strength)
        seconds = time.perf_counter() - begin
        if not samples.x_0.isfinite().all():
            raise ValueError("its samples are not finite.")
        observation = self.judge.measure(samples.x_0, conditions)
        score, fidelity = score_samples(observation, conditions), self.yardstick.fidelity(observation.features)
        guided = isinstance(method, Guidance)
        gap, stderr = self.gap(models, method, denoiser, strength, trial) if guided else (None, None)
        names = ("accuracy", "accuracy_stderr", "judge_accuracy", "macro_f1", "class_accuracy")
        return {
            **{name: getattr(score, name) for name in names}, **figures_of(fidelity), "gap_nats": gap,
            "gap_stderr": stderr, **asdict(samples.cost), "seconds": round(seconds, 2),
        }  # fmt: skip

    def gap(
        self, models: FittedModels, method: Guidance, denoiser: Denoiser, strength: float, trial: bool
    ) -> tuple[float | None, float | None]:
        """Return log Z − J of a guided sampler under these models' p̂, and its standard error, in nats.

        None where too few samples of the prior have any y.

        On half as many paths, simulated for this: comparing with the prior is not part of what a sample costs.
        """
        run, conditions = models.run, self.run.conditions
        labels, cond = conditions.of(conditions.all(max(2, self.repeats // 2)))
        guided, n = method.steered(denoiser, run.reward), len(next(iter(labels.values())))
        generator = stream(models.seed, "gap of a trial" if trial else "gap")
        x_0, kl, log_ratio = paths(guided, n, run.times, generator, cond, labels, strength, compare=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a poor log Z from the method's own paths: the gap says as much
            reward, gamma = run.reward(x_0, labels, cond), run.config.gamma
            certificate = certify(conditions, models.table, reward, kl, log_ratio, gamma)
        if certificate.gap is not None and not math.isfinite(certificate.gap):
            raise ValueError("its gap is not finite.")
        return certificate.gap, certificate.stderr

    def describe(self, models: FittedModels) -> dict[str, Any]:
        """Return what an exact sampler would score with these models' p̂, how good that is, and how long fits took."""
        conditions, panels = self.run.conditions, models.run.panels
        known = hits(models.table, models.run.config.gamma) >= ENOUGH
        target = score_target(self.prior_observation, models.table, conditions, known)
        return {
            "labels": models.labels,
            "seed": models.seed,
            "target_accuracy": finite_or_none(target.accuracy),
            "target_class_accuracy": finite_or_none(target.class_accuracy),
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
        return {"accuracy": score.accuracy, "class_accuracy": score.class_accuracy, **figures_of(fidelity)}

    def missing_row(
        self, fit: Callable[[], FittedModels], name: str, labels: int, seed: int, settings: dict[str, Any],
        strength: float, trial: bool = False,
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Compute a row unless it is there; write down why where the method cannot sample."""
        key = {"method": name, "labels": labels, "seed": seed, "strength": strength, "settings": settings}
        key["trial"] = trial
        if any(all(row[k] == value for k, value in key.items()) for row in (*self.rows, *self.left_out)):
            return
        models, spec = fit(), METHODS[name]
        try:
            row = key | self.row(models, *spec.make(models, **settings), strength, trial)
        except ValueError as error:
            at = "".join(f", {setting} {value}" for setting, value in settings.items())
            warnings.warn(f"{name} at strength {strength:g}{at} is left out: {error}", stacklevel=2)
            self.left_out.append({**key, "reason": str(error)})
            return
        self.rows.append(row)
        yield row

    def trials(self, models: FittedModels) -> Iterator[dict[str, Any]]:
        """Compute the missing trials on the run's own models, until the best of every method lies inside its grid."""
        for name in self.methods:
            spec = METHODS[name]
            known, done = len(spec.grid(self.strengths)) + len(spec.trials), 0
            advance = self.phase(f"{spec.title}, trials", known)
            while trial := spec.next_trial(trials_of([*self.rows, *self.left_out], name), self.strengths):
                yield from self.missing_row(lambda: models, name, models.labels, models.seed, *trial, trial=True)
                done += 1
                advance(int(done <= known))
            for value in (choose_settings(self.rows, self.left_out).get(name) or {"on_edge": ()})["on_edge"]:
                warnings.warn(
                    f"{name}: the best trial, at {spec.knob.setting or 'strength'} {value:g}, lies on the edge of the "
                    "widest grid there is. A better one may lie beyond.",
                    stacklevel=2,
                )

    def points(self, name: str, chosen: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
        """List settings and strengths that get a row: every trial of a guided method, else the chosen and w = 1."""
        best, spec = (chosen["settings"], chosen["strength"]), METHODS[name]
        if not spec.front:
            return [best] if best[1] == 1.0 else [(best[0], 1.0), best]
        trials = [(settings, w) for settings, w, scores in trials_of(self.rows, name) if scores]
        return sorted(trials, key=lambda trial: spec.value(*trial))

    def missing_rows(
        self, fit: Callable[[], FittedModels], labels: int, seed: int, chosen: dict[str, dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """Compute the missing rows of one number of labels and seed; fit models only if a row needs them."""
        for name in self.methods:
            if name not in chosen:
                continue  # its trials said that it cannot sample this run
            points = self.points(name, chosen[name])
            advance = self.phase(f"{METHODS[name].title}, {labels} labels, seed {seed}", len(points))
            for settings, strength in points:
                yield from self.missing_row(fit, name, labels, seed, settings, strength)
                advance(1)
        if chosen and (labels, seed) not in [(cell["labels"], cell["seed"]) for cell in self.cells]:
            self.cells.append(self.describe(fit()))

    def compute(self, models: FittedModels, cells: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Compute every missing row: of the trials on the run's own models, then of each (labels, seed)."""
        yield from self.trials(models)
        chosen = choose_settings(self.rows, self.left_out)
        for n, seed in cells:
            same = (n, seed) == (models.labels, models.seed)
            fit = (lambda: models) if same else cache(partial(self.fit_models, n, seed))
            yield from self.missing_rows(fit, n, seed, chosen)
