"""Estimate what a training takes: run its code for a few updates, and count the samples drawn beside them."""

import math
import time
import warnings
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
from ...run.measure import (
    STRENGTHS,
    measures_intervals,
    partial_choices,
    profile_paths,
    repeats_of,
    step_counts,
)
from ...run.prepare import ControlInputs, PreparedTraining, encoder_of, prepare
from ...run.run import Run
from ...run.stages import ADDED, between_probes, budgeted, probe_paths, stages_of, train
from ...run.state import BestControl, TrainingState
from ...system import ranks
from ...system.checkpoint import Checkpoints
from ...system.machine import most_needed
from ...system.progress import DEFAULT, JobOptions, Phase, silent
from .inspect import MEGABYTE, calls, evaluations, measure_kept

MANY = 2000  # labelled images
# copies of the trained weights: themselves, gradient, average, two moments; three kept controls; four in a saved state
COPIES = 12


def estimate_job(values: dict[str, Any], options: JobOptions = DEFAULT) -> dict[str, Any]:
    """Estimate what `train_job` would take with the same settings and options; write nothing."""
    if ranks.world_size() > 1:
        raise ValueError("--dry-run: one process measures what one takes. Start it without a launcher.")
    with TemporaryDirectory() as scratch:  # for prompts that are encoded on the way
        job = prepare(values, options, beside=Path(scratch))
        return estimate(replace(job, config=quick(job.config)) if options.quick else job, options.phase)


def estimate(job: PreparedTraining, phase: Phase = silent) -> dict[str, Any]:
    """Estimate evaluations, seconds and megabytes of a training, by part.

    Classifiers are fitted twice, for a few updates and for more; every learner takes the updates of two batches of
    paths, of which the second is timed; the policy draws paths once. Evaluations are of the network, for each sample of
    an update, as (forward, forward and backward); a guided call counts as two.
    """
    config, prior, panels, fits = job.config, job.prior, {}, 0.0
    for inputs in job.inputs:
        panels[inputs.name], seconds = (inputs.panel, 0.0) if inputs.panel else time_classifiers(inputs, job, phase)
        fits += seconds
    prior.codec.cpu()  # as when a training begins
    run = Run.start(shortened(config), prior, panels)
    config = budgeted(run, config)
    stages, samples = time_stages(run, config, phase), evaluations_of_samples(run, config)
    seconds = {
        "classifiers": fits, "learners": sum(stage["seconds"] for stage in stages.values()),
        "samples": sum(samples.values()) * seconds_of_evaluation(run, phase),
    }  # fmt: skip
    encoding = encoding_of(run, config)
    seconds |= {"encoding": encoding["seconds"]} if encoding else {}
    return {
        "device": str(prior.denoiser.device), "at_most": config.follows_probes, "stages": stages, "samples": samples,
        "seconds": {**seconds, "total": sum(seconds.values())},
        "memory_mb": {name: size / MEGABYTE for name, size in memory(run, config, job).items()}, "encoding": encoding,
    }  # fmt: skip


def encoding_of(run: Run, config: Config) -> dict[str, Any] | None:
    """Estimate how many prompts of a population are drawn, and so encoded, at most, in what time and room, once."""
    if not (run.prior.text and run.split.pooled):
        return None
    cached = run.training_conditions.rows(sum(getattr(config, name).drawn for name in config.learners))
    settings = [stage.settings for stage in stages_of(config)]
    drawn = cached + sum(s.updates * s.batch // getattr(s, "reuse", 1) for s in settings if not s.drawn)
    prompts = min(len(run.split.trained), drawn + len(run.split.measured)) + len(run.split.measured_held_out)
    if any(panel.classifier.embedding for panel in run.panels.values()):  # which is given those of the labelled images
        prompts = run.prior.classes
    begin = time.perf_counter()
    run.prior.denoiser.call.encode_alone(run.prior.class_names[0])
    seconds = prompts * (time.perf_counter() - begin)
    return {
        "prompts": prompts, "of_prompts": run.prior.classes, "seconds": seconds,
        "megabytes": prompts * run.prior.prompt_storage.bytes_each / MEGABYTE,
    }  # fmt: skip


def time_classifiers(inputs: ControlInputs, job: PreparedTraining, phase: Phase) -> tuple[Panel, float]:
    """Fit a control's classifiers for a few updates; return them, and the seconds that all updates will take.

    The time of a backbone's features and of the reader of c grows with the images, not with the updates.
    """
    control, seconds = job.config.settings_of(inputs.name), []
    read = inputs.unread is None
    columns = [control.name, *([control.condition] if control.condition and read else [])]
    data, judge_data = few_images(inputs.data, columns), inputs.judge_data
    judge_data = judge_data and few_images(judge_data, [c for c in columns if c in judge_data.labels])
    updates, advance = control.classifier.updates, phase(f"classifiers of {control.name}", 2)
    few = max(1, min(-(-max(len(data), len(judge_data or ())) // BATCH), updates // 4))  # an epoch, unless that is long
    for count in (few, 3 * few):
        settings = control.classifier.model_copy(update={"updates": count})
        begin = time.perf_counter()
        panel, _ = fit_panel(
            data, control.name, control.condition, bool(control.ruler), settings, job.config.seed, silent, judge_data,
            encoder_of(job.prior), job.prior.denoiser.device, check=False, read=read,
        )  # fmt: skip
        seconds.append(time.perf_counter() - begin)
        advance()
    each = max(0.0, seconds[1] - seconds[0]) / (2 * few)
    return panel, (seconds[0] - few * each) * len(inputs.data) / len(data) + updates * each


def few_images(data: LabelledImages, columns: list[str]) -> LabelledImages:
    """Return MANY images for each column, evenly over its classes: enough to measure what they cost."""
    if len(data) <= MANY * len(columns):
        return data
    rows = []
    for strata in map(data.strata, columns):
        classes = strata.unique()
        most = max(RAREST, -(-MANY // len(classes)))
        rows += [(strata == k).nonzero().squeeze(1)[:most] for k in classes]
    return data[torch.cat(rows).unique()]


def shortened(config: Config) -> Config:
    """Return the config with the updates of two batches of paths, and a smaller cache."""
    learners = {name: {"updates": 2 * getattr(getattr(config, name), "reuse", 1)} for name in config.learners}
    for name in ("contrast", "weighted"):
        learners[name] = {"cache": min(64, getattr(config, name).cache), **learners.get(name, {})}
    learners["weighted"]["renoising"] = min(2, config.weighted.renoising)
    return config.with_(
        **learners,
        more=[2] * len(config.more),
        evaluation={"probes": 1},
    )


def time_stages(run: Run, config: Config, phase: Phase) -> dict[str, dict[str, Any]]:
    """Train a shortened run; return what an update of each stage takes, and all of those of `config`."""
    seconds: dict[str, list[float]] = {}
    with TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(contrast|weighted) learns from a handful")  # the cache is shortened here
        begin = time.perf_counter()
        for record in train(run, phase, TrainingState(BestControl(run.policy), Checkpoints(Path(scratch)))):
            if "loss" in record:
                seconds.setdefault(record["stage"], []).append(time.perf_counter() - begin)
            begin = time.perf_counter()
    estimates, per_sample = {}, evaluations(config)
    for stage, _, settings in stages_of(config):
        updates = settings.updates + estimates.get(stage, {"updates": 0})["updates"]  # a learner may come twice
        each = mean(seconds[stage][len(seconds[stage]) // 2 :])
        estimates[stage] = {
            "updates": updates, "batch": settings.batch, "seconds_per_update": each, "seconds": updates * each,
            "evaluations": [calls(run.prior) * n for n in per_sample[stage.partition(ADDED)[0]]],
        }  # fmt: skip
    return estimates


def probes_of(run: Run, config: Config) -> int:
    """Count the probes of all stages: first, between updates, of the averaged weights; re-noising has only the last."""
    return sum(
        1 if stage.name == RENOISING else 2 + (stage.settings.updates - 1) // between_probes(run, config, stage)
        for stage in stages_of(config)
    )


def evaluations_of_samples(run: Run, config: Config) -> dict[str, int]:
    """Count the network's evaluations for all samples and paths drawn outside the learners, by purpose."""
    conditions, e, steps = run.conditions, config.evaluation, config.steps
    chain, compared = steps + 1, 2 * steps + 1  # a read-out ends every path
    certified = repeats_of(e.paths, conditions) * conditions.pairs
    halves = [*map(run.conditions_on, partial_choices(run)), *[conditions] * len(config.trained_gammas[1:])]
    certified += sum(repeats_of(e.paths // 2, c) * c.pairs for c in halves)
    held_out = run.held_out_conditions
    unseen = held_out.groups if held_out else 0
    certified += repeats_of(e.paths, held_out) * held_out.pairs if held_out else 0
    swept = sum(1 + (1 if w in (0.0, 1.0) else 2) * steps for w in STRENGTHS) + sum(k + 1 for k in step_counts(run))
    fixed = any(control.fixed for control in run.policy.controls.values())
    untrained = repeats_of(e.paths, conditions) * conditions.pairs * (compared if fixed else chain)
    scales = sum(control.scale for control in run.policy.controls.values())
    drawn = [getattr(config, name).drawn for name in config.learners]
    counts = {
        "cache": run.training_conditions.rows(sum(drawn)) * chain,
        "where y is decided": profile_paths(run) * chain if measures_intervals(config) else 0,
        "probes": probes_of(run, config) * probe_paths(run) * compared,
        "log Z": e.prior_samples * (conditions.groups * (2 if config.kl_budget else 1) + unseen) * chain,
        "certificate": certified * compared + untrained + scales * (e.paths // 2) * chain,
        "strengths and step counts": repeats_of(e.sweep_paths, conditions) * conditions.pairs * swept,
    }
    return {name: calls(run.prior) * n for name, n in counts.items()}


def seconds_of_evaluation(run: Run, phase: Phase) -> float:
    """Time an evaluation of the network for one sample while paths are drawn; a guided call counts as two."""
    n, seed, advance = default_batch(run.policy), run.config.seed, phase("paths", 2)
    labels, cond = run.conditions.of(run.conditions.draw(n, stream(seed, "estimate")))
    for _ in range(2):
        begin = time.perf_counter()
        with run.policy.base.full_precision():
            paths(run.policy, n, run.times, stream(seed, "estimate"), cond, labels, compare=True)
        seconds = time.perf_counter() - begin
        advance()
    return seconds / (n * calls(run.prior) * (2 * run.config.steps + 1))


def memory(run: Run, config: Config, job: PreparedTraining) -> dict[str, float]:
    """Estimate bytes by part and in all: the peak so far of the process, or of its accelerator, and samples to come."""
    prior, policy, one_x = run.prior, run.policy, 4 * math.prod(run.policy.shape)
    learned = sum(p.nbytes for p in policy.trainable())
    networks = [prior.denoiser.network, *(panel.classifier for panel in run.panels.values())]
    weights = sum(p.nbytes for network in networks for p in network.parameters()) - learned
    kept = measure_kept(policy, prior)
    learners = [getattr(config, name) for name in config.learners]
    groups, rows = run.conditions.groups, run.training_conditions.rows
    held, drawn = (
        one_x * (groups * c.evaluation.prior_samples + rows(cached_numbers(c))) for c in (config, run.config)
    )
    sizes = {
        "weights": weights + kept.weights,
        "control": COPIES * learned,
        "paths": max(s.kept_states * s.batch for s in learners) * config.steps * one_x,
        "activations": max(s.rows_kept(config.micro_batch) for s in learners) * kept.row,
    }
    device = prior.denoiser.device
    if device.type == "cuda":
        return {**sizes, "all": torch.cuda.max_memory_allocated(device)}
    images = (data for inputs in job.inputs for data in (inputs.data, inputs.judge_data) if data)
    sizes |= {"images": sum(data.x.nbytes for data in images if isinstance(data.x, torch.Tensor)), "samples": held}
    total = most_needed() + held - drawn + run.config.evaluation.prior_samples * run.conditions.groups * one_x
    return {**sizes, "the rest": max(0, total - sum(sizes.values())), "all": total}


def cached_numbers(config: Config) -> int:
    """Count the tensors like x_0 that a learner keeps of the prior's samples for each condition, at most."""
    return max(getattr(config, name).numbers_kept(config.steps) for name in config.learners)


def in_words(estimates: dict[str, Any]) -> str:
    """Format the result of `estimate` for a terminal."""
    whole = "at most" if estimates["at_most"] else "in all"  # a learner that follows its probes may need less
    lines = [f"{'':<14}{'updates':>9}{'batch':>7}{'evaluations a sample':>22}{'an update':>12}{whole:>12}"]
    for name, stage in estimates["stages"].items():
        forward, both = stage["evaluations"]
        lines.append(
            f"{name:<14}{stage['updates']:>9}{stage['batch']:>7}{f'{forward} + {both}':>22}"
            f"{duration(stage['seconds_per_update']):>12}{duration(stage['seconds']):>12}"
        )
    lines += ["", "evaluations: forward + forward and backward, of the network", ""]
    lines += [f"{name:<28}{n:>14,} evaluations" for name, n in estimates["samples"].items()]
    seconds = {f"{name}, at most" if estimates["at_most"] and name in ("learners", "total") else name: duration(value)
               for name, value in estimates["seconds"].items()}  # fmt: skip
    lines += ["", *(f"{name:<28}{value:>14}" for name, value in seconds.items()), ""]
    lines += [f"{name:<28}{size:>11,.0f} MB" for name, size in estimates["memory_mb"].items()]
    if encoding := estimates["encoding"]:
        count = f"{encoding['prompts']:,} of {encoding['of_prompts']:,} prompts, at most"
        lines += ["", f"encoding {count}: {encoding['megabytes']:,.3g} MB in files beside the run, once"]
    return "\n".join([*lines, "", f"on {estimates['device']}; nothing was written"])


def duration(seconds: float) -> str:
    """Format seconds with a unit that suits them."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
