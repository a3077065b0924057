"""The training of a training: its stages, the best control so far, and the states from which it can go on."""

import json
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chain.noise import stream
from ..control.policy import Policy
from ..learn.fit import fit
from ..learn.step import Learner, LearnerSettings
from ..learn.table import LEARNERS
from ..learn.weighted import RENOISING, Weighted
from ..reward.reward import prior_table
from ..system import ranks
from ..system.checkpoint import Checkpoints, pack, subset, unpack
from ..system.files import rounded, write_text
from ..system.progress import Phase, silent
from ..system.tracking import Tracking
from .config import Config
from .folder import RunFolder
from .measure import prior_samples, probe
from .run import Run

COLLAPSE = 10.0  # nats
PROBE_PATHS = 160  # of all (c, y) together, at least


@dataclass
class BestControl:
    """The best control so far, by J on the probes' paths, which share their noise.

    What lies within the noise of a probe should cost neither accuracy nor the averaging of weights, so one standard
    error of the paired difference decides, in the spirit of Breiman et al. 1984: averaged weights may have a J lower by
    less than that, and a control that earns less reward by more must have a J higher by more than that, and by no less
    than the reward it gave up, within its error: J alone would sell most of a control's reward for as much KL.
    """

    policy: Policy
    first: float | None = None
    record: dict[str, Any] = field(default_factory=dict)
    log_w: Tensor | None = None
    earned: Tensor | None = None
    snapshot: list[Tensor] = field(default_factory=list)

    def see(self, record: dict[str, Any], log_w: Tensor, earned: Tensor) -> bool:
        """Whether a probe is the best one so far; log w and reward (n,) are of its paths."""
        if self.first is None:
            self.first = record["J"]
        else:
            gain, error = paired(log_w - self.log_w)
            reward, reward_error = paired(earned - self.earned)
            loses = reward < -reward_error
            needed = max(error, -reward - reward_error) if loses else -error if "averaged" in record else 0.0
            if not gain > needed:  # a J that is no number is not better
                return False
        self.record, self.log_w, self.earned, self.snapshot = record, log_w, earned, self.policy.snapshot()
        return True

    @property
    def improved(self) -> bool:
        """Whether any control is better than the first one seen."""
        return self.first is not None and self.record["J"] > self.first

    def reason_to_stop(self, record: dict[str, Any], idle: int, patience: int | None) -> str | None:
        """Why a learner should stop after a probe, `idle` probes in turn not having been the best; None to go on.

        The warm start may pay many nats before the next learner wins them back: it is never said to diverge.
        """
        if record["stage"] != "weighted" and not record["J"] >= self.first - abs(self.first) - COLLAPSE:
            return f"diverged: J fell to {record['J']:.1f} from the {self.first:.1f} training began with"
        return f"no better control in {idle} probes" if patience and idle >= patience else None

    def restore(self) -> None:
        """Give the policy the best control back."""
        self.policy.restore(self.snapshot)


def paired(difference: Tensor) -> tuple[float, float]:
    """Mean of differences (n,) and its standard error."""
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


@dataclass
class TrainingState:
    """Where a training stands, and what it takes to go on from there as if nothing had happened.

    A learner's paths are not kept. A state is taken only where none of them is left to be used: what comes next is
    drawn from the stage's generator, which is kept with what the learner takes along, with the state of `fit` (weights,
    their averages, AdamW's moments, the place in the learning rate's course) and with the best control. All else comes
    out the same again: p̂ is in the run folder, and an untrained control, the prior's samples, probes and certificates
    draw from streams of the seed and their purpose alone.

    Args:
        best: the best control so far.
        checkpoints: where states are saved; None saves none.
        done: stages that are over.
        records: of the log.
        idle: probes in turn that were not the best.
        seconds: training took before this process.
        renoising: the control that learned what re-noising alone does.
        within: of the stage under way, its last state; empty at its start.
        latest: what is to be saved next.
        begin: of this process's training, by its clock.
    """

    best: BestControl
    checkpoints: Checkpoints | None = None
    done: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    idle: int = 0
    seconds: float = 0.0
    renoising: list[Tensor] = field(default_factory=list)
    within: dict[str, Tensor] = field(default_factory=dict)
    latest: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    begin: float = field(default_factory=time.perf_counter)

    @classmethod
    def from_checkpoints(cls, run: Run, checkpoints: Checkpoints) -> "TrainingState":
        """Return the newest state, or the beginning if there is none; the same on every rank."""
        training = cls(BestControl(run.policy), checkpoints)
        if found := ranks.broadcast(checkpoints.newest):
            tensors, about = found
            best, device = training.best, run.policy.device
            best.first, best.record = about["first"], about["record"]
            best.log_w, best.earned = tensors.get("log_w"), tensors.get("earned")
            best.snapshot, training.renoising = (
                [value.to(device) for value in unpack(name, tensors)] for name in ("best", "renoising")
            )
            training.within = subset("within", tensors)
            training.done, training.records, training.idle = about["done"], about["records"], about["idle"]
            training.seconds = about["seconds"]
            if about["precision"] == str(run.policy.base.precision):  # another has a scale of its own
                run.policy.base.loss_scale = about["gradient_scale"]
        return training

    @property
    def elapsed(self) -> float:
        """Seconds of training so far."""
        return self.seconds + time.perf_counter() - self.begin

    def reach(self, within: dict[str, Tensor], due: bool = True) -> None:
        """Take in the state of the stage under way; it is saved if that is due."""
        best, self.within = self.best, within
        tensors = {f"within.{name}": value for name, value in within.items()}
        tensors |= pack("best", best.snapshot) | pack("renoising", self.renoising)
        tensors |= {"log_w": best.log_w, "earned": best.earned} if best.snapshot else {}
        about = {"done": self.done, "idle": self.idle, "records": self.records.copy(), "seconds": self.elapsed}
        about |= {"first": best.first, "record": best.record}
        about |= {"precision": str(best.policy.base.precision), "gradient_scale": best.policy.base.loss_scale}
        self.latest = tensors, about
        if due:
            self.save()

    def pass_on(self) -> None:
        """A stage is over."""
        self.done, self.idle, self.within = self.done + 1, 0, {}
        if self.checkpoints:
            self.reach({})

    def save(self) -> None:
        """Write the last state, if it is not written yet; of several ranks rank 0 does."""
        if self.latest and ranks.is_main():
            self.checkpoints.write(*self.latest)
            self.latest = None


class Stage(NamedTuple):
    """Name a stage of a training, its learner and the settings of both."""

    name: str
    learner: str
    settings: LearnerSettings


def stages_of(config: Config) -> Iterator[Stage]:
    """Yield the stages of a training in turn; those that prepare a learner come before it."""
    for learner in config.learners:
        for name, settings in getattr(config, learner).stages(learner).items():
            yield Stage(name, learner, settings)


def between_probes(config: Config, updates: int) -> int:
    """How many of a stage's updates lie between two probes."""
    return max(1, updates // config.evaluation.probes)


def learner_of(run: Run, name: str, phase: Phase) -> Learner:
    """Return the learner of that name with the run's settings."""
    config = run.config
    draw = partial(prior_samples, run, purpose="prior samples to learn from", phase=phase)
    options = {"micro": config.micro_batch, "offload": config.offload}
    return LEARNERS[name].from_settings(getattr(config, name), run.times, draw, **options)


def train(run: Run, phase: Phase = silent, training: TrainingState | None = None) -> Iterator[dict[str, Any]]:
    """Run the learners one after the other; yields a record of every update and probe.

    The best control of all probes is kept; the last record is that probe's, marked as kept. A `training` that is not at
    its beginning is gone on with.
    """
    few = -(-64 // run.training_conditions.groups)
    prior_table(run.reward, run.training_conditions, prior_samples(run, few, "rewards"))  # refused if one is not finite
    training = training or TrainingState(BestControl(run.policy))
    best, untrained, learner = training.best, run.policy.snapshot(), None
    run.policy.restore(best.snapshot or untrained)
    for number, (stage, name, settings) in enumerate(stages_of(run.config)):
        if number < training.done:
            continue
        learner = learner or learner_of(run, name, phase)
        if stage == RENOISING:
            run.policy.restore(untrained)
            yield from train_stage(run, stage, learner.at_even_weights(), settings, phase, training)
            training.renoising = run.policy.snapshot()
            run.policy.restore(best.snapshot or untrained)
        else:
            if isinstance(learner, Weighted) and settings.renoising:
                learner.learned_renoising = training.renoising
            yield from train_stage(run, stage, learner, settings, phase, training, best)
            learner = None
            best.restore()
            phase(f"kept: {best.record['stage']} {best.record['update']}, J {best.record['J']:.2f}", 1)(1)
        training.pass_on()
    yield {**best.record, "kept": True}


def train_stage(
    run: Run,
    stage: str,
    learner: Learner,
    settings: LearnerSettings,
    phase: Phase,
    training: TrainingState,
    best: BestControl | None = None,
) -> Iterator[dict[str, Any]]:
    """One learner from the policy as it is to averaged weights; a record of every update and probe.

    It stops early when the patience is at an end, when too many updates in turn are not finite, and when J falls far
    below what training began with; the last record then says why it `stopped`, and `best` has what is worth keeping.
    Without `best` nobody compares the probes, only the last is taken, and not to be finite is an error.
    """
    config, few, begin = run.config, -(-PROBE_PATHS // run.training_conditions.pairs), subset("fit", training.within)
    generator, updates = stream(config.seed, stage), settings.updates
    if begin:
        generator.set_state(training.within["generator"])
    carried = [value.to(run.policy.device) for value in unpack("carried", training.within)]
    steps = learner(run.policy, run.reward, run.training_conditions, generator, carried)
    lr = {"embedding": settings.lr_embedding, "adapter": settings.lr_adapter}
    every = between_probes(config, updates) if best else updates
    advance, note, skipped, due = phase(f"learner: {stage}", updates), "", {}, False

    def probed(record: dict[str, Any]) -> dict[str, Any]:
        figures, log_w, earned = probe(run, few)
        record = {**record, **figures}
        if best:
            training.idle = 0 if best.see(record, log_w, earned) else training.idle + 1
        return record

    record = {"stage": stage, "update": int(begin["counts"][0]) if begin else 0}
    advance(record["update"])
    taken = saved = record["update"]
    if best and not begin:
        yield probed(record)
    try:
        for update in fit(
            run.policy, steps, updates, lr, config.ema_decay, max_skipped=config.max_skipped, begin=begin
        ):
            record = {"stage": stage, "update": update.number, "loss": update.loss, "grad_norm": update.gradient_norm}
            skipped = {"skipped": update.skipped} if update.skipped else {}
            record |= {**update.metrics, **skipped}
            if update.number % every == 0 and update.number < updates:
                record = probed(record)
                note = f"J {record['J']:.1f} KL {record['probe_kl']:.1f}"
                if best and (reason := best.reason_to_stop(record, training.idle, config.patience)):
                    yield {**record, "stopped": reason}
                    return
            advance(1, note)
            yield record
            due = due or "J" in record or update.number - saved >= config.checkpoint
            if update.state and training.checkpoints and (due or update.number - taken >= config.checkpoint // 10):
                here = {f"fit.{name}": value for name, value in update.state().items()}
                here |= {"generator": generator.get_state(), **pack("carried", ranks.gather_lists(carried))}
                training.reach(here, due)
                taken, saved, due = update.number, update.number if due else saved, False
    except FloatingPointError as error:
        if best is None or not best.improved:
            raise
        yield {"stage": stage, "update": record["update"], "stopped": f"diverged: {error}", **skipped}
        return
    yield probed({"stage": stage, "update": updates, "averaged": True, **skipped})


def train_in(folder: RunFolder, run: Run, phase: Phase, tracking: Tracking) -> tuple[list[dict[str, Any]], float]:
    """Train a run from where the checkpoints in its folder stand; the records of its log, and the seconds it took.

    The log is made what it was then. Out of memory, once the micro-batch is halved and training goes on from the last
    state; what is trained does not depend on it, but for rounding. Several ranks are not halved.

    Raises:
        MemoryError: out of memory for all that.

    Warns:
        RuntimeWarning: the micro-batch was halved.
    """
    untrained, log, may_halve = run.policy.snapshot(), folder.log, True
    while True:
        run.policy.restore(untrained)
        training = TrainingState.from_checkpoints(run, folder.checkpoints)
        past = "".join(map(line_of, training.records))
        ranks.broadcast(lambda past=past: write_text(log, past))
        tracking.start(training.records)
        try:
            with log.open("a", encoding="utf-8") if ranks.is_main() else nullcontext() as file:
                for record in map(finite, train(run, phase, training)):
                    training.records.append(record)
                    tracking.log(record)
                    if file:
                        print(line_of(record), end="", file=file, flush=True)
            return training.records, round(training.elapsed, 1)
        except KeyboardInterrupt:
            training.save()
            raise
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        training.save()
        at_once = run.config.micro_batch or list(stages_of(run.config))[training.done].settings.batch
        if not may_halve or at_once == 1 or ranks.world_size() > 1:  # other ranks wait where they had memory enough
            raise MemoryError(
                f"out of memory. In {folder.config} turn down micro_batch (now {at_once}) or batch, or set "
                f"mixed_precision. Then go on with: ctrl train --resume {folder}"
            )
        may_halve, run.config = False, run.config.with_(micro_batch=at_once // 2)
        run.config.write(folder.config)
        torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory: training goes on with micro_batch {at_once // 2} instead of {at_once}; updates see as "
            "many samples as before.",
            RuntimeWarning,
            stacklevel=2,
        )


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the figures that are no numbers: JSON has no word for them."""
    return {key: value for key, value in record.items() if not isinstance(value, float) or math.isfinite(value)}


def line_of(record: dict[str, Any]) -> str:
    """A record as the log has it."""
    return json.dumps(rounded(record)) + "\n"


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is an allocator's, of an accelerator or the CPU."""
    words = "allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError) or any(each in str(error) for each in words)
