"""The only training loop: it steps on a learner's losses, averages weights and yields what happened.

Embedding and adapter have separate learning rates under one warm-up and cosine decay: parameter noise is visible as KL.
At the end the averaged weights take the place of the last ones.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from ..chain.denoise import loss_scale
from ..control.policy import Policy
from ..system import ranks
from .step import Step

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW knows of a parameter


@dataclass
class Update:
    """What one update did: its number from 1, the loss in nats, the gradient's norm, the learner's figures.

    Args:
        skipped: updates up to this one that were left out because they were not finite.
        state: gives all that `fit` needs to go on from here, by name: weights, their averages, AdamW's moments and
            counts; to be called before the next update. None where the learner's paths are still to be used.
    """

    number: int
    loss: float
    gradient_norm: float
    metrics: dict[str, float]
    skipped: int = 0
    state: Callable[[], dict[str, Tensor]] | None = None


def fit(
    policy: Policy,
    steps: Iterator[Step],
    updates: int,
    lr: dict[str, float],
    ema_decay: float = 0.995,
    warmup: int = 20,
    max_norm: float = 100.0,
    max_skipped: int = 5,
    begin: dict[str, Tensor] | None = None,
) -> Iterator[Update]:
    """Train the policy's controls on a learner's stream of losses; a generator, the caller owns logging and stopping.

    Args:
        policy: its control parameters are trained in place.
        steps: the learner's stream.
        updates: how many to take.
        lr: peak learning rate per parameter group ("embedding", "adapter").
        ema_decay: of the averaged weights that are kept at the end.
        warmup: updates of linear warm-up; the rest decays as a cosine.
        max_norm: of the whole gradient, a last resort; learners clip per sample.
        max_skipped: batches (of paths, where these serve several updates) in turn that may be left out.
        begin: the state of an earlier update, to go on from; `steps` are those that come after it.

    An update whose loss or gradient is not finite is left out and counted. In float16 what goes back through the
    network is scaled up; where only the gradient is too large, the scale is lowered instead.

    Ranks begin with rank 0's weights and step on the sum of their losses (`ranks`), so that they stay alike.

    Raises:
        FloatingPointError: too many in turn were not finite; the weights keep their last good values.
    """
    ranks.state()  # before accelerate decides by itself: without CUDA it would take this for the only process
    # everything is where the policy is, and in the policy's own precision, whatever accelerate is set up for
    accelerator = Accelerator(device_placement=False, mixed_precision="no")
    groups, parameters = policy.parameter_groups(), policy.trainable()
    optimizer = accelerator.prepare(
        torch.optim.AdamW([{"params": members} for members in groups.values()], betas=(0.9, 0.99), weight_decay=0.0)
    )
    ema = EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, power=0.75)
    number = skipped = in_turn = 0

    def state() -> dict[str, Tensor]:
        found = {"counts": torch.tensor([number, ema.optimization_step, skipped, in_turn])}
        for i, (p, average) in enumerate(zip(parameters, ema.shadow_params, strict=True)):
            known = optimizer.state.get(p, {})
            found |= {f"weight.{i}": p.detach().clone(), f"average.{i}": average.clone()}
            found |= {f"{name}.{i}": known[name].clone() for name in MOMENTS if known}
        return found

    if begin:
        number, ema.optimization_step, skipped, in_turn = begin["counts"].tolist()
        policy.restore([begin[f"weight.{i}"] for i in range(len(parameters))])
        ema.shadow_params = [begin[f"average.{i}"].to(p.device) for i, p in enumerate(parameters)]
        for i, p in enumerate(parameters):
            if f"step.{i}" in begin:
                step, *moments = (begin[f"{name}.{i}"] for name in MOMENTS)  # AdamW counts on the CPU
                optimizer.state[p] = dict(zip(MOMENTS, (step, *(m.to(p.device) for m in moments)), strict=True))
    if ranks.world_size() > 1:
        policy.restore(ranks.broadcast(lambda: [value.cpu() for value in policy.snapshot()]))
    while number < updates:
        number += 1
        told: list[dict[str, float | Tensor]] = []
        for step in steps:
            accelerator.backward(loss_scale(policy) * step.loss)  # finite or not: to know is to wait
            told.append({"": step.loss.detach(), **step.metrics})  # a learner has no figure without a name
            if step.last:
                break
        else:
            break  # the stream has ended
        summed: Counter[str] = Counter()
        for part in told:
            summed.update({name: float(value) for name, value in part.items()})  # a Counter adds up
        metrics = ranks.all_reduce_metrics(summed)
        loss = metrics.pop("")
        ranks.all_reduce_gradients(parameters)
        ranks.reshard(policy)
        for p in parameters if loss_scale(policy) != 1.0 else ():
            if p.grad is not None:
                p.grad /= loss_scale(policy)
        norm = float(accelerator.clip_grad_norm_(parameters, max_norm))
        if math.isfinite(loss) and math.isfinite(norm):
            i = ema.optimization_step  # updates that were taken
            factor = min(1.0, (i + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * i / updates))
            for kind, group in zip(groups, optimizer.param_groups, strict=True):
                group["lr"] = lr[kind] * factor
            optimizer.step()
            ema.step(parameters)
            in_turn = 0
        elif math.isfinite(loss) and loss_scale(policy) > 1:
            # too large for float16: this update is left out
            policy.prior.loss_scale = max(1.0, loss_scale(policy) / 16)
        else:
            skipped, in_turn = skipped + 1, in_turn + step.whole
            if in_turn > max_skipped:
                what, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
                before = f", as in {in_turn - 1} batches before it" if in_turn > 1 else ""
                raise FloatingPointError(f"the {what} of update {number} is {value}{before}. Lower the learning rate.")
        optimizer.zero_grad()
        yield Update(number, loss, norm, metrics, skipped, state if step.whole else None)
    ema.copy_to(parameters)
