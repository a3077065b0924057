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
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from . import assets, demo
from .certificate import certify
from .classifier import Classifier, ClassifierReport, calibrate, fit_classifier, report_classifier
from .config import Config
from .control import NULL, LoRAControl, Policy
from .data import Conditions, LabelledImages, read_imagefolder, write_imagefolder
from .evaluate import Evaluation, score_samples, score_target
from .files import rounded, write_json
from .learn.adjoint import Adjoint
from .learn.weighted import Weighted
from .pretrained import Prior
from .report import save_figure, sheet_figure, write_report
from .reward import Reward, prior_table
from .rollout import Times
from .sample import paths
from .train import fit

Advance = Callable[..., None]
Phase = Callable[[str, int], Advance]


def silent(what: str, total: int) -> Advance:
    """A phase nobody watches."""
    return lambda n=1, note="": None


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
        return Conditions(
            {"c": torch.arange(self.prior.classes)}, self.config.control, self.policy.controls[self.config.control].size
        )

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
        try:
            policy = Policy(prior.denoiser, LoRAControl.load(folder / "control", prior.denoiser))
            reward = Reward({config.control: Classifier.load(folder / "classifier")}, config.gamma)
            reader = Classifier.load(folder / "reader")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder} is damaged: {' '.join(str(error).split())}. Run ctrl demo again.") from error
        return cls(folder, config, prior, policy, reward, reader)

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
            c: (n,) classes of the prior; the null class is its number of classes.
            y: (n,) classes of the control, −1 for uncontrolled.
            strength: 0 is the prior, 1 the trained policy, more extrapolates.
            steps: of the reverse process; the training chain's if None.
            generator: of all noise; the run's seed if None.
            phase: told of progress.

        Raises:
            ValueError: c or y out of range, or of different lengths.
        """
        if len(c) != len(y):
            raise ValueError(f"c and y must be equally many, got {len(c)} and {len(y)}.")
        if c.min() < 0 or c.max() > self.prior.classes:
            raise ValueError(f"c must lie in 0 … {self.prior.classes}, got {int(c.min())} … {int(c.max())}.")
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
        settings = getattr(config, stage)
        if stage == "weighted":
            cache = prior_samples(run, settings.cache, "prior samples to learn from", phase)
            learner = Weighted(cache, run.times, settings.batch)
        else:
            chosen = {"regressed": settings.regressed, "reuse": settings.reuse, "clip": settings.clip}
            learner = Adjoint(run.times, settings.batch, **chosen)
        steps = learner(run.policy, reward, conditions, stream(config.seed, stage))
        lr = {"embedding": settings.lr_embedding, "adapter": settings.lr_adapter}
        every = max(1, settings.updates // config.evaluation.probes)
        advance, note = phase(f"learner: {stage}", settings.updates), ""
        yield {"stage": stage, "update": 0, **probe(run)}
        for update in fit(run.policy, steps, settings.updates, lr, config.ema_decay):
            record = {"stage": stage, "update": update.number, "loss": update.loss, "grad_norm": update.gradient_norm}
            record |= update.metrics
            if update.number % every == 0 and update.number < settings.updates:
                probed = probe(run)
                note = f"J {probed['J']:.1f} KL {probed['probe_kl']:.1f}"
                record |= probed
            advance(1, note)
            yield record
        yield {"stage": stage, "update": settings.updates, "averaged": True, **probe(run)}


def probe(run: Run, repeats: int = 4) -> dict[str, float]:
    """J, reward and KL in nats on a few paths."""
    pair, x_0, kl, log_ratio = policy_paths(run, repeats, "probe", silent)
    earned = run.reward(x_0, run.conditions.of(pair)[0])
    return {"J": float((earned - log_ratio).mean()), "probe_reward": float(earned.mean()), "probe_kl": float(kl.mean())}


@torch.no_grad()
def evaluate(run: Run, n: int, phase: Phase = silent) -> Evaluation:
    """Judge the run's policy on at least n paths, equally many for every (c, y), against fresh samples of the prior."""
    conditions, members, name = run.conditions, run.config.evaluation.prior_samples, run.config.control
    x_prior = prior_samples(run, members, "prior samples for log Z", phase)
    repeats = max(2, -(-n // conditions.pairs))  # one path has no spread
    pair, x_0, kl, log_ratio = policy_paths(run, repeats, "paths to certify", phase)
    labels, cond = conditions.of(pair)
    table = prior_table(run.reward, conditions, x_prior)
    # the prior ignores y: an equal share of its samples stands for each y
    share = members // conditions.classes
    uncontrolled = x_prior.unflatten(0, (-1, members))[:, : share * conditions.classes].flatten(0, 1)
    asked, under = conditions.of(conditions.all(share))
    judges = {"ruler": demo.ink_ruler, "reader": run.reader}
    return Evaluation(
        prior=score_samples(uncontrolled, asked[name], under["c"], conditions.pairs, **judges),
        target=score_target(x_prior, table, **judges),
        ctrl=score_samples(x_0, labels[name], cond["c"], conditions.pairs, **judges),
        certificate=certify(conditions, table, run.reward(x_0, labels), kl, log_ratio),
        n=len(pair),
    )


def fit_reward_classifier(
    data: LabelledImages, control: str, seed: int, phase: Phase
) -> tuple[Classifier, ClassifierReport, LabelledImages]:
    """Fit p̂(y | x), calibrate it and report it, each on its own part of the data; the last part is returned too.

    Raises:
        ValueError: on held-out data it is not better than chance by two standard errors.
    """
    fitting, calibration, held_out = data.split(control, seed=seed)
    classes, epochs = len(data.values[control]), 800
    advance = phase("classifier", epochs)
    classifier = fit_classifier(
        fitting.x, fitting.labels[control], classes, "ordinal",
        epochs=epochs, seed=seed, augment=demo.any_side_up, progress=advance,
    )  # fmt: skip
    calibrate(classifier, calibration.x, calibration.labels[control])
    quality = report_classifier(classifier, held_out.x, held_out.labels[control])
    if quality.nll + 2 * quality.nll_stderr >= quality.chance_nll:
        raise ValueError(
            f"the classifier of {control!r} is not clearly better than chance (held-out NLL {quality.nll:.2f} ± "
            f"{quality.nll_stderr:.2f} nats, chance {quality.chance_nll:.2f}): its gradients would mislead. Check the "
            "labels or bring more of them."
        )
    return classifier, quality, held_out


ARTEFACTS = ("data", "classifier", "reader", "control", "samples", "progress.jsonl", "metrics.json", "report.html")
PICTURES = ("grid.png", "curves.png", "reliability.png")


def clear(folder: Path) -> None:
    """Make room for a run: an older run in the folder goes, anything else is left alone.

    Raises:
        ValueError: the folder holds something that is no run; a run is told by a config.yaml that is one of ours.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.yaml").is_file()):
        raise ValueError(f"{folder} exists and is no run. Choose another --out.")
    if (folder / "config.yaml").is_file():
        Config.read(folder / "config.yaml")
    for name in (*ARTEFACTS, *PICTURES):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def run_demo(config: Config, folder: Path, phase: Phase = silent) -> dict:
    """The whole job on the embedded digits: data, classifier, control, certificate, report. Returns the metrics.

    Raises:
        ValueError: the folder holds something that is no run, or the classifier is no better than chance.
    """
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name], clock = round(now - clock, 1), now

    prior, dataset = Prior.from_pretrained(assets.DIGITS), demo.offline_dataset(config.seed)
    prior.denoiser.schedule.times(config.steps, config.sigma_end)  # a chain that cannot be is refused before any file
    clear(folder)
    config.write(folder / "config.yaml")
    write_imagefolder(folder / "data", dataset)
    data = read_imagefolder(folder / "data", demo.VALUES, channels=1)
    classifier, quality, held_out = fit_reward_classifier(data, config.control, config.seed, phase)
    classifier.save(folder / "classifier", asdict(quality))
    reader = demo.fit_reader(phase("reader of digits", demo.READER_EPOCHS))
    reader.save(folder / "reader")
    lap("classifier")

    values = demo.VALUES[config.control]
    policy = Policy(prior.denoiser, LoRAControl(config.control, values, prior.denoiser, config.rank, config.seed))
    run = Run(folder, config, prior, policy, Reward({config.control: classifier}, config.gamma), reader)
    records = []
    with (folder / "progress.jsonl").open("w", encoding="utf-8") as log:
        for record in train(run, phase):
            records.append(record)
            print(json.dumps(rounded(record)), file=log, flush=True)
    policy.controls[config.control].save(folder / "control")
    lap("train")

    evaluation = evaluate(run, config.evaluation.paths, phase)
    pair = run.conditions.all(1)
    y, c = pair % len(values), pair // len(values)
    write_imagefolder(folder / "samples", labelled(run, run.sample(c, y), c, y))
    lap("sample")
    metrics = evaluation.metrics() | {"classifier": asdict(quality)}
    metrics["seconds"] = {**seconds, "total": round(sum(seconds.values()), 1)}
    metrics["versions"] = {
        name: version(name) for name in ("ctrl-diffusion", "torch", "diffusers", "peft", "accelerate", "scikit-learn")
    } | {"python": platform.python_version()}
    pictures = {
        title: same_noise(run, strength)
        for title, strength in (("Prior, which ignores ink", 0.0), ("CTRL, same noise", 1.0))
    }
    write_report(folder, config, metrics, evaluation, records, classifier, held_out, pictures)
    write_json(folder / "metrics.json", metrics)
    return metrics


def same_noise(run: Run, strength: float) -> Tensor:
    """Every (y, c), c running fastest, each c on noise of its own that is the same for every y."""
    c = torch.arange(run.prior.classes)
    rows = range(run.conditions.classes)
    return torch.cat(
        [run.sample(c, torch.full_like(c, y), strength, generator=stream(run.config.seed, "grid")) for y in rows]
    )


def labelled(run: Run, x_0: Tensor, c: Tensor, y: Tensor) -> LabelledImages:
    """Samples with the labels they were asked for; a null label is blank."""
    condition, control = demo.CONDITION[0], run.config.control
    # class −1 picks the last name, the blank
    values = {condition: demo.VALUES[condition], control: (*run.policy.controls[control].values, "")}
    return LabelledImages(x_0, {condition: c, control: y}, values)


def parse_setting(run: Run, settings: list[str]) -> int:
    """The class asked for by `--set CONTROL=VALUE` settings, NULL if none.

    Raises:
        ValueError: not of that form, an unknown control or value.
    """
    chosen = NULL
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in run.policy.controls:
            raise ValueError(
                f"--set {setting}: unknown control {name!r}; this run has: {', '.join(run.policy.controls)}."
            )
        values = run.policy.controls[name].values
        if value not in values:
            raise ValueError(f"--set {setting}: {name} must be one of {', '.join(values)}, got {value!r}.")
        chosen = values.index(value)
    return chosen


def sample_to(
    run: Run,
    folder: Path,
    settings: list[str],
    c: int | None,
    n: int,
    strength: float = 1.0,
    steps: int | None = None,
    seed: int = 0,
    phase: Phase = silent,
) -> None:
    """Write n samples and a sheet of them (`grid.png`) into a new or empty folder.

    Raises:
        ValueError: a wrong setting or class, or a folder that holds something.
    """
    y = torch.full((n,), parse_setting(run, settings))
    classes = run.prior.classes
    if c is not None and not 0 <= c < classes:
        raise ValueError(f"--class must lie in 0 … {classes - 1}, got {c}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty. Choose another --out.")
    of = torch.arange(n) % classes if c is None else torch.full((n,), c)
    x_0 = run.sample(of, y, strength, steps, torch.Generator().manual_seed(seed), phase)
    write_imagefolder(folder, labelled(run, x_0, of, y))
    save_figure(folder / "grid.png", sheet_figure(x_0))
