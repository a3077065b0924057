"""Measure a run as another program samples it: on its grid, with the weights scaled by its strength.

A program's strength s scales weights and biases, W + s BA; ours, w, mixes outputs. They agree at 0 and 1 only.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ...chain.noise import normal, stream
from ...chain.paths import default_batch
from ...chain.rollout import Times, read_out, rollout
from ...chain.rows import parts, rows_of
from ...evaluate.scores import score_samples
from ...system.progress import Phase, silent
from ..measure import evaluate, repeats_of
from ..run import Run
from .chains import GridSchedule, Model, grid_of, scheduler_settings
from .files import adapted_layers
from .table import PROGRAMS


@dataclass
class ProgramRun(Run):
    """Hold a run whose chain is another program's."""

    grid: GridSchedule | None = None

    @property
    def times(self) -> Times:
        """The time grid of the program's chain."""
        return self.grid.grid


@dataclass(frozen=True)
class ProgramChain:
    """Describe the chain of a program: whose, which sampler, how many evaluations, at which strength."""

    program: str
    sampler: str = "euler_a"
    steps: int = 28  # evaluations of the network
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"--strength {self.strength}: must be a number. Use 1 for as trained.")

    def of(self, run: Run) -> ProgramRun:
        """Return the run on this chain; its policy and prior are changed in place."""
        if self.program not in PROGRAMS:
            raise ValueError(f"--as {self.program}: must be one of {', '.join(PROGRAMS)}.")
        base, program = run.prior.pipeline, PROGRAMS[self.program]
        if not (reason := program.reason(base)):  # else there may be no LoRA to ask for its layers
            reason = program.reason(base, adapted_layers(run.policy.controls.values(), run.config.gamma))
        if reason:
            raise ValueError(f"--as {self.program}: {reason}.")
        denoiser = run.prior.denoiser
        model = Model(denoiser.schedule, scheduler_settings(run.config.prior), denoiser.clip is not None)
        grid = grid_of(self.program, self.sampler, self.steps, model)
        for control in run.policy.controls.values():
            control.scale_as_lora(self.strength)
        denoiser.schedule = run.policy.schedule = grid
        config = run.config.with_(gammas=None)  # a file is of one γ
        return ProgramRun(config, run.prior, run.policy, run.panels, run.prior_outside, grid)


def evaluate_as(run: ProgramRun, chain: ProgramChain, n: int, phase: Phase = silent) -> dict[str, Any]:
    """Measure a run on a program's chain; return the figures by the names metrics.json uses.

    The certificate is of the chain up to its last state, read out by the prior. A control with an interval is measured
    again without it, as a program that applies a file at every step runs it ("every_step").
    """
    first = float(run.grid.table[1, 0])
    about = {
        "program": chain.program, "sampler": chain.sampler, "steps": chain.steps, "strength": chain.strength,
        "sigma_first": first, "sigma_last": float(run.grid.table[1, -1]),
    }  # fmt: skip
    figures = {"as": about, **figures_of(run, n, phase)}
    controls = run.policy.controls.values()
    if any(control.interval for control in controls):
        for control in controls:
            control.interval = None
        figures["every_step"] = figures_of(run, n, phase)
    return figures


def figures_of(run: ProgramRun, n: int, phase: Phase) -> dict[str, Any]:
    """Return the figures of a run's evaluation, and of its last step as the program takes it."""
    return {**evaluate(run, n, phase).metrics(), "own_last_step": own_last_step(run, n, phase)}


@torch.no_grad()
def own_last_step(run: ProgramRun, n: int, phase: Phase = silent) -> dict[str, float]:
    """Measure what the program's last step, with the control and without noise, does that the prior's does not.

    Return the root mean square of the difference of x_0, and the accuracy with it, on the paths of the certificate.
    """
    pair = run.conditions.all(repeats_of(n, run.conditions))
    labels, cond = run.conditions.of(pair)
    generator, advance = stream(run.config.seed, "paths to certify"), phase("the program's last step", len(pair))
    policy, times, squares, samples = run.policy, run.times, 0.0, []
    for rows in parts(len(pair), default_batch(policy)):
        shape = (rows.stop - rows.start, *policy.shape)
        noise = [normal(shape, policy, generator) for _ in times]
        control, row_cond = {"labels": rows_of(labels, rows)}, rows_of(cond, rows)
        with policy.base.full_precision(), policy.frozen():
            end = rollout(policy, noise[0], times, read=False, cond=row_cond, noise=noise[1:], **control).x[-1]
            x_0 = policy(end, times[-1], **control, **row_cond)
            squares += float((x_0 - read_out(policy, end, times[-1], **row_cond)).square().sum())
        samples.append(x_0.cpu())
        advance(shape[0])
    x_0 = torch.cat(samples)
    score = score_samples(run.second_opinion.measure(x_0, run.conditions), run.conditions)
    return {"rms": (squares / x_0.numel()) ** 0.5, "accuracy": score.accuracy}
