"""The only training loop: it steps on a learner's losses, averages weights and yields what happened.

Embedding and adapter have separate learning rates under one warm-up and cosine decay: parameter noise is visible as KL.
At the end the averaged weights take the place of the last ones.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from .control import Policy
from .learn import Step


@dataclass
class Update:
    """What one update did: its number from 1, the loss in nats, the gradient's norm, the learner's figures."""

    number: int
    loss: float
    gradient_norm: float
    metrics: dict[str, float]


def fit(
    policy: Policy,
    steps: Iterator[Step],
    updates: int,
    lr: dict[str, float],
    ema_decay: float = 0.995,
    warmup: int = 20,
    max_norm: float = 100.0,
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

    In float16 what goes back through the network is scaled up; an update too large for that is left out, and the scale
    lowered.

    Raises:
        FloatingPointError: a loss or gradient that is not finite; the weights keep their last good values.
    """
    accelerator = Accelerator(device_placement=False)  # everything is where the policy is
    groups, parameters = policy.parameter_groups(), policy.trained()
    optimizer = torch.optim.AdamW(
        [{"params": members, "lr": lr[kind]} for kind, members in groups.items()], betas=(0.9, 0.99), weight_decay=0.0
    )

    def factor(i: int) -> float:
        return min(1.0, (i + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * i / updates))

    optimizer, decay = accelerator.prepare(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor))
    ema = EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, power=0.75)
    for number in range(1, updates + 1):
        loss, metrics = 0.0, Counter()
        for step in steps:
            loss += float(step.loss.detach())
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of update {number} is {loss}. Lower the learning rate.")
            accelerator.backward(policy.gradient_scale * step.loss)
            metrics.update(step.metrics)  # a Counter adds up
            if step.last:
                break
        else:
            break  # the stream has ended
        for p in parameters if policy.gradient_scale != 1.0 else ():
            if p.grad is not None:
                p.grad /= policy.gradient_scale
        norm = float(accelerator.clip_grad_norm_(parameters, max_norm))
        if math.isfinite(norm):
            optimizer.step()
            decay.step()
            ema.step(parameters)
        elif policy.gradient_scale > 1:
            policy.lower_scale()  # too large for float16: this update is left out
        else:
            raise FloatingPointError(f"the gradient of update {number} is {norm}. Lower the learning rate.")
        optimizer.zero_grad()
        yield Update(number, loss, norm, dict(metrics))
    ema.copy_to(parameters)
