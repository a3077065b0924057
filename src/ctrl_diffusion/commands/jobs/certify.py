"""Certify a LoRA of any origin on its base: read everything, refuse what cannot be, measure, write and report."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...chain.noise import stream
from ...chain.paths import paths
from ...control.conditions import MOST_ENUMERATED, Conditions
from ...evaluate.verdict import gap_line
from ...prior.prior import Prior, open_prior, pipeline_folder
from ...prior.text.prompt_file import read_prompt_file
from ...report.certify import Grid, write_certify_report
from ...reward.panel import Panel
from ...run.adapters.aim import Aim, aim_at_rule, aim_at_value
from ...run.adapters.certify import Base, Rival, certify_lora
from ...run.adapters.policy import AdaptedDenoiser
from ...run.adapters.read import read_adapter
from ...run.config import Config
from ...run.defaults import suggested
from ...run.run import Run, configured, times_of
from ...system.files import write_json
from ...system.folders import check_output, clear
from ...system.progress import DEFAULT, JobOptions

FILES = ("grid.png", "steps.png", "prompts.png", "report.html", "certify.json")
ROWS, COLUMNS = 3, 10  # of the grid of samples


@dataclass(frozen=True)
class Request:
    """Hold what is to be certified: a LoRA on a base, its chain and conditions, an aim, and a run to set beside it.

    What is None, or empty, is the run's, else the default of `ctrl train`; all classes if none are named.
    """

    pipeline: str
    lora: Path
    strength: float = 1.0
    prompts: Sequence[str] = ()
    prompt_file: Path | None = None
    classes: Sequence[str] = ()
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    classifier: Path | None = None
    value: str | None = None
    rule: str | None = None
    gamma: float | None = None
    run: Path | None = None
    n: int = 1000
    seed: int = 0

    def check(self) -> None:
        """Refuse (ValueError) options that exclude each other, or ask for nothing."""
        if self.classifier and self.rule:
            raise ValueError("--rule and --classifier are two rewards. Give one of them.")
        if self.gamma is not None and not self.gamma > 0:
            raise ValueError(f"--gamma {self.gamma:g}: must be above 0. 1 asks for the posterior itself.")
        if self.gamma is not None and not (self.classifier or self.rule or self.run):
            raise ValueError("--gamma is the weight of a reward. Name one with --classifier or --rule.")
        if (self.classifier or self.run) and self.value is None:
            raise ValueError("--value is missing. Name the value y that the LoRA is held against.")
        if self.value is not None and not (self.classifier or self.run):
            raise ValueError(f"--value {self.value} is one of a classifier's. Name its folder with --classifier.")
        if self.prompts and self.prompt_file:
            raise ValueError("--prompts is a file of prompts, in place of --prompt. Give one of them.")
        of_run = {"steps": self.steps, "guidance": self.guidance, "size": self.size}
        if self.run and (chosen := [name for name, value in of_run.items() if value is not None]):
            raise ValueError(f"--{chosen[0]} is that of the run, whose certificate is of its chain. Leave it out.")


def certify_job(request: Request, out: Path, options: JobOptions = DEFAULT) -> dict[str, Any]:
    """Certify a LoRA; write certify.json, the pictures and report.html; return the figures."""
    request.check()
    check_output(out, FILES[-1], options.overwrite)
    run = opened_run(request, options) if request.run else None
    chain = chain_of(request)
    prior = run.prior if run else open_prior(request.pipeline, request.size)
    adapter = read_adapter(request.lora, prior.denoiser.network, prior.pipeline)  # before any prompt is encoded
    names, drawn = conditions_of(request, prior, run, options)
    if not run:
        chain = completed(chain, request, prior, names)
        prior = configured(prior, chain, beside=out.absolute().parent)
    classes = None if prior.classes is None else [number_of(prior, name) for name in names]
    aim = aim_of(request, prior, run, classes, options)
    rival = run and Rival(run, int(run.policy.controls[run.name].space.label_of(request.value, run.name)))
    base = Base(prior, run.times if run else times_of(prior, chain, chain.steps),
                conditions_on(prior, classes, aim, drawn), request.n, request.seed)  # fmt: skip
    for note in adapter.notes:
        options.say(f"{request.lora.name}: {note}")
    denoiser = AdaptedDenoiser(prior.denoiser, adapter, request.strength)
    figures = {
        "base": request.pipeline, "lora": {**adapter.metrics(), "strength": request.strength},
        "chain": about_chain(base, run.config if run else chain, prior), "seed": request.seed,
        **certify_lora(base, denoiser, aim, rival, options.phase),
    }  # fmt: skip
    clear(out, FILES)
    write_certify_report(out, figures, grid_of(base, denoiser), options.command or "ctrl certify")
    write_json(out / FILES[-1], figures)  # last: it marks a complete folder
    return figures


def opened_run(request: Request, options: JobOptions) -> Run:
    """Open the run to set beside the LoRA; refuse (ValueError) one of another base, or of several controls."""
    run = Run.load(request.run, trust=options.trust)
    if len(run.names) > 1:
        raise ValueError(
            f"--run {request.run} has the controls {run.name}: only a run of one can be set beside a LoRA."
        )
    theirs, ours = (pipeline_folder(name).resolve() for name in (run.config.prior, request.pipeline))
    if theirs != ours:
        raise ValueError(f"--run {request.run} is of {theirs}, not of {ours}. Name a run on the LoRA's base.")
    return run


def chain_of(request: Request) -> Config:
    """Return the settings of a base's chain, those of `ctrl train` where the request has none; none of a training."""
    values = {"steps": request.steps, "guidance": request.guidance, "size": request.size, "seed": request.seed}
    chosen = {name: value for name, value in values.items() if value is not None}
    return Config.from_values({"prior": request.pipeline, "control": "lora", "data": "-", **chosen}, "options")


def completed(chain: Config, request: Request, prior: Prior, names: Sequence[str]) -> Config:
    """Return the settings of a chain with the prompts, and the steps that `ctrl train` would choose."""
    changes: dict[str, Any] = {"prompts": list(names)} if prior.text else {}
    if request.steps is None:
        shape, groups = prior.denoiser.shape, max(1, len(names))
        changes["steps"] = suggested(shape, 0, prior.denoiser.site.rank, groups, 2)["steps"]
    return chain.with_(**changes)


def conditions_of(request: Request, prior: Prior, run: Run | None, options: JobOptions) -> tuple[list[str], bool]:
    """Return the names of the conditions c to certify, and whether they are drawn from more; refuse a wrong kind."""
    prompted = bool(request.prompts or request.prompt_file)
    if prompted and not prior.text:
        raise ValueError("--prompt: this base is given no text. Leave it out.")
    if request.classes and (prior.text or prior.classes is None):
        raise ValueError(f"--class: this base {'is given text' if prior.text else 'is unconditional'}. Leave it out.")
    names = list(dict.fromkeys(request.prompts or request.classes))
    if request.prompt_file:
        file = read_prompt_file(request.prompt_file)
        options.say(file.about)
        names = file.prompts
    if not names and run:
        return [prior.class_names[c] for c in run.classes or ()], run.conditions.drawn
    if not names and prior.text:
        raise ValueError("this base is given text. Name the prompts: --prompt TEXT, or a file with --prompts.")
    names = names or list(prior.class_names)
    if len(names) <= MOST_ENUMERATED:
        return names, False
    order = torch.randperm(len(names), generator=stream(request.seed, "conditions"))[:MOST_ENUMERATED]
    options.say(f"measured on {MOST_ENUMERATED} of {len(names)}, drawn by the seed")
    return [names[i] for i in order.sort().values], True


def number_of(prior: Prior, name: str) -> int:
    """Return the number of a class, or of a prompt; refuse (ValueError) one that the prior does not have."""
    try:
        return prior.number_of(name)
    except ValueError as error:
        raise ValueError(f"--class {error}") from error


def aim_of(
    request: Request, prior: Prior, run: Run | None, classes: list[int] | None, options: JobOptions
) -> Aim | None:
    """Return what the LoRA is held against: a rule, a classifier's value, or a run's; None for nothing."""
    gamma = request.gamma or (run.config.gamma if run else 1.0)
    if request.rule:
        return aim_at_rule(request.rule, gamma, prior.image_shape)
    if request.classifier:
        panel = Panel.load(request.classifier, options.trust).to(prior.denoiser.device)
    elif run:
        panel = run.panels[run.name]
    else:
        return None
    return aim_at_value(panel, request.value, gamma, prior, classes)


def conditions_on(prior: Prior, classes: list[int] | None, aim: Aim | None, drawn: bool) -> Conditions:
    """Return the conditions c with the one label that a LoRA has."""
    name, value = (aim.name, aim.value) if aim else ("lora", "on")
    cond = {} if classes is None else {"c": torch.tensor(classes)}
    names = {name: (value,), **({"c": [prior.class_names[c] for c in classes]} if cond else {})}
    return Conditions(cond, {name: 1}, names=names, drawn=drawn)


def about_chain(base: Base, config: Config, prior: Prior) -> dict[str, Any]:
    """Return what the chain is, by the names certify.json uses."""
    sigmas = [float(prior.denoiser.schedule(t)[1]) for t in (base.times[0], base.times[-1])]
    call = prior.denoiser.call
    return {
        "steps": len(base.times) - 1, "sigma_first": sigmas[0], "sigma_last": sigmas[1],
        "guidance": getattr(call, "guidance", None) if prior.text else None, "image": list(prior.image_shape),
        "conditions": base.conditions.groups if base.conditions.cond else 0, "drawn": base.conditions.drawn,
        "focus": config.grid_focus,
    }  # fmt: skip


@torch.no_grad()
def grid_of(base: Base, denoiser: AdaptedDenoiser) -> Grid:
    """Draw samples of the base and of the LoRA from the same noise: a column for each of some conditions."""
    groups, prior = base.conditions.groups, base.prior
    columns = min(COLUMNS, groups) if base.conditions.cond else COLUMNS
    group = (torch.arange(columns) % groups).repeat(ROWS)
    cond, names = base.conditions.cond_of(group), [""] * columns
    if base.conditions.cond:
        names = [base.conditions.names["c"][g] for g in range(columns)]
    images = []
    for each in (prior.denoiser, denoiser):
        x_0 = paths(each, len(group), base.times, stream(base.seed, "grid"), cond).x_0
        parts = x_0.split(prior.codec.batch)
        images.append(torch.cat([prior.decode(part.to(prior.denoiser.device)).cpu() for part in parts]))
    return Grid(*images, ROWS, names)


def in_words(figures: dict[str, Any]) -> str:
    """Return the closing words: how far, how near to the exact conditional, and what a run of ours has at that KL."""
    kl = f"{figures['kl_nats']:.3g} ± {figures['kl_stderr']:.2g} nats"
    most = max(figures["kl_per_prompt"], key=lambda row: row["kl_nats"], default=None)
    several = len(figures["kl_per_prompt"]) > 1 and figures["kl_nats"] > 0
    where = f", most for {most['name']} ({most['kl_nats']:.3g})" if several else ""
    lines = [f"KL from the base: {kl} a sample{where}."]
    if aim := figures.get("aim"):
        best = figures["best_score"]
        bound = "" if best is None else f", at most {best:.3g} at this KL"
        score = f"its mean is {figures['score']:.3g} ± {figures['score_stderr']:.2g}"
        score += f" (base {figures['prior_score']:.3g}{bound})"
        goal = f"rating {aim['name']}" if aim["kind"] == "rule" else f"log p̂ of {aim['name']} = {aim['value']}"
        lines.append(f"From the base tilted by the {goal}: {gap_line(figures['certificate'])}; {score}.")
    if run := figures.get("run"):
        row = run["rows"][0]
        same = "" if run["same_kl"] else ", the most that was tried"
        lines.append(
            f"The run at {row['kl_nats']:.3g} nats (strength {row['strength']:.3g}{same}): "
            f"{gap_line(row['certificate'])}; mean {row['score']:.3g}."
        )
    return re.sub(r"(?<!\w)-(?=\d)", "−", "\n".join(lines))  # not the hyphens of names
