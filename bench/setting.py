"""Hold what bench/speed.py measures: a Stable Diffusion of 100,000 parameters, its learners, and their calls."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from models import pipeline
from race import CLASSES, GUIDANCE, PROMPTS, RANK, Brightness

from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.chain.rollout import Times
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.learn.adjoint import Adjoint
from ctrl_diffusion.learn.backprop import Backprop
from ctrl_diffusion.learn.fit import Update, fit
from ctrl_diffusion.learn.ppo import PPO
from ctrl_diffusion.learn.step import Learner
from ctrl_diffusion.learn.weighted import Weighted
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.reward.reward import Reward

LR = {"embedding": 1e-5, "adapter": 1e-5}
K = 5  # steps of each path that adjoint and ppo use in an update


def write_tiny(folder: Path, side: int = 8) -> None:
    """Write the tiny pipeline, its tokenizer also in the files that transformers read before version 5."""
    torch.manual_seed(0)
    tiny = pipeline("tiny")
    tiny.unet.register_to_config(sample_size=side)
    tiny.save_pretrained(folder)
    whole = folder / "tokenizer" / "tokenizer.json"
    if whole.is_file():
        words = json.loads(whole.read_text(encoding="utf-8"))["model"]["vocab"]
        whole.with_name("vocab.json").write_text(json.dumps(words), encoding="utf-8")
        whole.with_name("merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


@dataclass
class Setting:
    """Hold a policy on the tiny prior, its chain, conditions and reward."""

    prior: Prior
    policy: Policy
    times: Times
    conditions: Conditions
    reward: Reward

    @classmethod
    def from_folder(cls, folder: Path, steps: int, latent: bool = False, controls: int = 1) -> "Setting":
        """Load the prior and add controls; p̂ looks at images, or at latents."""
        prior = Prior.from_pretrained(folder).with_prompts(PROMPTS, guidance=GUIDANCE)
        names = [f"y{i}" for i in range(controls)]
        classes = tuple(map(str, range(CLASSES)))
        lora = [LoRAControl(name, classes, prior.denoiser, rank=RANK) for name in names]
        reward = Reward({name: Brightness(latent) for name in names}, codec=prior.codec)
        conditions = Conditions.for_training({"c": torch.arange(len(PROMPTS))}, {name: CLASSES for name in names})
        times = prior.denoiser.times(steps, 0.05, 2.0)
        return cls(prior, Policy(prior.denoiser, *lora), times, conditions, reward)

    def learner(self, name: str, batch: int, micro: int | None = None) -> Learner:
        """Return a learner that rolls out anew for every update."""
        adjoint = {"batch": batch, "micro": micro, "regressed": K, "reuse": 1}
        return {
            "weighted": lambda: Weighted(torch.randn(64, *self.policy.shape), self.times, batch, micro=micro),
            "adjoint": lambda: Adjoint(self.times, **adjoint),
            "lean": lambda: Adjoint(self.times, **adjoint, lean=True),
            "backprop": lambda: Backprop(self.times, batch, micro=micro),
            "ppo": lambda: PPO(self.times, batch, micro=micro, surrogates=K, reuse=1),
        }[name]()

    def run(self, name: str, batch: int, micro: int | None = None) -> Callable[[], object]:
        """Return a function that runs one update of a learner or draws one batch of samples."""
        if "sampling" not in name:
            return self.updates(name, batch, micro)
        labels = {y: torch.arange(batch) % CLASSES for y in self.policy.controls} if name == "sampling" else None
        denoiser = self.policy if labels else self.policy.prior
        cond, generator = {"c": torch.zeros(batch, dtype=torch.long)}, torch.Generator().manual_seed(0)
        return lambda: paths(denoiser, batch, self.times, generator, cond, labels)

    def updates(self, name: str, batch: int, micro: int | None = None) -> Callable[[], Update]:
        """Return a function that runs one update of a learner."""
        learner = self.learner(name, batch, micro)
        stream = learner(self.policy, self.reward, self.conditions, torch.Generator().manual_seed(0))
        return fit(self.policy, stream, 10**6, LR).__next__


def evaluations(name: str, n: int, k: int = K) -> dict[tuple[str, int], int]:
    """Return the calls of the network in one update, by kind and by how many batches a call holds.

    Kinds: prior or policy, forward alone or with backward to the state ("x") or to the parameters ("θ").
    """
    regression = {("policy θ", k): 1}
    calls: dict[str, dict[tuple[str, int], int]] = {
        "sampling": {("policy", 1): n, ("prior", 1): 1},
        "prior's sampling": {("prior", 1): n + 1},
        "weighted": {("policy θ", 1): 1},
        # the rollout; the read-out; adjoints of all states but the first, whose step has its prior's mean alone
        "adjoint": {("policy", 1): n, ("prior x", 1): n, ("policy x", 1): n - 1, ("prior", 1): 1, **regression},
        "lean": {("policy", 1): n, ("prior x", 1): n, ("prior", 1): 1, **regression},
        # forward and back; the gradient at the first state is not needed
        "backprop": {("policy", 1): n, ("prior", 1): n, ("prior x", 1): n, ("policy θ", 1): 1, ("policy xθ", 1): n - 1},
        "ppo": {("policy", 1): n, ("prior", 1): n + 1, **regression},
    }
    return calls[name]
