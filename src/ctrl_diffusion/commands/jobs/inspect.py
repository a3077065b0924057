"""Describe a pre-trained model and the cost of training a control on it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...chain.transition import half_square, transition
from ...control.conditions import MOST_ENUMERATED
from ...control.lora import LoRAControl
from ...control.policy import Policy
from ...learn.step import Evaluations
from ...learn.table import LEARNERS
from ...prior.prior import Prior
from ...run.config import Config
from ...run.defaults import suggested

MEGABYTE = 1e6


def describe(prior: Prior) -> dict[str, Any]:
    """Describe a prior's family, sizes and the cost of an update, with the settings `ctrl train` would choose for it.

    Memory is counted in float32, without a decoder: the weights, twice for those that a control changes; a control of
    two classes, its gradient, its average and AdamW's moments; and what an update of `adjoint` keeps for the gradient,
    measured by one step on one row and on two. Evaluations are counted as in `estimate`. The control stays attached.
    """
    denoiser = prior.denoiser
    parameters = sum(p.numel() for p in denoiser.network.parameters())
    groups, pooled = min(prior.classes or 1, MOST_ENUMERATED), (prior.classes or 1) > MOST_ENUMERATED
    values = suggested(denoiser.shape, parameters, denoiser.site.rank, groups=groups, classes=2, pooled=pooled)
    config = Config.from_values({"prior": "-", "control": "-", "data": "-", **values})
    control = LoRAControl("probe", ("no", "yes"), denoiser, config.rank)
    trainable = sum(p.numel() for group in control.parameter_groups().values() for p in group)
    policy = Policy(denoiser, control)
    kept = measure_kept(policy, prior)
    return {
        "family": prior.pipeline, "prediction_type": denoiser.prediction, "schedule": type(denoiser.schedule).__name__,
        "scheduler": prior.scheduler, "not_followed": prior.not_followed,
        "sample_shape": list(denoiser.shape), "image_shape": list(prior.image_shape),
        "conditions": "text" if prior.text else prior.classes, "guidance": prior.text and prior.text.guidance,
        "parameters": parameters, "control_parameters": trainable,
        "step": {
            "batch": config.adjoint.batch, "micro_batch": config.micro_batch, "chain": config.steps,
            "evaluations": {name: [calls(prior) * n for n in each] for name, each in evaluations(config).items()},
            "memory_mb": {
                "weights": round((4 * parameters + kept.weights) / MEGABYTE, 1),
                "control": round(4 * 5 * trainable / MEGABYTE, 1),  # itself, gradient, two moments, average
                "activations": round(config.adjoint.rows_kept(config.micro_batch) * kept.row / MEGABYTE, 1),
            },
        },
    }  # fmt: skip


def calls(prior: Prior) -> int:
    """Count the network's calls for one evaluation of a sample: two under guidance.

    Of a prior with prompts the guidance is its own, 1 for none; without, that is the pipeline's default.
    """
    if not prior.text or prior.text.distilled:
        return 1
    return 1 if getattr(prior.denoiser.call, "guidance", prior.text.guidance) == 1 else 2


def evaluations(config: Config) -> dict[str, Evaluations]:
    """Count the network's evaluations for each sample of an update, by stage."""
    stages = (getattr(config, name).stages(name) for name in LEARNERS)
    return {stage: settings.evaluations(config.steps) for each in stages for stage, settings in each.items()}


class KeptBytes(NamedTuple):
    """Hold the bytes that one step of a policy keeps for the gradient."""

    weights: int  # once: those that a control changes exist twice
    row: int  # for each sample


def measure_kept(policy: Policy, prior: Prior) -> KeptBytes:
    """Tell what a step keeps once from what it keeps for each sample."""
    one, two = (kept_bytes(policy, prior, rows) for rows in (1, 2))
    return KeptBytes(max(0, 2 * one - two), two - one)


def kept_bytes(policy: Policy, prior: Prior, rows: int) -> int:
    """Measure the bytes that one step of the policy keeps for the gradient of so many rows."""
    first, held = torch.zeros(rows, dtype=torch.long), {}
    cond = {} if prior.classes is None else {"c": first}
    weights = {StorageWeakRef(p.untyped_storage()) for p in policy.parameters()}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (reference := StorageWeakRef(storage)) not in weights:
            held[reference] = storage.nbytes()
        return tensor

    x_t = torch.zeros(rows, *policy.shape, device=policy.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        labels = dict.fromkeys(policy.controls, first)
        half_square(transition(policy, x_t, policy.start, policy.start / 2, labels=labels, **cond).mean).sum()
    return sum(held.values())


def in_words(facts: dict[str, Any]) -> str:
    """Format the result of `describe` for a terminal."""
    step, memory = facts["step"], facts["step"]["memory_mb"]
    conditions = {None: "none", "text": f"text, guidance {facts['guidance']}"}
    sizes = " × ".join(map(str, facts["sample_shape"]))
    if facts["image_shape"] != facts["sample_shape"]:
        sizes += f", latents of images {' × '.join(map(str, facts['image_shape']))}"
    ignored = ", ".join(f"{name} {value}" for name, value in facts["not_followed"].items())
    lines = {
        "family": facts["family"],
        "predicts": f"{facts['prediction_type']}, schedule {facts['schedule']}",
        **({"not followed": f"{ignored} (of its {facts['scheduler']})"} if ignored else {}),
        "x": sizes,
        "conditions": conditions.get(facts["conditions"], f"{facts['conditions']} classes"),
        "parameters": f"{facts['parameters']:,}, and {facts['control_parameters']:,} of a control of two classes",
        "an update": f"{step['batch']} samples, chain of {step['chain']} steps",
        "memory": ", ".join(f"{name} {size:,.0f} MB" for name, size in memory.items()) + " (float32, adjoint)",
    }
    lines |= {
        f"  {learner}": f"{forward} + {both} evaluations a sample (forward + forward and backward)"
        for learner, (forward, both) in step["evaluations"].items()
    }
    return "\n".join(f"{name:12} {text}" for name, text in lines.items())
