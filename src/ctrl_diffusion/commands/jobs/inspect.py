"""What a pre-trained model is, and what training a control on it takes."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...chain.transition import half_square, transition
from ...control.lora import LoRAControl
from ...control.policy import Policy
from ...learn.step import Evaluations
from ...learn.table import LEARNERS
from ...prior.prior import Prior
from ...run.config import Config
from ...run.defaults import suggested

MEGABYTE = 1e6


def inspected(prior: Prior) -> dict[str, Any]:
    """Family, sizes and the cost of an update with the settings `ctrl train` would choose for a control of two classes.

    Memory is counted in float32: the weights, and once more those a control changes; what AdamW and the averaged
    weights hold for the control; and what an update of `adjoint` keeps for the gradient, of a micro-batch or of all its
    regressed steps at once, from one step run on one row and on two. A decoder is not counted. Evaluations are of the
    network, per sample of an update, as (forward, forward and backward); a guided call counts as two.

    Args:
        prior: of a model that is given text, one with prompts; it is given a control.
    """
    denoiser = prior.denoiser
    parameters = sum(p.numel() for p in denoiser.network.parameters())
    groups = prior.classes or 1
    values = suggested(denoiser.shape, parameters, denoiser.site.rank, groups=min(groups, 20), classes=2)
    config = Config.from_values({"prior": "-", "control": "-", "data": "-", **values})
    control = LoRAControl("probe", ("no", "yes"), denoiser, config.rank)
    trained = sum(p.numel() for group in control.parameter_groups().values() for p in group)
    policy = Policy(denoiser, control)
    one, two = (kept_bytes(policy, prior, rows) for rows in (1, 2))
    per_sample = {name: [calls(prior) * n for n in each] for name, each in evaluations(config).items()}
    return {
        "family": prior.pipeline,
        "prediction_type": denoiser.prediction,
        "schedule": type(denoiser.schedule).__name__,
        "sample_shape": list(denoiser.shape),
        "image_shape": list(prior.image_shape),
        "conditions": "text" if prior.text else prior.classes,
        "guidance": prior.text and prior.text.guidance,
        "parameters": parameters,
        "control_parameters": trained,
        "step": {
            "batch": config.adjoint.batch,
            "micro_batch": config.micro_batch,
            "chain": config.steps,
            "evaluations": per_sample,
            "memory_mb": {
                "weights": round((4 * parameters + max(0, 2 * one - two)) / MEGABYTE, 1),
                "control": round(4 * 5 * trained / MEGABYTE, 1),  # itself, its gradient, two moments, the average
                "activations": round(config.adjoint.rows_kept(config.micro_batch) * (two - one) / MEGABYTE, 1),
            },
        },
    }


def calls(prior: Prior) -> int:
    """How often the network is called for one evaluation of a sample: twice under guidance."""
    return 2 if prior.text and not prior.text.distilled and prior.text.guidance != 1 else 1


def evaluations(config: Config) -> dict[str, Evaluations]:
    """Count the network's evaluations for each sample of an update, by stage."""
    stages = (getattr(config, name).stages(name) for name in LEARNERS)
    return {stage: settings.evaluations(config.steps) for each in stages for stage, settings in each.items()}


def kept_bytes(policy: Policy, prior: Prior, rows: int) -> int:
    """What one step of the policy keeps for the gradient of so many rows, bytes."""
    first = torch.zeros(rows, dtype=torch.long)
    cond = {} if prior.classes is None else {"c": first}
    held: dict[StorageWeakRef, int] = {}
    own = {StorageWeakRef(p.untyped_storage()) for p in policy.parameters()}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (known := StorageWeakRef(storage)) not in own:
            held[known] = storage.nbytes()
        return tensor

    x_t = torch.zeros(rows, *policy.shape, device=policy.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        t, s = policy.start, policy.start / 2
        step = transition(policy, x_t, t, s, labels=dict.fromkeys(policy.controls, first), **cond)
        half_square(step.mean).sum()
    return sum(held.values())


def in_words(found: dict[str, Any]) -> str:
    """What `inspected` found, for people."""
    step, memory = found["step"], found["step"]["memory_mb"]
    conditions = {None: "none", "text": f"text, guidance {found['guidance']}"}
    sizes = " × ".join(map(str, found["sample_shape"]))
    if found["image_shape"] != found["sample_shape"]:
        sizes += f", latents of images {' × '.join(map(str, found['image_shape']))}"
    lines = {
        "family": found["family"],
        "predicts": f"{found['prediction_type']}, schedule {found['schedule']}",
        "x": sizes,
        "conditions": conditions.get(found["conditions"], f"{found['conditions']} classes"),
        "parameters": f"{found['parameters']:,}, and {found['control_parameters']:,} of a control of two classes",
        "an update": f"{step['batch']} samples, chain of {step['chain']} steps",
        "memory": ", ".join(f"{name} {size:,.0f} MB" for name, size in memory.items()) + " (float32, adjoint)",
    }
    lines |= {
        f"  {learner}": f"{forward} + {both} evaluations a sample (forward + forward and backward)"
        for learner, (forward, both) in step["evaluations"].items()
    }
    return "\n".join(f"{name:12} {text}" for name, text in lines.items())
