"""Open or begin a run: a prior with trained controls, and the classifiers they were trained on."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from tempfile import gettempdir
from typing import Any, cast

import torch
from torch import Tensor

from ..chain.noise import Generators, stream
from ..chain.paths import paths
from ..chain.rollout import Times
from ..control.conditions import MOST_ENUMERATED, Conditions, ConditionSplit
from ..control.control import Control
from ..control.kinds import load_control
from ..control.lora import LoRAControl
from ..control.policy import Policy
from ..data.labels import Labels
from ..evaluate.judge import Labeller, SecondOpinion
from ..evaluate.resample import exact_samples
from ..evaluate.rulers.table import RULERS
from ..prior.prior import Prior, open_prior
from ..prior.sharding import shard
from ..prior.text.prompt_file import read_prompt_file
from ..reward.panel import Panel
from ..reward.reward import Among, Conditioned, Embedded, Reward
from ..reward.scorer import Scorer
from ..system import ranks
from ..system.progress import Phase, silent
from .config import Config, ControlSettings
from .folder import RunFolder

INK = Path(__file__).parent / "ink"  # the run that ships with the package: ink on the embedded digits
EMBEDDED_RUN = "ink"  # its name, where no folder has it
PROBE_PATHS = 160  # of all (c, y) together, at least


def configured(prior: Prior, config: Config, prompts: list[str] | None = None, beside: Path | None = None) -> Prior:
    """Return the prior with the prompts, the device and the precision of a config; unconditional if that says so.

    Prompts are read from the config's file if it names one and none are given. More than 64 are encoded when they are
    drawn, into a folder in `beside`, by default beside the run whose file it is, or where temporary files are.
    """
    if config.prompts is not None:
        if not isinstance(config.prompts, str):
            prompts = config.prompts
        elif prompts is None:
            path = Path(config.prompts)
            beside, prompts = beside or path.absolute().parent.parent, read_prompt_file(path).prompts
        cache = None if len(prompts) <= MOST_ENUMERATED else folder_of_prompts(beside)
        prior = prior.with_prompts(prompts, config.guidance, config.negative_prompt, cache)
    elif config.guidance is not None or config.negative_prompt:
        raise ValueError("guidance and negative_prompt: this prior is given no text. Leave them out.")
    prior = prior.unconditional() if config.unconditional else prior
    unseeing = next((control.name for control in config.controls if not control.sees_condition), None)
    if unseeing and (prior.classes is None or prior.denoiser.null_call is None):
        why = "is given no condition" if prior.classes is None else "has no class or prompt for none"
        raise ValueError(f"sees_condition: false, of {unseeing!r}: this prior {why}. Leave it out.")
    ranks.state()  # gives each of several processes its own accelerator, which "auto" then means
    if ranks.sharded():
        shard(prior.denoiser, config.device)
    return prior.placed(config.device, config.mixed_precision, config.vae_tiling)


def find_run(folder: str | Path) -> Path:
    """Return the embedded run's folder for its name, unless there is a folder of that name; else the folder itself."""
    return INK if str(folder) == EMBEDDED_RUN and not Path(folder).exists() else Path(folder)


def times_of(prior: Prior, config: Config, steps: int) -> Times:
    """Return the time grid of a number of steps; raise ValueError if the prior's schedule has fewer."""
    return prior.denoiser.times(steps, config.sigma_end, config.time_power, config.grid_focus)


def fits(prior: Prior, config: Config, steps: int) -> bool:
    """Return whether the prior's schedule has a chain of so many steps."""
    try:
        times_of(prior, config, steps)
    except ValueError:
        return False
    return True


def folder_of_prompts(beside: Path | None) -> Path:
    """Return the folder that encoded prompts are kept in: `beside`, or where temporary files are, with a warning."""
    if beside and os.access(beside, os.W_OK):
        return beside
    if beside:
        warnings.warn(f"{beside} cannot be written to: prompts are encoded into {gettempdir()}.", stacklevel=3)
    return Path(gettempdir())


@dataclass
class Run:
    """Hold a prior, the policy of the controls on it, and the classifiers of each control: p̂ with judge and reader."""

    config: Config
    prior: Prior
    policy: Policy
    panels: dict[str, Panel]
    prior_outside: float | None = None  # the share of the prior's samples outside p̂'s region, if it was measured

    def __post_init__(self) -> None:
        self.policy.gamma = self.config.gamma
        self.known_classes  # noqa: B018 — sampling may add prompts to the prior, which are none of "all"
        for panel in self.panels.values():
            panel.to(self.prior.denoiser.device)

    @property
    def names(self) -> list[str]:
        """The names of the controls, in order."""
        return self.config.names

    @property
    def name(self) -> str:
        """The name of the control, or of all, separated by commas."""
        return ", ".join(self.names)

    @property
    def values(self) -> tuple[str, ...]:
        """The names of the labels, in the order of `conditions`: the classes of the control, or all combinations."""
        return tuple(" · ".join(names) for names in product(*(self.policy.controls[n].values for n in self.names)))

    @property
    def reward(self) -> Reward:
        """γ Σ log p̂."""
        return self.reward_at(self.config.gamma)

    def reward_at(self, gamma: float) -> Reward:
        """Return the reward at another γ."""
        classifiers = {name: self.conditioned(panel.classifier) for name, panel in self.panels.items()}
        return Reward(classifiers, gamma, self.prior.codec, self.prior.denoiser.device)

    def conditioned(self, likelihood: Scorer) -> Scorer | Conditioned:
        """Return p̂ of the prior's c: it counts c among the classes it was fitted on, or is given its embedding."""
        if getattr(likelihood, "embedding", 0):  # one that is brought along may know of none
            return Embedded(likelihood, self.prior.embedding_of)
        return Among(likelihood, self.known_classes or ()) if likelihood.conditional else likelihood

    def images(self, x: Tensor) -> Tensor:
        """Decode samples x (n, *) of a latent model: (n, C, H, W) on the CPU; other samples are images already."""
        codec, device = self.prior.codec, self.prior.denoiser.device
        return torch.cat([codec.decode(part.to(device)).cpu() for part in x.split(codec.batch)])

    @property
    def second_opinion(self) -> SecondOpinion:
        """The measures of y and c: a ruler where a control has one, else its judge; the reader of c; all judges."""
        return SecondOpinion(
            {control.name: self.ruler_of(control) for control in self.config.controls if control.ruler},
            next((panel.reader for panel in self.panels.values() if panel.reader), None),
            {name: judge for name, panel in self.panels.items() if (judge := self.judge_of(panel))},
            self.is_outside if all(panel.support for panel in self.panels.values()) else None,
            self.prior.codec,
            self.prior.denoiser.device,
            self.known_classes,
        )

    def judge_of(self, panel: Panel) -> Scorer | Conditioned | None:
        """Return the judge of a control, if it has one; it takes the prior's c where it is given an embedding."""
        judge = panel.judge
        embedded = bool(getattr(judge, "embedding", 0))
        return self.conditioned(judge) if judge and embedded else judge

    def ruler_of(self, settings: ControlSettings) -> Labeller:
        """Return the ruler of a control's classes; on a scale it finds the nearest level, NULL where there is no y."""
        assert settings.ruler is not None
        space, ruler = self.policy.controls[settings.name].space, RULERS[settings.ruler]
        if (label := ruler.label) and not space.scale:
            return lambda x, c: label(x, ruler.translated(c, self.prior.class_names))
        return lambda x, c: space.nearest(self.measure_scale(settings, x, c))

    def measure_scale(self, settings: ControlSettings, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Measure where images x (n, C, H, W), of conditions c (n,), lie on a control's scale (n,).

        By its ruler, NaN where there is nothing to measure, else by its judge; each may depend on c.
        """
        panel = self.panels[settings.name]
        if settings.ruler:
            ruler = RULERS[settings.ruler]
            assert ruler.number is not None  # or `prepare` refuses it
            return panel.space.places(ruler.number(x, ruler.translated(c, self.prior.class_names)))
        judge = panel.judge
        assert judge is not None  # what no ruler measures has one
        view = self.conditioned(judge)
        condition = view.translated(c) if isinstance(view, Conditioned) and c is not None else None
        density = judge.head.density(judge.scores(x.to(self.prior.denoiser.device), condition), judge.temperature)
        assert density is not None  # of y on a scale
        return density.mean.cpu()

    def is_outside(self, x_0: Tensor, images: Tensor) -> Tensor:
        """Return whether each sample (n, *), with its image, lies outside the region some p̂ was fitted on: (n,)."""
        outside = [panel.outside(x_0 if panel.latent else images) for panel in self.panels.values()]
        return torch.stack(outside).any(0)

    @property
    def real_outside(self) -> float:
        """The share of images like the labelled ones that is outside, at most: what the borders of all p̂ leave."""
        return min(1.0, sum(float(panel.support.beyond) for panel in self.panels.values() if panel.support))

    @property
    def accuracy_by(self) -> str:
        """The name of what measures y: "ruler" if every control has one that is no judge, else "judge"."""
        by = {RULERS[control.ruler].by if control.ruler else "judge" for control in self.config.controls}
        return "judge" if "judge" in by else "ruler"

    @cached_property
    def known_classes(self) -> Sequence[int] | None:
        """The prior's classes that are trained on or held out, as p̂(y | x, c) and the reader of c number them."""
        return range(self.prior.classes or 0) if self.config.classes == "all" else self.config.classes

    @cached_property
    def split(self) -> ConditionSplit | None:
        """Which of the prior's conditions c are trained on and which are not; None of an unconditional prior."""
        hold_out, known = self.config.hold_out, self.known_classes
        if known is None:
            return None
        if hold_out is None:  # enumerated, also more than a few in a run that was made before populations
            every = list(known)
            return ConditionSplit(every, [], False, every, [])
        assert not isinstance(hold_out, int)  # `prepare` writes which, in place of how many
        return ConditionSplit.of(known, hold_out, self.config.seed)

    @property
    def classes(self) -> list[int] | None:
        """The conditions c that figures and pictures are of: those trained on, or of a population a sample of these."""
        return self.split.measured if self.split else None

    @property
    def conditions(self) -> Conditions:
        """All pairs (c, y) with a label for every control, of the conditions that figures are of."""
        return self.conditions_on(self.names)

    @property
    def held_out_conditions(self) -> Conditions | None:
        """All pairs (c, y) of conditions that were kept out of training, or of a sample of these; None if none was."""
        if not (self.split and self.split.held_out):
            return None
        return self.conditions_on(self.names, self.split.measured_held_out)

    @property
    def training_conditions(self) -> Conditions:
        """All pairs (c, y) to train on: labels may be null, but where a control is being added not those of the new.

        A control that does not see c is trained on the null class too: in a population on half of the samples.
        """
        fixed = [name for name in self.names if self.policy.controls[name].fixed]
        trained, pooled = (self.split.trained, self.split.pooled) if self.split else (None, False)
        needs_c = self.policy.sees_condition or any(panel.classifier.conditional for panel in self.panels.values())
        null = [] if needs_c or not trained or self.prior.null is None else [self.prior.null]
        conditions = self.conditions_on(self.names, trained and [*trained, *null])
        arguments = conditions.cond, conditions.controls, fixed, self.config.trained_gammas, conditions.names
        weight_of = dict(zip(self.known_classes or (), self.config.weights or (), strict=False))
        weights = [weight_of.get(c, 1.0) for c in trained or ()] if weight_of or (null and pooled) else []
        return Conditions.for_training(*arguments, pooled, weights and [*weights, *[sum(weights)] * len(null)])

    @property
    def probe_conditions(self) -> Conditions:
        """All pairs (c, y) that probes are of: those trained on, or of a population few conditions with every y."""
        conditions = self.training_conditions
        if not conditions.pooled:
            return conditions
        few = -(-PROBE_PATHS // conditions.classes)
        return conditions.sample(few, stream(self.config.seed, "conditions to probe"))

    def conditions_on(self, names: Sequence[str], classes: list[int] | None = None) -> Conditions:
        """Return all pairs (c, y) with labels for some of the controls, of the prior's `classes`, or `self.classes`."""
        classes, class_names = self.classes if classes is None else classes, self.prior.class_names
        cond = {} if classes is None else {"c": torch.tensor(classes)}
        controls = {name: self.policy.controls[name] for name in names}
        named = ["none" if c == self.prior.null else class_names[c] for c in classes or ()]
        value_names: dict[str, Sequence[str]] = {"c": named} if cond else {}
        value_names |= {name: control.values for name, control in controls.items()}
        sizes = {name: control.size for name, control in controls.items()}
        drawn = bool(self.split and self.split.pooled)
        return Conditions(cond, sizes, names=value_names, drawn=drawn)

    @property
    def times(self) -> Times:
        """The time grid of the training chain, the only chain the certificate holds for."""
        return self.times_of(self.config.steps)

    def times_of(self, steps: int) -> Times:
        """Return the time grid of a number of steps."""
        return times_of(self.prior, self.config, steps)

    @classmethod
    def start(cls, config: Config, prior: Prior, panels: dict[str, Panel]) -> "Run":
        """Begin a run: its controls are untrained, except those that were trained in another run and stay fixed."""
        controls: list[Control] = []
        gammas = config.trained_gammas
        lora = {"rank": config.rank, "alpha": config.lora_alpha, "targets": config.lora_targets}
        for i, control in enumerate(config.controls):
            name = control.name
            if control.settled_from:
                folder = RunFolder(control.settled_from).control(name)
                if not folder.is_dir():
                    raise ValueError(f"{name} is taken from {folder}, which is not there. Bring that run back.")
                controls.append(load_control(folder, prior.denoiser).fix())
            else:
                interval = None if isinstance(control.interval, str) else control.interval
                settings: dict[str, Any] = {
                    "seed": config.seed + i,
                    "scale": panels[name].space.scale,
                    "interval": interval,
                    "sees_condition": control.sees_condition,
                    **lora,
                }
                settings["gammas"] = (min(gammas), max(gammas)) if gammas else None
                controls.append(LoRAControl(name, panels[name].values, prior.denoiser, **settings))
        return cls(config, prior, Policy(prior.denoiser, *controls), panels)

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", trust: bool = False) -> "Run":
        """Open a finished run on any device ("auto": CUDA if there is one), whatever it was trained on.

        `trust` runs code that the folder names, of a p̂ on a network of one's own. A ValueError says that there is no
        such folder, no run, or a run that did not finish.
        """
        files = RunFolder(find_run(folder))
        if not files.path.is_dir():
            raise ValueError(f"there is no folder {files}. Make a run with: ctrl train … --out {files}")
        if not files.config.is_file():
            raise ValueError(f"{files} is not a run folder: it has no config.yaml. Make one with: ctrl train")
        config = files.read_config("prior").with_(device=device)
        if missing := [part for part in ("classifier", "control") if not (files.path / part).is_dir()]:
            lacks = f"{files} is an unfinished run: it lacks {', '.join(missing)}"
            raise ValueError(f"{lacks}. Go on with: ctrl train --resume {files}")
        panels = {name: Panel.load(files.classifier(name), trust) for name in config.names}
        prior = configured(open_prior(config.prior, config.size), config)
        controls = [load_control(files.control(name), prior.denoiser) for name in config.names]
        run = cls(config, prior, Policy(prior.denoiser, *controls), panels)
        if files.metrics.is_file():
            run.prior_outside = files.read_metrics()["prior"].get("outside_support")
        return run

    def save_controls(self, folder: RunFolder) -> None:
        """Write every control into a run folder."""
        for name, control in self.policy.controls.items():
            control.save(folder.control(name))

    def sample(
        self, y: Tensor | Labels, c: Tensor | None = None, strength: float = 1.0, steps: int | None = None,
        generator: Generators | None = None, exact: bool = False, phase: Phase = silent, latents: bool = False,
        gamma: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Draw samples (n, C, H, W) in [−1, 1] of p(x | c, y); images, also of a latent model.

        The certificate holds only for the number of steps the control was trained with; report.html shows what the
        control does at others.

        Args:
            y: (n,) classes of the control, −1 for uncontrolled; of several controls by name, one left out is null.
            c: (n,) classes of the prior, needed unless it is unconditional.
            strength: 0 is the prior, 1 the trained policy, more extrapolates; an evaluation more a step but at 0 and 1.
            steps: of the reverse process; the training chain's if None.
            generator: of all noise, or a list of one for each sample; the run's seed if None.
            exact: draw many paths and keep some by their importance weights, exact in the limit of many for the chain
                that is sampled (`resample.exact_samples`).
            phase: told of progress.
            latents: return the chain's own x_0 (n, *), not the images decoded from it.
            gamma: γ of the target, of a run with `gammas`: one evaluation a step at any; the run's if None.

        Raises:
            ValueError: c or y out of range, of different lengths, or c missing or not wanted; a γ the controls were not
                trained for; too few paths count for an exact sample, or it was to have a generator for each sample.
        """
        gamma = self.config.gamma if gamma is None else gamma
        for control in self.policy.controls.values():
            control.check_gamma(gamma, self.config.gamma)
        classes = self.prior.classes
        if (c is None) != (classes is None):
            wants = "is unconditional: leave c out" if classes is None else f"needs c, classes 0 … {classes - 1}"
            raise ValueError(f"this prior {wants}.")
        if not isinstance(y, dict) and len(self.names) > 1:
            raise ValueError(f"this run has the controls {self.name}: give y by name.")
        labels = y if isinstance(y, dict) else {self.name: y}
        counts = {len(rows) for rows in (*labels.values(), *([] if c is None else [c]))}
        if len(counts) != 1:
            raise ValueError(f"c and y must be equally many, got {' and '.join(map(str, sorted(counts)))}.")
        if c is not None and classes is not None and (c.min() < 0 or c.max() >= classes):
            raise ValueError(f"c must lie in 0 … {classes - 1}, got {int(c.min())} … {int(c.max())}.")
        generator = generator or stream(self.config.seed, "sample")
        times = self.times_of(steps) if steps else self.times
        cond, n = {} if c is None else {"c": c}, counts.pop()
        if exact:
            if not isinstance(generator, torch.Generator):
                raise ValueError("exact samples share one generator: each is chosen among many paths.")
            with cast(Any, self.policy.base).full_precision():  # or the weights would be those of rounding errors
                arguments = self.reward_at(gamma), times, generator, labels, cond, strength, phase
                x_0, _ = exact_samples(self.policy, *arguments, gamma)
        else:
            progress = phase("sampling", n)
            x_0 = paths(self.policy, n, times, generator, cond, labels, strength, progress=progress, gamma=gamma).x_0
        return x_0 if latents else self.images(x_0).clamp(-1, 1)
