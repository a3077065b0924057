"""A run: a prior with a trained control, how it is judged, and the folder it lives in.

config.yaml     everything needed to run again; an unknown key is an error
classifier/     p̂(y | x) with its held-out report; the judge of y and the reader of c, where there are any
control/        the control: adapter and embedding
                (of several controls both hold one folder for each, by name)
progress.jsonl  one line per probe and update
metrics.json, samples/, the pictures and report.html
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from ..chain.noise import stream
from ..chain.paths import paths
from ..chain.rollout import Times
from ..control.conditions import Conditions
from ..control.kinds import load_control
from ..control.lora import LoRAControl
from ..control.policy import Policy
from ..data.digits import MEASURES, RULERS
from ..data.labels import Labels
from ..evaluate.certificate import certify, gamma_within
from ..evaluate.evaluation import Evaluation, leaves_region, warn_if_outside
from ..evaluate.judge import Observation, Ruler, SecondOpinion
from ..evaluate.resample import exact_samples
from ..evaluate.scores import Nulled, score_samples, score_target
from ..prior.prior import Prior, open_prior
from ..prior.sharding import shard
from ..reward.classifiers import Panel
from ..reward.reward import Among, Reward, prior_table
from ..reward.support import BEYOND
from ..system import ranks
from ..system.progress import Phase, silent
from .config import Config, ControlSettings
from .folder import home


def configured(prior: Prior, config: Config) -> Prior:
    """A prior with the prompts of a run, or by its null class if it is to be unconditional, where the run puts it."""
    if config.prompts is not None:
        prior = prior.with_prompts(config.prompts, config.guidance, config.negative_prompt)
    elif config.guidance is not None or config.negative_prompt:
        raise ValueError("guidance and negative_prompt: this prior is given no text. Leave them out.")
    prior = prior.unconditional() if config.unconditional else prior
    ranks.state()  # of several processes each is given an accelerator of its own, which "auto" then means
    if ranks.sharded():
        shard(prior.denoiser, config.device)
    return prior.placed(config.device, config.mixed_precision, config.vae_tiling)


@dataclass
class Run:
    """A prior, controls on it, and how they are judged.

    Args:
        config: its settings.
        prior: the pre-trained model.
        policy: the prior with the controls.
        panels: control → p̂, and what measures y and c.
        usually_outside: the share of the prior's samples outside the region p̂ was fitted on, if it was measured; else
            that of real images.
    """

    config: Config
    prior: Prior
    policy: Policy
    panels: dict[str, Panel]
    usually_outside: float = BEYOND

    def __post_init__(self) -> None:
        for panel in self.panels.values():
            panel.to(self.prior.denoiser.device)

    @property
    def names(self) -> list[str]:
        """Of the controls, in order."""
        return self.config.names

    @property
    def name(self) -> str:
        """The control's, or all of them."""
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
        """The reward at another γ; p̂(y | x, c) counts c among the classes it was fitted on."""
        found = {name: panel.classifier for name, panel in self.panels.items()}
        among = {n: Among(p, self.config.classes) if p.conditional else p for n, p in found.items()}
        return Reward(among, gamma, self.prior.codec, self.prior.denoiser.device)

    def images(self, x: Tensor) -> Tensor:
        """What there is to see of samples x (n, *), which may be latents: (n, C, H, W) on the CPU."""
        codec, device = self.prior.codec, self.prior.denoiser.device
        return torch.cat([codec.decode(part.to(device)).cpu() for part in x.split(codec.batch)])

    @property
    def judge(self) -> SecondOpinion:
        """The rulers where there are any, else the panel; with a reader and the panels' own opinions."""
        return SecondOpinion(
            {control.name: self.ruler(control) for control in self.config.controls if control.ruler},
            next((panel.reader for panel in self.panels.values() if panel.reader), None),
            {name: panel.judge for name, panel in self.panels.items() if panel.judge},
            self.outside if all(panel.support for panel in self.panels.values()) else None,
            self.prior.codec,
            self.prior.denoiser.device,
        )

    def ruler(self, settings: ControlSettings) -> Ruler:
        """What measures the class of a control, or on a scale the nearest level."""
        space = self.policy.controls[settings.name].space
        return (lambda x: space.nearest(self.place(settings, x))) if space.scale else RULERS[settings.ruler]

    def place(self, settings: ControlSettings, x: Tensor) -> Tensor:
        """Where each x (n, C, H, W) lies on a control's scale (n,), by its ruler or in the eyes of its judge."""
        panel = self.panels[settings.name]
        if settings.ruler:
            return panel.space.places(MEASURES[settings.ruler](x))
        scores = panel.judge.scores(x.to(self.prior.denoiser.device))
        return panel.judge.density(scores, panel.judge.temperature).mean.cpu()

    @torch.no_grad()
    def follow(self, n: int, phase: Phase = silent) -> dict[str, tuple[Tensor, Tensor]]:
        """For each control on a scale n places asked for, evenly spread, and where the samples lie: (n,) and (n,)."""
        found = {}
        for settings in self.config.controls:
            control = self.policy.controls[settings.name]
            if control.scale:
                asked = torch.linspace(0, control.size - 1, n)
                purpose = f"values of {settings.name}"
                advance = phase(purpose, n)
                cond = self.conditions.cond_of(torch.arange(n) % self.conditions.groups)
                generator = stream(self.config.seed, purpose)
                labels = {settings.name: asked}
                x_0 = paths(self.policy, n, self.times, generator, cond, labels, progress=advance).x_0
                came = [self.place(settings, self.images(part)) for part in x_0.split(1024)]
                found[settings.name] = asked, torch.cat(came)
        return found

    def outside(self, x_0: Tensor, images: Tensor) -> Tensor:
        """Whether each sample (n, *), with its image, lies outside the region some p̂ was fitted on (n,)."""
        seen = [panel.outside(x_0 if panel.latent else images) for panel in self.panels.values()]
        return torch.stack(seen).any(0)

    @property
    def accuracy_by(self) -> str:
        """Who measures y."""
        return "ruler" if all(control.ruler for control in self.config.controls) else "judge"

    def repeats(self, n: int, conditions: Conditions) -> int:
        """How often every (c, y) stands among at least n paths; two at least, since one path has no spread."""
        return max(2, -(-n // conditions.pairs))

    @property
    def conditions(self) -> Conditions:
        """All (c, y) with a label for every control."""
        return self.conditions_on(self.names)

    @property
    def trained(self) -> Conditions:
        """All (c, y) that are trained: labels may be null, but where a control is being added not that one's."""
        settled = [name for name in self.names if self.policy.controls[name].fixed]
        return Conditions.for_training(self.conditions.cond, self.conditions.controls, settled)

    def conditions_on(self, names: Sequence[str]) -> Conditions:
        """All (c, y) with labels for some of the controls."""
        cond = {} if self.config.classes is None else {"c": torch.tensor(self.config.classes)}
        return Conditions(cond, {name: self.policy.controls[name].size for name in names})

    @property
    def parts(self) -> list[tuple[str, ...]]:
        """Choices of controls that are judged beside all together: each alone, and all but one."""
        if len(self.names) < 2:
            return []
        alone = [(name,) for name in self.names]
        return list(dict.fromkeys([*alone, *(tuple(n for n in self.names if n != name) for name in self.names)]))

    @property
    def times(self) -> Times:
        """The training chain's grid; the certificate holds for this chain only."""
        return self.times_of(self.config.steps)

    def times_of(self, steps: int) -> Times:
        """The grid of another number of steps."""
        return self.prior.denoiser.times(steps, self.config.sigma_end, self.config.time_power)

    @classmethod
    def start(cls, config: Config, prior: Prior, panels: dict[str, Panel]) -> "Run":
        """A run whose controls are untrained, but for those that are settled."""
        controls = []
        for i, control in enumerate(config.controls):
            if control.settled_from:
                folder = home(Path(control.settled_from), "control", control.name)
                if not folder.is_dir():
                    raise ValueError(f"{control.name} is taken from {folder}, which is not there. Bring that run back.")
                controls.append(load_control(folder, prior.denoiser).fix())
            else:
                mine = panels[control.name]
                lora = {"rank": config.rank, "alpha": config.lora_alpha, "targets": config.lora_targets}
                more = {"seed": config.seed + i, "scale": mine.space.scale, **lora}
                controls.append(LoRAControl(control.name, mine.values, prior.denoiser, **more))
        return cls(config, prior, Policy(prior.denoiser, *controls), panels)

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", trust: bool = False) -> "Run":
        """Open a finished run, on any device: where it was trained is no part of it.

        Args:
            folder: of the run.
            device: as torch names it; "auto" for an accelerator of CUDA if there is one.
            trust: run code that it names, of a p̂ on a network of one's own.

        Raises:
            ValueError: no such folder, no run, or a run that did not finish.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}. Make a run with: ctrl train … --out {folder}")
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"{folder} is not a run folder: it has no config.yaml. Make one with: ctrl train")
        config = Config.read(folder / "config.yaml").with_(device=device)
        missing = [name for name in ("classifier", "control") if not (folder / name).is_dir()]
        if missing:
            lacks = f"{folder} is an unfinished run: it lacks {', '.join(missing)}"
            raise ValueError(f"{lacks}. Go on with: ctrl train --resume {folder}")
        panels = {name: Panel.load(home(folder, "classifier", name), trust) for name in config.names}
        prior = configured(open_prior(config.prior, config.size), config)
        controls = [load_control(home(folder, "control", name), prior.denoiser) for name in config.names]
        run = cls(config, prior, Policy(prior.denoiser, *controls), panels)
        if (folder / "metrics.json").is_file():
            known = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            run.usually_outside = known["prior"].get("outside_support") or BEYOND
        return run

    def save_controls(self, folder: Path) -> None:
        """Write every control into its place in the run folder."""
        for name, control in self.policy.controls.items():
            control.save(self.room(folder, "control", name))

    def room(self, folder: Path, what: str, name: str) -> Path:
        """Where the run folder keeps the "control" or "classifier" of a control: `home` finds it there."""
        return folder / what / name if len(self.names) > 1 else folder / what

    @torch.no_grad()
    def outside_share(self, x_0: Tensor, images: Tensor) -> float | None:
        """The share of samples (n, *), with their images, outside the region some p̂ was fitted on; None if not known.

        Warns:
            RuntimeWarning: more than twice the prior's share, and more by three standard errors.
        """
        if not self.judge.outside:
            return None
        share, usual = float(self.outside(x_0, images).float().mean()), self.usually_outside
        if leaves_region(share, usual, (usual * (1 - usual) / len(x_0)) ** 0.5):
            warnings.warn(
                f"{share:.0%} of the samples lie outside the region the classifier was fitted on, of the prior's "
                f"{usual:.0%}: there p̂ has seen no labels. Compare the judge in report.html.",
                RuntimeWarning,
                stacklevel=2,
            )
        return share

    def sample(
        self,
        y: Tensor | Labels,
        c: Tensor | None = None,
        strength: float = 1.0,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        exact: bool = False,
        phase: Phase = silent,
        latents: bool = False,
    ) -> Tensor:
        """Samples (n, C, H, W) in [−1, 1] of p(x | c, y); images, also of a latent model.

        The certificate holds for the number of steps the control was trained with; with another number the same control
        steers another chain, of which nothing is proven (report.html shows what it does).

        Args:
            y: (n,) classes of the control, −1 for uncontrolled; of several controls by name, one left out is null.
            c: (n,) classes of the prior, needed unless it is unconditional.
            strength: 0 is the prior, 1 the trained policy, more extrapolates.
            steps: of the reverse process; the training chain's if None.
            generator: of all noise; the run's seed if None.
            exact: draw many paths and keep some by their weights, exact in the limit of many, for the chain sampled
                here (`sample.exact_samples`).
            phase: told of progress.
            latents: give the chain's own x_0 (n, *), not what there is to see of them.

        Raises:
            ValueError: c or y out of range, of different lengths, or c missing or not wanted; too few paths count for
                an exact sample.
        """
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
        if c is not None and (c.min() < 0 or c.max() >= classes):
            raise ValueError(f"c must lie in 0 … {classes - 1}, got {int(c.min())} … {int(c.max())}.")
        generator = generator or stream(self.config.seed, "sample")
        times = self.times_of(steps) if steps else self.times
        cond, n = {} if c is None else {"c": c}, counts.pop()
        if exact:
            with self.policy.base.full_precision():  # or weights would be of rounding
                x_0, _ = exact_samples(self.policy, self.reward, times, generator, labels, cond, strength, phase)
        else:
            progress = phase("sampling", n)
            x_0 = paths(self.policy, n, times, generator, cond, labels, strength, progress=progress).x_0
        return x_0 if latents else self.images(x_0).clamp(-1, 1)

    @torch.no_grad()
    def spend(self, budget: float, phase: Phase = silent) -> float:
        """Lower γ until the target lies within `budget` nats of the prior; returns it."""
        x_prior = self.prior_samples(self.config.evaluation.prior_samples, "prior samples for γ", phase)
        table = prior_table(self.reward_at(1.0), self.conditions, x_prior)
        gamma = ranks.broadcast(lambda: gamma_within(table, budget, self.config.gamma))
        self.config = self.config.with_(gamma=float(f"{gamma:.4g}"))
        return self.config.gamma

    def prior_samples(self, members: int, purpose: str, phase: Phase = silent) -> Tensor:
        """Independent samples of the prior, `members` for each condition in turn."""
        cond = self.conditions.cond_of(torch.arange(self.conditions.groups).repeat_interleave(members))
        n, generator = members * self.conditions.groups, stream(self.config.seed, purpose)
        with self.policy.base.full_precision():
            return paths(self.prior.denoiser, n, self.times, generator, cond, progress=phase(purpose, n)).x_0

    def policy_paths(
        self, conditions: Conditions, repeats: int, purpose: str, phase: Phase = silent
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Paths of the policy, `repeats` for every (c, y) in turn: reward, x_0, KL and log-ratio of each."""
        pair = conditions.all(repeats)
        labels, cond = conditions.of(pair)
        generator, advance = stream(self.config.seed, purpose), phase(purpose, len(pair))
        with self.policy.base.full_precision():
            x_0, kl, log_ratio = paths(
                self.policy, len(pair), self.times, generator, cond, labels, compare=True, progress=advance
            )
        earned = self.reward(x_0, labels, cond)
        return ranks.broadcast(lambda: earned), x_0, kl, log_ratio

    @torch.no_grad()
    def probe(self, repeats: int) -> tuple[dict[str, float], Tensor, Tensor]:
        """J, reward and KL in nats on a few paths, whose noise is the same at every probe, and the share outside the
        region p̂ was fitted on; log w and reward of each."""
        earned, x_0, kl, log_ratio = self.policy_paths(self.trained, repeats, "probe")
        log_w = earned - log_ratio
        figures = {"J": log_w, "probe_reward": earned, "probe_kl": kl}
        if self.judge.outside:
            parts = [self.outside(part, self.images(part)) for part in x_0.split(self.prior.codec.batch)]
            figures["probe_outside"] = torch.cat(parts).float()
        return {name: float(value.mean()) for name, value in figures.items()}, log_w, earned

    @torch.no_grad()
    def evaluate(self, n: int, phase: Phase = silent) -> Evaluation:
        """Evaluate the policy on at least n paths, equally many for every (c, y), against fresh samples of the prior.

        The certificate is of the training chain. Of several controls also each choice in `parts`, on half the paths.
        """
        x_prior = self.prior_samples(self.config.evaluation.prior_samples, "prior samples for log Z", phase)
        looked = self.judge.measure(x_prior, self.conditions)
        evaluation = self.evaluate_on(self.conditions, x_prior, looked, n, "paths to certify", phase)
        for names in self.parts:
            purpose = f"paths with {' and '.join(names)} alone"
            conditions = self.conditions_on(names)
            evaluation.parts[names] = self.evaluate_on(conditions, x_prior, looked, n // 2, purpose, phase)
        return evaluation

    def evaluate_on(
        self,
        conditions: Conditions,
        x_prior: Tensor,
        of_prior: Observation,
        n: int,
        purpose: str,
        phase: Phase = silent,
    ) -> Evaluation:
        """Evaluate the policy under some of its controls; x_prior (G · M, *) are the prior's, which were looked at."""
        members = len(x_prior) // conditions.groups
        earned, x_0, kl, log_ratio = self.policy_paths(conditions, self.repeats(n, conditions), purpose, phase)
        table = prior_table(self.reward, conditions, x_prior)
        # the prior ignores y: an equal share of its samples stands for each y
        share = members // conditions.classes
        uncontrolled = (torch.arange(len(x_prior)).view(-1, members)[:, : share * conditions.classes]).flatten()
        scores = {
            "prior": score_samples(of_prior[uncontrolled], conditions),
            "target": score_target(of_prior, table, conditions),
            "ctrl": score_samples(self.judge.measure(x_0, conditions), conditions),
        }
        nulled = {
            name: Nulled.from_labels({kind: score.labels[name] for kind, score in scores.items()}, control.size, table)
            for name, control in self.policy.controls.items()
            if name not in conditions.controls
        }
        evaluation = Evaluation(
            **scores, certificate=certify(conditions, table, earned, kl, log_ratio), n=len(x_0), nulled=nulled
        )
        warn_if_outside(evaluation.prior, evaluation.ctrl)
        return evaluation

    @torch.no_grad()
    def sweep(self, strengths: list[float], step_counts: list[int], n: int, phase: Phase = silent) -> dict[str, dict]:
        """Scores at other strengths and at other step counts, each on about n samples of the same noise.

        Returns:
            "strength" and "steps" → value → `Score`.
        """
        pair = self.conditions.all(self.repeats(n, self.conditions))
        labels, cond = self.conditions.of(pair)
        jobs = [("strength", w, self.config.steps) for w in strengths] + [("steps", k, k) for k in step_counts]
        advance, found = phase("strengths and step counts", len(pair) * len(jobs)), {"strength": {}, "steps": {}}
        for kind, value, steps in jobs:
            strength = value if kind == "strength" else 1.0
            generator = stream(self.config.seed, "sweep")
            x_0, _, _ = paths(
                self.policy, len(pair), self.times_of(steps), generator, cond, labels, strength, progress=advance
            )
            found[kind][value] = score_samples(self.judge.measure(x_0, self.conditions), self.conditions)
        return found
