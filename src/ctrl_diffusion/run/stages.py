"""Train a run stage by stage, and write its log."""

import json
import math
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from ..chain.noise import stream
from ..learn.fit import fit
from ..learn.step import Learner, LearnerSettings, Speed, cost_of_update, measure_speed
from ..learn.table import LEARNERS
from ..learn.weighted import RENOISING, Weighted
from ..reward.reward import prior_table
from ..system import ranks
from ..system.checkpoint import subset, unpack
from ..system.files import rounded, write_text
from ..system.progress import Phase, seconds_in, silent
from ..system.tracking import Tracking
from .config import Config
from .folder import RunFolder
from .measure import Probe, prior_samples, probe, refine_intervals
from .run import PROBE_PATHS, Run
from .state import BestControl, Pace, TrainingState

PROBES_SHARE = 0.25  # of a time, at most
EVERY, PROBES_COST = 50, 0.15  # updates between probes that a stage follows, at least; what these cost, of theirs
SOLVED = 10  # steps in which the updates and probes of a time are weighed: each errs by a fifth of the one before
ADDED = " +"  # in the name of a stage that was added to a finished run
FELL = "J fell below that of the untrained control: {} goes on from the best, at half the rate"


class Stage(NamedTuple):
    """Name a stage of a training, its learner and the settings of both."""

    name: str
    learner: str
    settings: LearnerSettings


def stages_of(config: Config) -> Iterator[Stage]:
    """Yield the stages of a training in turn: what prepares a learner comes before it, what was added comes last."""
    for learner in config.learners:
        for name, settings in getattr(config, learner).stages(learner).items():
            yield Stage(name, learner, settings)
    learner = config.learners[-1]
    for i, updates in enumerate(config.more, start=1):
        again = getattr(config, learner).model_copy(update={"updates": updates})
        for name, settings in again.stages(learner).items():
            yield Stage(name if name == RENOISING else f"{name}{ADDED}{i}", learner, settings)


def extended(config: Config, stage: Stage, spare: int) -> tuple[Stage, int]:
    """Give a stage the evaluations that those before it left of a budget; return also what an update costs of them."""
    per_update = cost_of_update(stage.settings, config.steps)
    if config.budget is None or ADDED in stage.name or stage.name == RENOISING:
        return stage, per_update
    updates = stage.settings.updates + spare // per_update
    return stage._replace(settings=stage.settings.model_copy(update={"updates": updates})), per_update


def budgeted(run: Run, config: Config) -> Config:
    """Return a config with `time` or `updates` turned into updates of each learner, in proportion to those it has.

    A time is measured here in evaluations of the network, `budget`, and never again: `evaluation.probes` take a quarter
    of it at most, and the updates, with the further probes of a stage that follows them, what the prior's samples to
    learn from leave, half of it at least.
    """
    stages, learners = list(stages_of(config)), dict.fromkeys(config.learners)
    if config.time:
        speed = speed_of(run, max(stage.settings.batch for stage in stages))
        one = probe_paths(run) * (2 * config.steps + 1) * speed.forward
        seconds = seconds_in(config.time)
        probes = max(1, min(config.evaluation.probes, int(PROBES_SHARE * seconds / (one * len(stages))) - 1))
        cached = run.training_conditions.rows(sum(getattr(config, name).drawn for name in config.learners))
        drawn = cached * (config.steps + 1) * speed.forward  # samples of the prior to learn from
        seconds = max(seconds - (probes + 1) * one * len(stages) - drawn, seconds / 2)
        usual = sum(stage.settings.updates * speed.of_update(stage.settings, config.steps) for stage in stages)
        costs = sum(stage.settings.updates * cost_of_update(stage.settings, config.steps) for stage in stages)
        ratio = seconds / usual
        for _ in range(SOLVED):
            ratio = (seconds - one * further_probes(run, config, stages, ratio, probes)) / usual
        budget = max(1, round(ratio * costs))
        ratio, added = budget / costs, {"budget": budget, "evaluation": {"probes": probes}}
    elif config.updates:
        ratio, added = config.updates / sum(stage.settings.updates for stage in stages), {}
    else:
        return config
    groups = {name: getattr(config, name).scaled(ratio).model_dump() for name in learners}
    return config.with_(time=None, updates=None, **groups, **added)


def further_probes(run: Run, config: Config, stages: Sequence[Stage], ratio: float, probes: int) -> float:
    """Count the probes beyond so many a stage, where stages follow them for `ratio` times their updates."""
    limits = [(ratio * stage.settings.updates, longest_interval(run, config, stage)) for stage in stages
              if follows_probes(config, stage)]  # fmt: skip
    return sum(max(0.0, limit / longest - probes) for limit, longest in limits)


def speed_of(run: Run, batch: int) -> Speed:
    """Measure the speed of the run's policy, on each rank's share of a batch; the main rank's counts."""
    rows = len(range(batch)[ranks.rank_rows(batch)])
    speed = measure_speed(run.policy, run.times, run.training_conditions, max(1, rows), run.config.micro_batch)
    return ranks.broadcast(lambda: Speed(*(seconds * rows / batch for seconds in speed)))


def probe_repeats(run: Run) -> int:
    """Return how often a probe has each (c, y)."""
    return -(-PROBE_PATHS // run.probe_conditions.pairs)


def probe_paths(run: Run) -> int:
    """Return how many paths a probe has."""
    return probe_repeats(run) * run.probe_conditions.pairs


def follows_probes(config: Config, stage: Stage) -> bool:
    """Return whether a stage goes on while its probes gain: the first learner's do, of which no count is known."""
    return config.follows_probes and stage.learner == config.learners[0] and stage.name != RENOISING


def updates_before(training: TrainingState, stage: Stage) -> int:
    """Return how many updates of its learner came before a stage that was added."""
    taken: dict[str, int] = {}
    for record in training.records if ADDED in stage.name else ():
        name = record["stage"]
        if name.partition(ADDED)[0] == stage.learner and name != stage.name:
            taken[name] = max(taken.get(name, 0), record["update"])
    return sum(taken.values())


def between_probes(run: Run, config: Config, stage: Stage) -> int:
    """Return how many of a stage's updates lie between two probes.

    A stage that follows them has `evaluation.probes` of them at least, and waits no longer the larger its limit is.
    """
    every = max(1, stage.settings.updates // config.evaluation.probes)
    return min(every, longest_interval(run, config, stage)) if follows_probes(config, stage) else every


def longest_interval(run: Run, config: Config, stage: Stage) -> int:
    """Return the updates between probes of a stage that follows them, where its limit is large."""
    evaluations, cost = probe_paths(run) * (2 * config.steps + 1), cost_of_update(stage.settings, config.steps)
    return max(EVERY, math.ceil(evaluations / (PROBES_COST * max(1, cost))))  # a learner may need no evaluation


def learner_of(run: Run, name: str, phase: Phase) -> Learner:
    """Return the learner of that name with the run's settings."""
    config, conditions = run.config, run.training_conditions
    draw = partial(prior_samples, run, conditions, purpose="prior samples to learn from", phase=phase)
    settings, options = getattr(config, name), {"micro": config.micro_batch, "offload": config.offload}
    return LEARNERS[name].from_settings(settings, run.times, draw, **options)


def train(run: Run, phase: Phase = silent, training: TrainingState | None = None) -> Iterator[dict[str, Any]]:
    """Train a run's stages in turn, from where `training` stands; yield a record of every update and probe.

    The best control of all probes is kept; the last record is that of its probe, marked as kept.
    """
    conditions = run.training_conditions
    few = 64 if conditions.pooled else -(-64 // conditions.groups)
    prior_table(run.reward, conditions, prior_samples(run, conditions, few, "rewards"))  # refuse what is not finite
    training = training or TrainingState(BestControl(run.policy))
    best, untrained, learner = training.best, run.policy.snapshot(), None
    run.policy.restore(best.snapshot or untrained)
    for stage in list(stages_of(run.config))[training.done :]:
        stage, per_update = extended(run.config, stage, training.spare)
        learner = learner or learner_of(run, stage.learner, phase)
        if stage.name == RENOISING:
            run.policy.restore(untrained)
            yield from train_stage(run, stage, learner.at_even_weights(), phase, training)
            training.renoising = run.policy.snapshot()
            run.policy.restore(best.snapshot or untrained)
        else:
            if isinstance(learner, Weighted) and stage.settings.renoising:
                learner.learned_renoising = training.renoising
            taken = yield from train_stage(run, stage, learner, phase, training, best)
            training.spare, learner = (stage.settings.updates - taken) * per_update, None
            run.policy.restore(best.snapshot)
            yield from refine(run, best)
            phase(f"kept: {best.record['stage']} {best.record['update']}, J {best.record['J']:.2f}", 1)(1)
        training.finish_stage()
    yield {**best.record, "kept": True}


def refine(run: Run, best: BestControl) -> Iterator[dict[str, Any]]:
    """Refine the intervals of the best control, which is the policy's now; yield a record if that changes any."""
    figures = {key: value for key, value in best.record.items() if key == "J" or key.startswith("probe_")}
    current = Probe(figures, best.log_w, best.rewards)
    smaller = refine_intervals(run, current, probe_repeats(run))
    if smaller is not current:
        best.record, best.log_w, best.rewards = {**best.record, **smaller.figures}, smaller.log_w, smaller.rewards
        intervals = {name: list(c.interval) for name, c in run.policy.controls.items() if c.interval}
        yield {
            "stage": best.record["stage"],
            "update": best.record["update"],
            **smaller.figures,
            "intervals": intervals,
        }


def train_stage(
    run: Run, stage: Stage, learner: Learner, phase: Phase, training: TrainingState, best: BestControl | None = None
) -> Generator[dict[str, Any], None, int]:
    """Train one stage, from the policy as it is to averaged weights; yield a record of every update and probe.

    Return how many updates it took.

    The probes set its `Pace`: those of a stage that follows them are of its averaged weights, which lack the noise that
    the rate leaves in the last ones. A stage also stops when too many updates in turn are not finite, and when J falls
    far below that of the first probe; its last record then says why it `stopped`, that of averaged weights otherwise
    when and why its rate decayed to zero, and what the probes gained. The first learner, with a patience, goes on
    from the best control at half the rate where J has fallen below that of the untrained one: what is learned drowns in
    the noise of the weights where a rate is too high for a network. Without `best` no probe is compared, only the last
    is made, and updates that are not finite are an error.
    """
    config, settings, resumed = run.config, stage.settings, subset("fit", training.within)
    generator, repeats = stream(config.seed, stage.name), probe_repeats(run)
    if resumed:
        generator.set_state(training.within["generator"])
    carried = [value.to(run.policy.device) for value in unpack("carried", training.within)]
    steps = learner(run.policy, run.reward, run.training_conditions, generator, carried)
    lr = {"embedding": settings.lr_embedding, "adapter": settings.lr_adapter}
    every = between_probes(run, config, stage) if best else settings.updates
    patience, first = config.patience if best else None, stage.learner == config.learners[0]
    before = updates_before(training, stage)
    pace = Pace(training, settings.updates, patience, follows_probes(config, stage), first, before)
    begin = int(resumed["counts"][0]) if resumed else 0
    training.taken, training.saved, training.due = begin, begin, False
    advance, note, skipped = phase(f"learner: {stage.name}", settings.updates), "", {}
    advance(begin)
    record = {"stage": stage.name, "update": begin}
    if best and not resumed:
        yield probed(run, record, repeats, training, best)
    pace.consider(begin, probed=True)  # as before an interruption
    try:
        options = {"ema_decay": config.ema_decay, "max_skipped": config.max_skipped, "begin": resumed}
        options |= {"enough": lambda: pace.has_ended(record["update"]), "rate": pace.rate}
        for update in fit(run.policy, steps, settings.updates, lr, **options):
            skipped = {"skipped": update.skipped} if update.skipped else {}
            record = {"stage": stage.name, "update": update.number, "loss": update.loss}
            record |= {"grad_norm": update.gradient_norm, **update.metrics, **skipped}
            is_probed = update.number % every == 0 and update.number < pace.end
            if is_probed:
                with run.policy.holding(update.weights.average()) if pace.follows else nullcontext():
                    record = probed(run, record, repeats, training, best)
                note = f"J {record['J']:.1f} KL {record['probe_kl']:.1f}"
                if best and (lost := best.divergence(record)):
                    yield {**record, "stopped": lost}
                    return update.number
            pace.consider(update.number, is_probed)
            if is_probed and pace.slows:
                record["slower"] = FELL.format(stage.name)
                (update.weights.restart if pace.follows else run.policy.restore)(best.snapshot)
            advance(1, note)
            yield record
            training.after(update, is_probed, config.checkpoint, generator, carried)
    except FloatingPointError as error:
        if not (best and best.record["J"] > best.first):
            raise
        yield {"stage": stage.name, "update": record["update"], "stopped": f"diverged: {error}", **skipped}
        return record["update"]
    record = {"stage": stage.name, "update": record["update"], "averaged": True, **skipped}
    record |= {"stopped": pace.stopped} if pace.stopped else {}
    record |= dict(zip(("decay_from", "decay_to", "decay_reason"), training.decay or (), strict=False))
    yield probed(run, record, repeats, training, best)
    return record["update"]


def probed(
    run: Run, record: dict[str, Any], repeats: int, training: TrainingState, best: BestControl | None
) -> dict[str, Any]:
    """Probe the policy, let `best` consider it, and return the record with the probe's figures."""
    figures, log_w, rewards = probe(run, repeats)
    record = {**record, **figures}
    if best:
        training.history.add(record["update"], log_w, rewards)
        if "averaged" in record and "stopped" not in record and (climb := training.climb):
            record |= {"rose": climb.nats, "rose_stderr": climb.stderr, "rose_over": climb.updates}
        best.consider(record, log_w, rewards)
    return record


def train_in(folder: RunFolder, run: Run, phase: Phase, tracking: Tracking) -> tuple[list[dict[str, Any]], float]:
    """Train a run from the last checkpoint in its folder; return the records of its log, and the seconds it took.

    The log is cut back to that checkpoint. Out of memory, the micro-batch is halved once and training goes on from the
    last state; apart from rounding, what is trained does not depend on it. With several ranks it is not halved.
    """
    untrained, may_halve = run.policy.snapshot(), ranks.world_size() == 1  # other ranks would wait for this one
    while True:
        run.policy.restore(untrained)
        training = TrainingState.from_checkpoints(run, folder.checkpoints)
        lines = "".join(map(line_of, training.records))
        ranks.broadcast(lambda lines=lines: write_text(folder.log, lines))
        tracking.start(training.records)
        try:
            with folder.log.open("a", encoding="utf-8") if ranks.is_main() else nullcontext() as file:
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
        training.save()  # here, where the error no longer holds on to what was allocated
        halve_micro_batch(folder, run, training, may_halve)
        may_halve = False


def halve_micro_batch(folder: RunFolder, run: Run, training: TrainingState, may_halve: bool) -> None:
    """Halve the micro-batch in the run's settings and in its config.yaml, with a warning, or raise a MemoryError."""
    micro = run.config.micro_batch or list(stages_of(run.config))[training.done].settings.batch
    if not may_halve or micro == 1:
        advice = f"In {folder.config} turn down micro_batch (now {micro}) or batch, or set mixed_precision."
        raise MemoryError(f"out of memory. {advice} Then go on with: ctrl train --resume {folder}")
    run.config = run.config.with_(micro_batch=micro // 2)
    run.config.write(folder.config)
    torch.cuda.empty_cache()
    text = f"training goes on with micro_batch {micro // 2} instead of {micro}; updates see as many samples as before."
    warnings.warn(f"out of memory: {text}", RuntimeWarning, stacklevel=3)


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without its NaN and infinite figures, which JSON cannot hold."""
    return {key: value for key, value in record.items() if not isinstance(value, float) or math.isfinite(value)}


def line_of(record: dict[str, Any]) -> str:
    """Return a record as a line of the log."""
    return json.dumps(rounded(record)) + "\n"


def out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error is an allocator's, of an accelerator or the CPU."""
    words = "allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in words)
