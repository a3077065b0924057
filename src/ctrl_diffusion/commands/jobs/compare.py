"""CTRL and what else a user could do, on one footing: what `ctrl compare` runs.

Same prior and chain, same labels, same p̂ where one is used, same judge, as many samples from the same noise. What is
fitted on labels is fitted anew for each number of labels and each seed. What a method leaves open is chosen by as many
trials for each, on the run's own models; its rows stand apart.

compare.json    the rows, written as they finish
cells/          what was fitted, by number of labels and seed
report.html     the table, with pareto.png and labels.png
"""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy.stats import hmean
from scipy.stats import t as student
from sklearn.model_selection import train_test_split
from torch import Tensor

from ...chain.codec import Codec
from ...chain.denoise import Denoiser
from ...chain.noise import stream
from ...chain.paths import paths
from ...data.labelled import LabelledImages
from ...data.labels import Labels
from ...evaluate.certificate import certify
from ...evaluate.fidelity import Yardstick
from ...evaluate.judge import Observation, SecondOpinion
from ...evaluate.scores import score_samples, score_target
from ...guide.method import Method
from ...guide.steered import Guidance
from ...prior.prior import open_prior
from ...report.compare import write_compare_report
from ...reward.classifiers import WITH_RULER, fit_posterior, rounds_of
from ...run.config import ControlSettings, check_code
from ...run.measure import prior_samples, repeats_of
from ...run.prepare import encoder_of, only, read_data
from ...run.run import Run, configured
from ...run.stages import train
from ...system.files import write_json
from ...system.folders import check_room, clear
from ...system.progress import DEFAULT, JobOptions, Phase, silent, timed
from .methods import ENTRANTS, Cell

COMPARE_FILES = ("compare.json", "cells", "pareto.png", "labels.png", "report.html")
STRENGTHS = (0.5, 1.0, 2.0, 4.0)
OF_SUBSET = (0.8, 0.2)  # fit, calibration; what the subset leaves of the labels is held out


def subset(data: LabelledImages, column: str, n: int, seed: int) -> tuple[LabelledImages, LabelledImages | None]:
    """n rows, stratified by a column, and the rest.

    Raises:
        ValueError: there are fewer.
    """
    if n > len(data):
        raise ValueError(f"--labels {n}: {column} has {len(data)} labelled images. Ask for no more.")
    if n == len(data):
        return data, None
    rows, rest = train_test_split(
        torch.arange(len(data)).numpy(), train_size=n, stratify=data.strata(column).numpy(), random_state=seed
    )
    return data[rows], data[rest]


@dataclass
class Comparison:
    """One comparison: a run, what it is judged by, and the rows so far.

    Args:
        run: as it was trained.
        out: the folder.
        methods: of ENTRANTS.
        strengths: of the methods that are turned by strength.
        n: samples for a row, at least.
        phase: told of progress.
        trust: run code that files name.
    """

    run: Run
    out: Path
    methods: list[str]
    strengths: tuple[float, ...] = STRENGTHS
    n: int = 1000
    phase: Phase = silent
    rows: list[dict[str, Any]] = field(default_factory=list)
    cells: list[dict[str, Any]] = field(default_factory=list)
    trust: bool = False

    def __post_init__(self) -> None:
        run = self.run
        if settled := [c.name for c in run.config.controls if c.settled_from]:
            raise ValueError(
                f"{', '.join(settled)}: trained in another run, whose labels are not here. Compare a run whose "
                "controls were trained together."
            )
        self.data = {c.name: read_again(run, c, c.data) for c in run.config.controls}
        self.judge: SecondOpinion = replace(run.second_opinion, outside=None)
        self.repeats = repeats_of(self.n, run.conditions)

    @cached_property
    def x_prior(self) -> Tensor:
        """Samples of the prior, equally many for each condition in turn: the same for every row."""
        return prior_samples(self.run, self.run.config.evaluation.prior_samples, "prior samples for log Z", self.phase)

    @cached_property
    def of_prior(self) -> Observation:
        """What the judge sees of them."""
        return self.judge.measure(self.x_prior, self.run.conditions)

    @cached_property
    @torch.no_grad()
    def yardstick(self) -> Yardstick:
        """What is real, and how different the prior's samples are."""
        return Yardstick.from_observations(self.run.conditions, *self.real(), self.of_prior)

    def real(self) -> tuple[Observation, Tensor]:
        """What the judge sees of every real image whose c is known, and which c it is."""
        run, judge, looks, groups = self.run, replace(self.judge, codec=Codec()), [], []
        for settings in run.config.controls:
            if run.config.classes is not None and not settings.condition:
                continue
            known = [self.data[settings.name]]
            if settings.judge_data:
                known.append(read_again(run, settings, settings.judge_data))
            for data in known:
                group = data.labels[settings.condition] if settings.condition else torch.zeros(len(data)).long()
                few = torch.arange(len(data)).split(run.prior.codec.batch)
                looks += [judge.measure_batch(data.x[rows].to(judge.device), group[rows]) for rows in few]
                groups.append(group)
        if not looks:
            raise ValueError("no data say the prior's condition c: there is nothing real to compare with. --condition.")
        return Observation.cat(looks), torch.cat(groups)

    @property
    def labelled(self) -> int:
        """How many labels the run has, of the control that has the most."""
        return max(len(data) for data in self.data.values())

    def own_cell(self) -> Cell:
        """The run itself."""
        parts = {
            name: tuple(data.split(name, WITH_RULER, self.run.config.seed)[:2]) for name, data in self.data.items()
        }
        return Cell(self.run, self.data, parts, self.x_prior, self.labelled, phase=self.phase)

    def images(self, n: int, seed: int) -> dict[str, list[LabelledImages]]:
        """n labels of each control in three parts: to fit, to calibrate, and held out, the rest of the run's if any.

        Raises:
            ValueError: there are fewer, or too few of a class.
        """
        parts = {}
        for name, data in self.data.items():
            mine, rest = subset(data, name, n, seed)
            parts[name] = [*mine.split(name, OF_SUBSET, seed), rest] if rest else mine.split(name, WITH_RULER, seed)
        return parts

    def cell(self, n: int, seed: int) -> Cell:
        """p̂ and a control fitted on n labels of each control, or read where that was done before."""
        folder, images = self.out / "cells" / f"{n}-labels-seed-{seed}", self.images(n, seed)
        parts = {name: tuple(three[:2]) for name, three in images.items()}
        data = {name: subset(data, name, n, seed)[0] for name, data in self.data.items()}
        if folder.is_dir():
            there = Run.load(folder, self.run.config.device, self.trust)
            return Cell(there, data, parts, self.x_prior, n, phase=self.phase)
        config = self.run.config.model_copy(deep=True, update={"seed": seed})
        prior, panels, seconds = configured(open_prior(config.prior, config.size), config), {}, {}
        with timed(seconds, "classifier"):
            for settings in config.controls:
                name, condition = settings.name, settings.condition if settings.classifier.conditional else None
                advance = self.phase(f"classifier of {name}", rounds_of(settings.classifier, images[name][0], name))
                panels[name], _, _ = fit_posterior(
                    images[name], name, condition, settings.classifier, seed, advance, encode=encoder_of(prior),
                    device=prior.denoiser.device,
                )  # fmt: skip
                if not panels[name].informed:
                    warnings.warn(
                        f"{n} labels, seed {seed}: p̂ of {name!r} is not clearly better than chance. Training would "
                        "refuse it; what follows it is compared all the same.",
                        stacklevel=2,
                    )
        cell = Cell(Run.start(config, prior, panels), data, parts, self.x_prior, n, seconds, self.phase)
        with timed(seconds, "ctrl"):
            for _ in train(cell.run, self.phase):
                pass
        cell.save(folder)
        return cell

    def labels(self) -> tuple[Labels, dict[str, Tensor]]:
        """What every method is asked for."""
        return self.run.conditions.of(self.run.conditions.all(self.repeats))

    def settings_of(self, name: str) -> list[tuple[dict[str, Any], float]]:
        """Settings and strength of each trial of a method."""
        trials = ENTRANTS[name].trials
        return [({}, w) for w in self.strengths] if trials is None else [(settings, 1.0) for settings in trials]

    def known(self, key: dict[str, Any]) -> bool:
        """Whether there is such a row already."""
        return any(all(row[name] == value for name, value in key.items()) for row in self.rows)

    @torch.no_grad()
    def row(
        self, cell: Cell, method: Method, denoiser: Denoiser, strength: float, trial: bool, with_gap: bool
    ) -> dict[str, Any]:
        """Sample a method and judge it, with its gap to the exact conditional if it is a chain that has one."""
        run, conditions, times = cell.run, self.run.conditions, self.run.times
        labels, cond = self.labels()
        generator = stream(cell.seed, "trial" if trial else "compare")
        begin = time.perf_counter()
        found = method(denoiser, run.reward, labels, cond, times, generator, strength)
        seconds = time.perf_counter() - begin
        look = self.judge.measure(found.x_0, conditions)
        score, near, cost = score_samples(look, conditions), self.yardstick.fidelity(look.features), found.cost
        has_gap = with_gap and isinstance(method, Guidance)
        gap = self.gap(cell, method, denoiser, strength) if has_gap else (None, None)
        return {
            "accuracy": score.accuracy,
            "accuracy_stderr": score.accuracy_stderr,
            "judge_accuracy": score.judge_accuracy,
            "macro_f1": score.macro_f1,
            "class_accuracy": score.class_accuracy,
            **asdict(near),
            "gap_nats": gap[0],
            "gap_stderr": gap[1],
            "network_evaluations": cost.network,
            "classifier_evaluations": cost.classifier,
            "gradient_evaluations": cost.network_gradients,
            "classifier_gradients": cost.classifier_gradients,
            "seconds": round(seconds, 2),
        }

    def gap(self, cell: Cell, method: Guidance, denoiser: Denoiser, strength: float) -> tuple[float, float]:
        """log Z − J of a guided sampler against the exact conditional under this cell's p̂, and its error, in nats.

        On half as many paths of their own: the comparison with the prior is no part of what a sample costs.
        """
        run, conditions = cell.run, self.run.conditions
        labels, cond = conditions.of(conditions.all(max(2, self.repeats // 2)))
        steered, n = method.steered(denoiser, run.reward), len(next(iter(labels.values())))
        generator = stream(cell.seed, "gap")
        x_0, kl, log_ratio = paths(steered, n, run.times, generator, cond, labels, strength, compare=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that its paths' own log Z is off is what the gap says
            found = certify(conditions, cell.table, run.reward(x_0, labels, cond), kl, log_ratio)
        return found.gap, found.stderr

    def about(self, cell: Cell) -> dict[str, Any]:
        """What an exact sampler would score with this cell's p̂, how good that is, and what the fits took."""
        target = score_target(self.of_prior, cell.table, self.run.conditions)
        return {
            "labels": cell.labels,
            "seed": cell.seed,
            "target_accuracy": target.accuracy,
            "target_class_accuracy": target.class_accuracy,
            "classifier_accuracy": {name: panel.quality.accuracy for name, panel in cell.run.panels.items()},
            "classifier_nll": {name: panel.quality.nll for name, panel in cell.run.panels.items()},
            "uninformed": [name for name, panel in cell.run.panels.items() if not panel.informed],
            "seconds": {name: round(seconds, 1) for name, seconds in cell.seconds.items()},
        }

    def prior(self) -> dict[str, Any]:
        """The prior's own row: what comes if nobody asks."""
        conditions = self.run.conditions
        members = len(self.x_prior) // conditions.groups
        share = min(self.repeats, members // conditions.classes)
        rows = torch.arange(len(self.x_prior)).view(-1, members)[:, : share * conditions.classes].flatten()
        score = score_samples(look := self.of_prior[rows], conditions)
        near = self.yardstick.fidelity(look.features)
        return {"accuracy": score.accuracy, "class_accuracy": score.class_accuracy, **asdict(near)}

    def rows_of(self, make: Callable[[], Cell], labels: int, seed: int, trial: bool, chosen: dict) -> Iterator[dict]:
        """The rows of a cell that are not there yet; what is fitted is fitted only if one is missing."""
        cell = None
        for name in self.methods:
            asked = self.settings_of(name)
            if not trial and name not in chosen:
                continue  # it cannot be asked here, as its trials said
            if not trial and not ENTRANTS[name].front:
                asked = [(chosen[name]["settings"], chosen[name]["strength"])]
            advance = self.phase(f"{ENTRANTS[name].title}, {labels} labels, seed {seed}", len(asked))
            for settings, strength in asked:
                key = {"method": name, "labels": labels, "seed": seed, "strength": strength, "settings": settings}
                key["trial"] = trial
                if not self.known(key):
                    cell = cell or make()
                    gap = not trial and strength in (1.0, chosen[name]["strength"])
                    try:
                        row = key | self.row(cell, *ENTRANTS[name].make(cell, **settings), strength, trial, gap)
                    except ValueError as error:
                        warnings.warn(f"{name} is left out: {error}", stacklevel=2)
                        break
                    self.rows.append(row)
                    yield row
                advance(1)
        if chosen and (labels, seed) not in [(about["labels"], about["seed"]) for about in self.cells]:
            self.cells.append(self.about(cell or make()))

    def chosen(self) -> dict[str, dict[str, Any]]:
        """Of each method the best trial by the harmonic mean of accuracy and coverage: whether samples have the y asked
        for, and how many of the real x with that y they come near. Wrong labels lower one, what no real x looks like
        and too few kinds of it the other."""
        out = {}
        for name in dict.fromkeys(row["method"] for row in self.rows):
            trials = [row for row in self.rows if row["trial"] and row["method"] == name]
            best = max(trials, key=lambda row: hmean([row["accuracy"], row["coverage"]]))
            out[name] = {key: best[key] for key in ("settings", "strength", "accuracy", "coverage")}
            out[name]["trials"] = len(trials)
        return out

    def rounds(self, own: Cell, cells: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Every row that is missing: of the trials on the run's own cell, then of cells (labels, seed)."""
        yield from self.rows_of(lambda: own, own.labels, own.seed, True, {})
        chosen = self.chosen()
        for cell in cells:
            make = (lambda: own) if cell == (own.labels, own.seed) else partial(self.cell, *cell)
            yield from self.rows_of(make, *cell, False, chosen)


def read_again(run: Run, settings: ControlSettings, source: str) -> LabelledImages:
    """Labelled images of a run's control, as its training read them."""
    data = read_data(source, settings, run.prior, run.panels[settings.name].values)
    return only(data, settings.condition, run.config.classes) if settings.condition else data


def fingerprint(folder: Path) -> str:
    """Of the weights of a run: rows of another one are no rows of this."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        if path.relative_to(folder).parts[0] in ("classifier", "control"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def interval(values: Sequence[float], error: float | None = None) -> tuple[float, float | None]:
    """Mean and half the width of its 95 % confidence interval over seeds (Student's t); of one value from its error."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None if error is None else 1.96 * error
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return mean, float(student.ppf(0.975, len(values) - 1)) * spread


def averaged(rows: Sequence[dict[str, Any]], chosen: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method, number of labels and setting: of every figure (mean, half its interval) over seeds."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if not row["trial"]:
            kind = {key: row[key] for key in ("method", "labels", "strength", "settings")}
            kinds.setdefault(json.dumps(kind), []).append(row)
    out = []
    for kind, members in kinds.items():
        about, best = json.loads(kind), chosen[members[0]["method"]]
        figures = {}
        for name, value in members[0].items():
            if name not in (*about, "seed", "trial", "accuracy_stderr") and value is not None:
                error = members[0].get({"accuracy": "accuracy_stderr", "gap_nats": "gap_stderr"}.get(name, ""))
                figures[name] = interval([row[name] for row in members], error)
        is_chosen = all(about[key] == best[key] for key in ("strength", "settings"))
        title = ENTRANTS[about["method"]].title
        out.append({**about, "title": title, "chosen": is_chosen, "seeds": len(members), **figures})
    return out


def compare_job(
    folder: Path,
    out: Path | None = None,
    methods: Sequence[str] = (),
    labels: Sequence[int] = (),
    strengths: Sequence[float] = STRENGTHS,
    seeds: Sequence[int] = (),
    n: int = 1000,
    resume: bool = False,
    options: JobOptions = DEFAULT,
) -> dict[str, Any]:
    """Compare a run's control with the baselines; see this module.

    Args:
        folder: the run's.
        out: the folder to write; the run's compare/ if None.
        methods: of ENTRANTS; all if none is named.
        labels: how many of each control; all there are if none is named. Another number, or seed, than the run's is
            fitted and trained anew.
        strengths: of the methods that are turned by strength.
        seeds: of fits and noise; the run's if none is named.
        n: samples for each row, at least.
        resume: go on with what is there.
        options: progress, trust, overwriting, and the command for the report.

    Returns:
        The contents of compare.json.

    Raises:
        ValueError: what was asked for cannot be compared.
    """
    out = out or folder / "compare"
    methods = list(methods or ENTRANTS)
    if unknown := [name for name in methods if name not in ENTRANTS]:
        raise ValueError(f"--methods {unknown[0]}: unknown. There are: {', '.join(ENTRANTS)}.")
    if not resume:
        check_room(out, COMPARE_FILES[0], options.overwrite)
    run = Run.load(folder, trust=options.trust)
    check_code(run.config.model_dump(), {}, options.trust, folder / "config.yaml")
    about = {"run": fingerprint(folder), "n": n, "prior_evaluations": len(run.times), "accuracy_by": run.accuracy_by}
    found = {"about": about, "rows": [], "cells": []}
    if resume and (out / COMPARE_FILES[0]).is_file():
        found = json.loads((out / COMPARE_FILES[0]).read_text(encoding="utf-8"))
        if found["about"] != about:
            raise ValueError(f"{out} compares another run, or with another -n. Choose another --out, or --overwrite.")
    comparison = Comparison(
        run, out, methods, tuple(strengths), n, options.phase, found["rows"], found["cells"], options.trust
    )
    cells = [(n, seed) for seed in seeds or (run.config.seed,) for n in labels or (comparison.labelled,)]
    for cell in cells:
        if cell != (comparison.labelled, run.config.seed):  # the run itself, whose controls may have unlike numbers
            comparison.images(*cell)  # refused before anything is done
    if not resume:
        clear(out, COMPARE_FILES)
    (out / "cells").mkdir(parents=True, exist_ok=True)
    own, prior = comparison.own_cell(), comparison.prior()

    def whole() -> dict[str, Any]:
        return {
            "about": about, "prior": prior, "chosen": comparison.chosen(), "cells": comparison.cells,
            "rows": comparison.rows,
        }  # fmt: skip

    for _ in comparison.rounds(own, cells):
        write_json(out / COMPARE_FILES[0], whole())
    written = whole()
    write_json(out / COMPARE_FILES[0], written)
    rows, command = averaged(comparison.rows, written["chosen"]), options.command or "ctrl compare"
    write_compare_report(out, rows, written, command, version("ctrl-diffusion"))
    return written


def in_words(found: dict[str, Any]) -> str:
    """The table at the chosen settings, for a terminal."""
    lines = [f"{'':<26}{'labels':>7}{'y as asked':>12}{'diversity':>11}{'Fréchet':>9}{'gap, nats':>11}{'network':>9}"]
    for row in averaged(found["rows"], found["chosen"]):
        if row["chosen"]:
            gap = f"{row['gap_nats'][0]:.2f}" if "gap_nats" in row else "–"
            cost = row["network_evaluations"][0] / found["about"]["prior_evaluations"]
            lines.append(
                f"{row['title']:<26}{row['labels']:>7}{row['accuracy'][0]:>12.3f}{row['diversity_ratio'][0]:>11.2f}"
                f"{row['frechet'][0]:>9.2f}{gap:>11}{cost:>8.1f}×"
            )
    return "\n".join(lines)
