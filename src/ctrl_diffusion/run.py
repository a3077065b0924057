"""A run: a prior with a trained control, how it is judged, and the folder it lives in.

config.yaml     everything needed to run again; an unknown key is an error
classifier/     p̂(y | x) with its held-out report; the judge of y and the reader of c, where there are any
control/        the control: adapter and embedding
progress.jsonl  one line per probe and update
metrics.json, samples/, the pictures and report.html
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from . import assets, demo
from .certificate import certify, gamma_within
from .conditions import Conditions
from .config import EMBEDDED, Config
from .control import LoRAControl, Policy
from .evaluate import Evaluation, Judge, score_samples, score_target, warn_if_left
from .judges import Judges
from .pretrained import Prior
from .progress import Phase, silent
from .reward import Among, Reward, prior_table
from .rollout import Times
from .sample import exact_samples, paths, stream

RULERS = {"ink": demo.ink_ruler}


def open_prior(name: str, unconditional: bool = False) -> Prior:
    """The embedded prior by its name, else a pipeline folder; by its null class if it is to be unconditional."""
    prior = Prior.from_pretrained(assets.DIGITS if name == EMBEDDED else name)
    return prior.unconditional() if unconditional else prior


@dataclass
class Run:
    """A prior, a control on it, and how they are judged.

    Args:
        config: its settings.
        prior: the pre-trained model.
        policy: the prior with the control.
        judges: p̂, and what measures y and c.
    """

    config: Config
    prior: Prior
    policy: Policy
    judges: Judges

    @property
    def name(self) -> str:
        """The control's."""
        return self.config.control

    @property
    def values(self) -> tuple[str, ...]:
        """The names of the control's classes, in order."""
        return self.policy.controls[self.name].values

    @property
    def reward(self) -> Reward:
        """γ log p̂."""
        return self.reward_at(self.config.gamma)

    def reward_at(self, gamma: float) -> Reward:
        """The reward at another γ; p̂(y | x, c) counts c among the classes it was fitted on."""
        p = self.judges.classifier
        return Reward({self.name: Among(p, self.config.classes) if p.conditional else p}, gamma)

    @property
    def judge(self) -> Judge:
        """The ruler if there is one, else the judge; with the reader and the judge's own opinion."""
        ruler = RULERS[self.config.ruler] if self.config.ruler else None
        outside = self.judges.outside if self.judges.support else None
        return Judge(ruler, self.judges.reader, self.judges.judge, outside)

    @property
    def accuracy_by(self) -> str:
        """Who measures y."""
        return "ruler" if self.config.ruler else "judge"

    def repeats(self, n: int) -> int:
        """How often every (c, y) stands among at least n paths; two at least, since one path has no spread."""
        return max(2, -(-n // self.conditions.pairs))

    @property
    def conditions(self) -> Conditions:
        """All (c, y)."""
        cond = {} if self.config.classes is None else {"c": torch.tensor(self.config.classes)}
        return Conditions(cond, {self.name: len(self.values)})

    @property
    def times(self) -> Times:
        """The training chain's grid; the certificate holds for this chain only."""
        return self.times_of(self.config.steps)

    def times_of(self, steps: int) -> Times:
        """The grid of another number of steps."""
        return self.prior.denoiser.times(steps, self.config.sigma_end, self.config.time_power)

    @classmethod
    def start(cls, config: Config, prior: Prior, judges: Judges) -> "Run":
        """A run whose control is untrained: its policy is the prior."""
        control = LoRAControl(config.control, judges.values, prior.denoiser, config.rank, config.seed)
        return cls(config, prior, Policy(prior.denoiser, control), judges)

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """Open a finished run.

        Raises:
            ValueError: no such folder, no run, or a run that did not finish.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}. Make a run with: ctrl train … --out {folder}")
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"{folder} is not a run folder: it has no config.yaml. Make one with: ctrl train")
        config = Config.read(folder / "config.yaml")
        missing = [name for name in ("classifier", "control") if not (folder / name).is_dir()]
        if missing:
            raise ValueError(f"{folder} is an unfinished run: it lacks {', '.join(missing)}. Train it again.")
        judges, prior = Judges.load(folder / "classifier"), open_prior(config.prior, config.unconditional)
        try:
            policy = Policy(prior.denoiser, LoRAControl.load(folder / "control", prior.denoiser))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder} is damaged: {' '.join(str(error).split())}. Train it again.") from error
        return cls(config, prior, policy, judges)

    def sample(
        self,
        y: Tensor,
        c: Tensor | None = None,
        strength: float = 1.0,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        exact: bool = False,
        phase: Phase = silent,
    ) -> Tensor:
        """Samples (n, C, H, W) in [−1, 1] of p(x | c, y).

        The certificate holds for the number of steps the control was trained with; with another number the same control
        steers another chain, of which nothing is proven (report.html shows what it does).

        Args:
            y: (n,) classes of the control, −1 for uncontrolled.
            c: (n,) classes of the prior, needed unless it is unconditional.
            strength: 0 is the prior, 1 the trained policy, more extrapolates.
            steps: of the reverse process; the training chain's if None.
            generator: of all noise; the run's seed if None.
            exact: draw many paths and keep some by their weights, exact in the limit of many, for the chain sampled
                here (`sample.exact_samples`).
            phase: told of progress.

        Raises:
            ValueError: c or y out of range, of different lengths, or c missing or not wanted; too few paths count for
                an exact sample.
        """
        classes = self.prior.classes
        if (c is None) != (classes is None):
            wants = "is unconditional: leave c out" if classes is None else f"needs c, classes 0 … {classes - 1}"
            raise ValueError(f"this prior {wants}.")
        if c is not None and len(c) != len(y):
            raise ValueError(f"c and y must be equally many, got {len(c)} and {len(y)}.")
        if c is not None and (c.min() < 0 or c.max() >= classes):
            raise ValueError(f"c must lie in 0 … {classes - 1}, got {int(c.min())} … {int(c.max())}.")
        generator = generator or stream(self.config.seed, "sample")
        times = self.times_of(steps) if steps else self.times
        cond, labels = {} if c is None else {"c": c}, {self.name: y}
        if exact:
            x_0, _ = exact_samples(self.policy, self.reward, times, generator, labels, cond, strength, phase)
        else:
            progress = phase("sampling", len(y))
            x_0, _, _ = paths(self.policy, len(y), times, generator, cond, labels, strength, progress=progress)
        return x_0.clamp(-1, 1)

    @torch.no_grad()
    def spend(self, budget: float, phase: Phase = silent) -> float:
        """Lower γ until the target lies within `budget` nats of the prior; returns it."""
        x_prior = self.prior_samples(self.config.evaluation.prior_samples, "prior samples for γ", phase)
        table = prior_table(self.reward_at(1.0), self.conditions, x_prior)
        self.config.gamma = float(f"{gamma_within(table, budget, self.config.gamma):.4g}")
        return self.config.gamma

    def prior_samples(self, members: int, purpose: str, phase: Phase = silent) -> Tensor:
        """Independent samples of the prior, `members` for each condition in turn."""
        cond = self.conditions.cond_of(torch.arange(self.conditions.groups).repeat_interleave(members))
        n, generator = members * self.conditions.groups, stream(self.config.seed, purpose)
        return paths(self.prior.denoiser, n, self.times, generator, cond, progress=phase(purpose, n))[0]

    def policy_paths(self, repeats: int, purpose: str, phase: Phase = silent) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Paths of the policy, `repeats` for every (c, y) in turn: reward, x_0, KL and log-ratio of each."""
        pair = self.conditions.all(repeats)
        labels, cond = self.conditions.of(pair)
        generator, advance = stream(self.config.seed, purpose), phase(purpose, len(pair))
        x_0, kl, log_ratio = paths(
            self.policy, len(pair), self.times, generator, cond, labels, compare=True, progress=advance
        )
        return self.reward(x_0, labels, cond), x_0, kl, log_ratio

    @torch.no_grad()
    def probe(self, repeats: int) -> tuple[dict[str, float], Tensor, Tensor]:
        """J, reward and KL in nats on a few paths, whose noise is the same at every probe, and the share outside the
        region p̂ was fitted on; log w and reward of each."""
        earned, x_0, kl, log_ratio = self.policy_paths(repeats, "probe")
        log_w = earned - log_ratio
        figures = {"J": log_w, "probe_reward": earned, "probe_kl": kl}
        if self.judges.support:
            figures["probe_outside"] = self.judges.outside(x_0).float()
        return {name: float(value.mean()) for name, value in figures.items()}, log_w, earned

    @torch.no_grad()
    def evaluate(self, n: int, phase: Phase = silent) -> Evaluation:
        """Judge the policy on at least n paths, equally many for every (c, y), against fresh samples of the prior.

        The certificate is of the training chain.
        """
        conditions, members = self.conditions, self.config.evaluation.prior_samples
        x_prior = self.prior_samples(members, "prior samples for log Z", phase)
        earned, x_0, kl, log_ratio = self.policy_paths(self.repeats(n), "paths to certify", phase)
        table = prior_table(self.reward, conditions, x_prior)
        # the prior ignores y: an equal share of its samples stands for each y
        share = members // conditions.classes
        uncontrolled = x_prior.unflatten(0, (-1, members))[:, : share * conditions.classes].flatten(0, 1)
        evaluation = Evaluation(
            prior=score_samples(uncontrolled, conditions, self.judge),
            target=score_target(x_prior, table, self.judge),
            ctrl=score_samples(x_0, conditions, self.judge),
            certificate=certify(conditions, table, earned, kl, log_ratio),
            n=len(x_0),
        )
        warn_if_left(evaluation.prior, evaluation.ctrl)
        return evaluation

    @torch.no_grad()
    def sweep(self, strengths: list[float], step_counts: list[int], n: int, phase: Phase = silent) -> dict[str, dict]:
        """Scores at other strengths and at other step counts, each on about n samples of the same noise.

        Returns:
            "strength" and "steps" → value → `Score`.
        """
        pair = self.conditions.all(self.repeats(n))
        labels, cond = self.conditions.of(pair)
        jobs = [("strength", w, self.config.steps) for w in strengths] + [("steps", k, k) for k in step_counts]
        advance, found = phase("strengths and step counts", len(pair) * len(jobs)), {"strength": {}, "steps": {}}
        for kind, value, steps in jobs:
            strength = value if kind == "strength" else 1.0
            generator = stream(self.config.seed, "sweep")
            x_0, _, _ = paths(
                self.policy, len(pair), self.times_of(steps), generator, cond, labels, strength, progress=advance
            )
            found[kind][value] = score_samples(x_0, self.conditions, self.judge)
        return found
