"""A run: its folder, and the job from labelled data to a certified control.

    config.yaml     everything needed to run again; an unknown key is an error
    data/           the offline dataset (imagefolder)
    classifier/     p̂(y | x), with its held-out report
    reader/         judges the prior's condition
    control/        the control: adapter and embedding
    progress.jsonl  one line per probe and update
    metrics.json, samples/, the pictures and report.html
"""

import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from . import assets, demo
from .certificate import Certificate, certify, prior_table
from .classifier import Classifier, ClassifierReport, calibrate, fit_classifier, report_classifier
from .control import LoRAControl, Policy
from .data import Conditions, LabelledImages, read_imagefolder, write_imagefolder
from .evaluate import Score, score_samples, score_target
from .files import write_json, write_text
from .learn.adjoint import Adjoint
from .learn.weighted import Weighted
from .pretrained import Prior
from .reward import Reward
from .rollout import Times
from .sample import paths
from .train import fit

Advance = Callable[..., None]
Phase = Callable[[str, int], Advance]


def silent(what: str, total: int) -> Advance:
    """A phase nobody watches."""
    return lambda n=1, note="": None


class Strict(BaseModel):
    """Settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")


class LearnerSettings(Strict):
    """What every learner has."""

    updates: int = Field(ge=1)
    batch: int = Field(ge=1)
    lr_embedding: float = Field(gt=0)
    lr_adapter: float = Field(gt=0)


class WeightedSettings(LearnerSettings):
    """`learn/weighted.py`; `cache` is the number of prior samples for each of the prior's conditions."""

    updates: int = 1500
    batch: int = 128
    lr_embedding: float = 5e-2
    lr_adapter: float = 4e-3
    cache: int = Field(1000, ge=1)


class AdjointSettings(LearnerSettings):
    """`learn/adjoint.py`."""

    updates: int = 400
    batch: int = 80
    lr_embedding: float = 1e-2
    lr_adapter: float = 2e-3
    regressed: int = Field(5, ge=1)
    reuse: int = Field(2, ge=1)
    clip: float = Field(10.0, gt=0)


class EvaluationSettings(Strict):
    """Samples of the prior for each of its conditions, and paths of the policy over all (c, y)."""

    prior_samples: int = Field(1000, ge=2)
    paths: int = Field(2000, ge=1)
    probes: int = Field(20, ge=1)


class Config(Strict):
    """Everything needed to run again."""

    prior: Literal["digits"] = "digits"
    control: Literal["ink"] = "ink"
    seed: int = 0
    gamma: float = Field(1.0, ge=0)
    steps: int = Field(20, ge=1)
    sigma_end: float = Field(0.1, gt=0, lt=1)
    rank: int = Field(16, ge=1)
    learners: list[Literal["weighted", "adjoint"]] = Field(["weighted", "adjoint"], min_length=1)
    ema_decay: float = Field(0.99, ge=0, lt=1)
    weighted: WeightedSettings = WeightedSettings()
    adjoint: AdjointSettings = AdjointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @classmethod
    def read(cls, path: Path) -> "Config":
        """Read a config.yaml.

        Raises:
            ValueError: one line that names each wrong key.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
            raise ValueError(f"{path}: {wrong}.") from error

    def write(self, path: Path) -> None:
        """Write it whole."""
        write_text(path, yaml.safe_dump(self.model_dump(), sort_keys=False))


def stream(seed: int, purpose: str) -> torch.Generator:
    """An independent random stream for each purpose of a run."""
    state = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


@dataclass
class Run:
    """A prior, a control on it, and how they are judged.

    Args:
        folder: the run's.
        config: its settings.
        prior: the pre-trained model.
        policy: the prior with the control.
        reward: γ log p̂.
        reader: reads the prior's condition off a sample.
    """

    folder: Path
    config: Config
    prior: Prior
    policy: Policy
    reward: Reward
    reader: Classifier

    @property
    def conditions(self) -> Conditions:
        """All (c, y)."""
        return Conditions({"c": torch.arange(self.prior.classes)}, self.config.control, len(demo.CONTROL[1]))

    @property
    def times(self) -> Times:
        """The training chain's grid; the certificate holds for this chain only."""
        return self.times_of(self.config.steps)

    def times_of(self, steps: int) -> Times:
        """The grid of another number of steps."""
        return self.policy.schedule.times(steps, self.config.sigma_end)

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Open a finished run.

        Raises:
            ValueError: no such folder, no run, or a run that did not finish.
        """
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}. Make a run with: ctrl demo --out {folder}")
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"{folder} is not a run folder: it has no config.yaml. Make one with: ctrl demo --out DIR")
        config = Config.read(folder / "config.yaml")
        missing = [name for name in ("classifier", "reader", "control") if not (folder / name).is_dir()]
        if missing:
            raise ValueError(f"{folder} is an unfinished run: it lacks {', '.join(missing)}. Run ctrl demo again.")
        prior = Prior.from_pretrained(assets.DIGITS)
        policy = Policy(prior.denoiser, LoRAControl.load(folder / "control", prior.denoiser))
        reward = Reward({config.control: Classifier.load(folder / "classifier")}, config.gamma)
        return cls(folder, config, prior, policy, reward, Classifier.load(folder / "reader"))

    def sample(
        self,
        c: Tensor,
        y: Tensor,
        strength: float = 1.0,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        phase: Phase = silent,
    ) -> Tensor:
        """Samples (n, C, H, W) in [−1, 1] of p(x | c, y).

        Args:
            c: (n,) classes of the prior.
            y: (n,) classes of the control, −1 for uncontrolled.
            strength: 0 is the prior, 1 the trained policy, more extrapolates.
            steps: of the reverse process; the training chain's if None.
            generator: of all noise; the run's seed if None.
            phase: told of progress.
        """
        generator = generator or stream(self.config.seed, "sample")
        times = self.times_of(steps) if steps else self.times
        labels = {self.config.control: y}
        progress = phase("sampling", len(c))
        x_0, _, _ = paths(self.policy, len(c), times, generator, {"c": c}, labels, strength, progress=progress)
        return x_0.clamp(-1, 1)


def prior_samples(run: Run, members: int, purpose: str, phase: Phase) -> Tensor:
    """Independent samples of the prior, `members` for each condition in turn."""
    c = torch.arange(run.prior.classes).repeat_interleave(members)
    advance = phase(purpose, len(c))
    return paths(run.prior.denoiser, len(c), run.times, stream(run.config.seed, purpose), {"c": c}, progress=advance)[0]


def policy_paths(run: Run, repeats: int, purpose: str, phase: Phase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Paths of the policy, `repeats` for every (c, y) in turn: pair, x_0, KL and log-ratio of each."""
    pair = run.conditions.all(repeats)
    labels, cond = run.conditions.of(pair)
    generator, advance = stream(run.config.seed, purpose), phase(purpose, len(pair))
    return pair, *paths(run.policy, len(pair), run.times, generator, cond, labels, compare=True, progress=advance)


def train(run: Run, phase: Phase) -> Iterator[dict]:
    """Run the learners one after the other; yields a record of every update and probe.

    A probe measures J on paths whose noise is the same at every probe.
    """
    config, conditions, reward = run.config, run.conditions, run.reward
    for stage in config.learners:
        settings: LearnerSettings = getattr(config, stage)
        if stage == "weighted":
            cache = prior_samples(run, settings.cache, "prior samples to learn from", phase)
            learner = Weighted(cache, run.times, settings.batch)
        else:
            chosen = {"regressed": settings.regressed, "reuse": settings.reuse, "clip": settings.clip}
            learner = Adjoint(run.times, settings.batch, **chosen)
        steps = learner(run.policy, reward, conditions, stream(config.seed, stage))
        lr = {"embedding": settings.lr_embedding, "adapter": settings.lr_adapter}
        every = max(1, settings.updates // config.evaluation.probes)
        advance, note = phase(f"training: {stage}", settings.updates), ""
        yield {"stage": stage, "update": 0, **probe(run)}
        for update in fit(run.policy, steps, settings.updates, lr, config.ema_decay):
            record = {"stage": stage, "update": update.number, "loss": update.loss, "grad_norm": update.gradient_norm}
            record |= update.metrics
            if update.number % every == 0 and update.number < settings.updates:
                probed = probe(run)
                note = f"J {probed['J']:.2f}  KL {probed['probe_kl']:.2f}"
                record |= probed
            advance(1, note)
            yield record
        yield {"stage": stage, "update": settings.updates, "averaged": True, **probe(run)}


def probe(run: Run, repeats: int = 4) -> dict[str, float]:
    """J, reward and KL in nats on a few paths."""
    pair, x_0, kl, log_ratio = policy_paths(run, repeats, "probe", silent)
    earned = run.reward(x_0, run.conditions.of(pair)[0])
    return {"J": float((earned - log_ratio).mean()), "probe_reward": float(earned.mean()), "probe_kl": float(kl.mean())}


@dataclass
class Evaluation:
    """Everything `evaluate` measures: the prior, the target, the policy and the certificate."""

    prior: Score
    target: Score
    ctrl: Score
    certificate: Certificate
    n: int

    def metrics(self) -> dict[str, dict[str, float]]:
        """The figures by the names metrics.json uses."""
        target, ctrl, gap = self.target, self.ctrl, self.certificate
        return {
            "prior": {
                "accuracy": self.prior.accuracy,
                "class_accuracy": self.prior.class_accuracy,
                "diversity": self.prior.diversity,
            },
            "target": {
                "accuracy": target.accuracy,
                "class_accuracy": target.class_accuracy,
                "diversity": target.diversity,
            },
            "ctrl": {
                "samples": self.n,
                "accuracy": ctrl.accuracy,
                "macro_f1": ctrl.macro_f1,
                "class_accuracy": ctrl.class_accuracy,
                "diversity_ratio": ctrl.diversity / target.diversity,
                "kl_nats": gap.kl,
            },
            "certificate": {
                "objective_nats": gap.objective,
                "log_z_nats": gap.log_z,
                "log_z_policy_nats": gap.log_z_policy,
                "gap_nats": gap.gap,
                "gap_stderr": gap.stderr,
                "ess_fraction": gap.ess,
            },
        }


@torch.no_grad()
def evaluate(run: Run, n: int, phase: Phase = silent) -> Evaluation:
    """Judge the run's policy on at least n paths, equally many for every (c, y), against fresh samples of the prior."""
    conditions = run.conditions
    members, repeats = run.config.evaluation.prior_samples, max(2, -(-n // conditions.pairs))
    x_prior = prior_samples(run, members, "prior samples to measure log Z", phase)
    pair, x_0, kl, log_ratio = policy_paths(run, repeats, "paths of the policy to certify", phase)
    labels, cond = conditions.of(pair)
    table = prior_table(run.reward, conditions, x_prior)
    # the prior ignores y: its samples stand for every y in turn
    uncontrolled = x_prior.view(conditions.groups, members, *x_prior.shape[1:])[:, : repeats * conditions.classes]
    as_asked = conditions.of(conditions.all(uncontrolled.shape[1] // conditions.classes))
    judges = {"ruler": demo.ink_ruler, "reader": run.reader}
    y, c = as_asked[0][run.config.control], as_asked[1]["c"]
    return Evaluation(
        prior=score_samples(uncontrolled[:, : len(y) // conditions.groups].flatten(0, 1), y, c, conditions.pairs, **judges),
        target=score_target(x_prior, table, **judges),
        ctrl=score_samples(x_0, labels[run.config.control], cond["c"], conditions.pairs, **judges),
        certificate=certify(conditions, table, run.reward(x_0, labels), kl, log_ratio),
        n=len(pair),
    )


def run_demo(config: Config, folder: Path, phase: Phase = silent) -> dict:
    """The whole job on the embedded digits: data, classifier, control, certificate, report. Returns the metrics.

    Raises:
        ValueError: the folder holds something that is no run, or the classifier is worse than chance.
    """
    from .report import write_report

    if folder.exists() and any(folder.iterdir()) and not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} holds files that are no run. Choose another --out.")
    seconds = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name], clock = round(now - clock, 1), now

    config.write(folder / "config.yaml")
    write_imagefolder(folder / "data", demo.offline_dataset(config.seed))
    columns = dict([demo.CONDITION, demo.CONTROL])
    data = read_imagefolder(folder / "data", columns, channels=1)
    classifier, quality, held_out = fit_and_report(data, config.seed, phase)
    classifier.save(folder / "classifier", quality)
    reader = demo.fit_reader()
    reader.save(folder / "reader")
    lap("classifier")

    prior = Prior.from_pretrained(assets.DIGITS)
    name, values = demo.CONTROL
    policy = Policy(prior.denoiser, LoRAControl(name, len(values), prior.denoiser, config.rank, config.seed))
    run = Run(folder, config, prior, policy, Reward({name: classifier}, config.gamma), reader)
    records = list(train(run, phase))
    policy.controls[name].save(folder / "control")
    write_text(folder / "progress.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    lap("train")

    evaluation = evaluate(run, config.evaluation.paths, phase)
    lap("sample")
    metrics = evaluation.metrics() | {"classifier": asdict(quality)}
    seconds["total"] = round(sum(seconds.values()), 1)
    metrics["seconds"] = seconds
    metrics["peak_memory_gb"] = round(peak_memory(), 2)
    metrics["versions"] = {name: version(name) for name in ("torch", "diffusers", "peft", "accelerate", "scikit-learn")}
    metrics["versions"] |= {"python": platform.python_version(), "ctrl-diffusion": version("ctrl-diffusion")}
    write_report(run, evaluation, metrics, records, held_out)
    write_json(folder / "metrics.json", metrics)
    return metrics
