"""What a training will take, before it starts: its code with a few updates, and what that does not show, counted."""

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ...chain.noise import stream
from ...chain.paths import default_batch, paths
from ...data.labelled import RAREST, LabelledImages
from ...learn.weighted import RENOISING
from ...reward.classifiers import BATCH, fit_panel
from ...reward.panel import Panel
from ...run.config import Config
from ...run.defaults import quick
from ...run.measure import STRENGTHS, partial_choices, repeats_of, step_counts
from ...run.prepare import ControlInputs, PreparedTraining, encoder_of, prepare
from ...run.run import Run
from ...run.stages import PROBE_PATHS, between_probes, stages_of, train
from ...run.state import BestControl, TrainingState
from ...system import ranks
from ...system.checkpoint import Checkpoints
from ...system.progress import DEFAULT, JobOptions, Phase, silent
from .inspect import MEGABYTE, calls, evaluations, kept_bytes

MANY = 2000  # labelled images
# of what is trained: itself, gradient, average, two moments; three controls that are kept; the four of a saved state
COPIES = 12


def estimate_job(given: dict[str, Any], options: JobOptions = DEFAULT) -> dict[str, Any]:
    """What `train_job` would take with the same settings; nothing is written.

    Args:
        given: settings by the names of `Config`, of which prior, data and control must be there.
        options: see `train_job`.

    Raises:
        ValueError: what `train_job` would refuse before it fits anything, or several processes.
    """
    if ranks.world_size() > 1:
        raise ValueError("--dry-run: one process measures what one takes. Start it without accelerate launch.")
    job = prepare(given, options)
    return estimated(replace(job, config=quick(job.config)) if options.quick else job, options.phase)


def estimated(job: PreparedTraining, phase: Phase = silent) -> dict[str, Any]:
    """Evaluations, time and memory of a training, by part.

    Classifiers are fitted twice, for a few updates and for more; every learner takes the updates of two batches of
    paths, of which the second is timed; the policy draws paths once. Samples that a training holds, and this did not
    draw, are added to the most memory that was needed.

    Args:
        job: as `prepare` leaves it.
        phase: told of progress.

    Returns:
        Seconds and megabytes by part. Evaluations are of the network, for each sample of an update, as (forward,
        forward and backward); a guided call counts as two.
    """
    config, prior = job.config, job.prior
    panels, fits = {}, 0.0
    for one in job.inputs:
        name = one.name
        panels[name], seconds = (one.panel, 0.0) if one.panel else fitted(one, job, phase)
        fits += seconds
    prior.codec.cpu()  # as a training begins
    run = Run.start(in_miniature(config), prior, panels)
    stages, samples = trained(run, config, phase), evaluations_of_samples(run, config)
    seconds = {
        "classifiers": fits,
        "learners": sum(stage["seconds"] for stage in stages.values()),
        "samples": sum(samples.values()) * seconds_of_evaluation(run, phase),
    }
    return {
        "device": str(prior.denoiser.device),
        "stages": stages,
        "samples": samples,
        "seconds": {**seconds, "total": sum(seconds.values())},
        "memory_mb": {name: size / MEGABYTE for name, size in memory(run, config, job).items()},
    }


def fitted(one: ControlInputs, job: PreparedTraining, phase: Phase) -> tuple[Panel, float]:
    """Classifiers of a control after a few updates, and the seconds that all of their updates will take.

    What does not grow with the updates, a backbone's look at every image and the reader of c, grows with the images.
    """
    control, seconds = job.config.settings_of(one.name), []
    columns = [name for name in (control.name, control.condition) if name]
    data = some(one.data, columns)
    judge_data = one.judge_data and some(one.judge_data, [c for c in columns if c in one.judge_data.labels])
    updates, advance = control.classifier.updates, phase(f"classifiers of {control.name}", 2)
    few = max(1, min(-(-max(len(data), len(judge_data or ())) // BATCH), updates // 4))  # a round, where that is little
    for taken in (few, 3 * few):
        settings = control.classifier.model_copy(update={"updates": taken})
        begin = time.perf_counter()
        panel, _ = fit_panel(
            data, control.name, control.condition, bool(control.ruler), settings, job.config.seed, silent, judge_data,
            encoder_of(job.prior), job.prior.denoiser.device, check=False,
        )  # fmt: skip
        seconds.append(time.perf_counter() - begin)
        advance()
    each = max(0.0, seconds[1] - seconds[0]) / (2 * few)
    return panel, (seconds[0] - few * each) * len(one.data) / len(data) + updates * each


def some(data: LabelledImages, columns: list[str]) -> LabelledImages:
    """As many images as are needed to know what they cost: MANY of each column, evenly over its classes."""
    if len(data) <= MANY * len(columns):
        return data
    rows = []
    for strata in map(data.strata, columns):
        classes = strata.unique()
        most = max(RAREST, -(-MANY // len(classes)))
        rows += [(strata == k).nonzero().squeeze(1)[:most] for k in classes]
    return data[torch.cat(rows).unique()]


def in_miniature(config: Config) -> Config:
    """The same training with the updates of two batches of paths, and a smaller cache."""
    learners: dict[str, dict[str, int]] = {
        "weighted": {"cache": min(64, config.weighted.cache), "renoising": min(2, config.weighted.renoising)}
    }
    for name in config.learners:
        updates = 2 * getattr(getattr(config, name), "reuse", 1)
        learners[name] = {**learners.get(name, {}), "updates": updates}
    return config.with_(**learners, evaluation={"probes": 1})


def trained(run: Run, config: Config, phase: Phase) -> dict[str, dict[str, Any]]:
    """What an update of each stage takes, from the run's few; its controls have learned next to nothing."""
    seconds: dict[str, list[float]] = {}
    with TemporaryDirectory() as scratch:
        begin = time.perf_counter()
        for record in train(run, phase, TrainingState(BestControl(run.policy), Checkpoints(Path(scratch)))):
            if "loss" in record:
                seconds.setdefault(record["stage"], []).append(time.perf_counter() - begin)
            begin = time.perf_counter()
    found, per_sample = {}, evaluations(config)
    for stage, _, settings in stages_of(config):
        taken = seconds[stage]
        updates = settings.updates + found.get(stage, {"updates": 0})["updates"]  # a learner may come twice
        each = mean(taken[len(taken) // 2 :])
        found[stage] = {
            "updates": updates,
            "batch": settings.batch,
            "evaluations": [calls(run.prior) * n for n in per_sample[stage]],
            "seconds_per_update": each,
            "seconds": updates * each,
        }
    return found


def probes_of(config: Config) -> int:
    """Of all stages: at the beginning, on the way, and of the averaged weights; re-noising has the last alone."""
    return sum(
        1 if stage == RENOISING else 2 + (settings.updates - 1) // between_probes(config, settings.updates)
        for stage, _, settings in stages_of(config)
    )


def evaluations_of_samples(run: Run, config: Config) -> dict[str, int]:
    """Of the network, for all samples and paths that are drawn outside the learners, by purpose."""
    conditions, trained, e, steps = run.conditions, run.training_conditions, config.evaluation, config.steps
    chain, compared = steps + 1, 2 * steps + 1  # a read-out ends every path
    certified = [repeats_of(e.paths, conditions) * conditions.pairs]
    for part in map(run.conditions_on, partial_choices(run)):
        certified.append(repeats_of(e.paths // 2, part) * part.pairs)
    swept = sum(1 + (1 if w in (0.0, 1.0) else 2) * steps for w in STRENGTHS) + sum(k + 1 for k in step_counts(run))
    scales = sum(control.scale for control in run.policy.controls.values())
    found = {
        "cache": ("weighted" in config.learners) * config.weighted.cache * conditions.groups * chain,
        "probes": probes_of(config) * -(-PROBE_PATHS // trained.pairs) * trained.pairs * compared,
        "log Z": e.prior_samples * conditions.groups * chain * (2 if config.kl_budget else 1),
        "certificate": sum(certified) * compared + scales * (e.paths // 2) * chain,
        "strengths and step counts": repeats_of(e.sweep_paths, conditions) * conditions.pairs * swept,
    }
    return {name: calls(run.prior) * n for name, n in found.items()}


def seconds_of_evaluation(run: Run, phase: Phase) -> float:
    """Of the network for one sample, while paths of the policy are drawn; a guided call counts as two."""
    n = default_batch(run.policy)
    labels, cond = run.conditions.of(run.conditions.draw(n, stream(run.config.seed, "estimate")))
    advance = phase("paths", 2)
    for _ in range(2):
        begin = time.perf_counter()
        with run.policy.base.full_precision():
            generator = stream(run.config.seed, "estimate")
            paths(run.policy, n, run.times, generator, cond, labels, compare=True)
        seconds = time.perf_counter() - begin
        advance()
    return seconds / (n * calls(run.prior) * (2 * run.config.steps + 1))


def memory(run: Run, config: Config, job: PreparedTraining) -> dict[str, float]:
    """Bytes by part, and all of them: those the process has needed so far, or its accelerator, and samples to come."""
    prior, policy, one_x = run.prior, run.policy, 4 * math.prod(run.policy.shape)
    learned = sum(p.nbytes for p in policy.trainable())
    networks = [prior.denoiser.network, *(panel.classifier for panel in run.panels.values())]
    weights = sum(p.nbytes for network in networks for p in network.parameters()) - learned
    one, two = (kept_bytes(policy, prior, rows) for rows in (1, 2))
    learners = [getattr(config, name) for name in config.learners]
    held, drawn = (
        run.conditions.groups * one_x * (c.evaluation.prior_samples + c.weighted.cache * ("weighted" in c.learners))
        for c in (config, run.config)
    )
    found = {
        "weights": weights + max(0, 2 * one - two),  # those that a control changes are there twice
        "control": COPIES * learned,
        "paths": max(s.kept_states * s.batch for s in learners) * config.steps * one_x,
        "activations": max(s.rows_kept(config.micro_batch) for s in learners) * (two - one),
    }
    device = prior.denoiser.device
    if device.type == "cuda":
        return {**found, "all": torch.cuda.max_memory_allocated(device)}
    images = (data for one in job.inputs for data in (one.data, one.judge_data) if data)
    found |= {"images": sum(data.x.nbytes for data in images if isinstance(data.x, torch.Tensor)), "samples": held}
    whole = most_needed() + held - drawn + run.config.evaluation.prior_samples * run.conditions.groups * one_x
    return {**found, "the rest": max(0, whole - sum(found.values())), "all": whole}


def most_needed() -> int:
    """Bytes this process has had in memory at its largest; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:  # the figure of getrusage may be that of the process which started this one
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_words(found: dict[str, Any]) -> str:
    """What was `estimated`, for a terminal."""
    lines = [f"{'':<14}{'updates':>9}{'batch':>7}{'evaluations a sample':>22}{'an update':>12}{'in all':>12}"]
    for name, stage in found["stages"].items():
        forward, both = stage["evaluations"]
        lines.append(
            f"{name:<14}{stage['updates']:>9}{stage['batch']:>7}{f'{forward} + {both}':>22}"
            f"{duration(stage['seconds_per_update']):>12}{duration(stage['seconds']):>12}"
        )
    lines += ["", "evaluations: forward + forward and backward, of the network", ""]
    lines += [f"{name:<28}{n:>14,} evaluations" for name, n in found["samples"].items()]
    lines += ["", *(f"{name:<28}{duration(seconds):>14}" for name, seconds in found["seconds"].items()), ""]
    lines += [f"{name:<28}{size:>11,.0f} MB" for name, size in found["memory_mb"].items()]
    return "\n".join([*lines, "", f"on {found['device']}; nothing was written"])


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
