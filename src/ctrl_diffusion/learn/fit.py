"""Train on a learner's losses: the only training loop.

It averages weights and yields what each update did. Embedding and adapter have separate learning rates under one
warm-up and one decay: parameter noise is visible as KL. At the end the averaged weights replace the last ones.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from ..chain.denoise import loss_scale
from ..control.policy import Policy
from ..system import ranks
from .step import Step

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter


def cosine(taken: int, updates: int) -> float:
    """Return the share of the peak learning rate after `taken` of so many updates, which falls as a cosine to zero."""
    return 0.5 * (1 + math.cos(math.pi * taken / updates))


@dataclass
class Update:
    """Say what one update did."""

    number: int  # from 1
    loss: float  # in nats
    gradient_norm: float
    metrics: dict[str, float]  # the learner's
    skipped: int = 0  # updates so far that were left out because they were not finite
    # called before the next update, returns what `fit` continues from; None while the learner has paths left to use
    state: Callable[[], dict[str, Tensor]] | None = None
    weights: "Weights | None" = None  # to look at the averaged ones, or to go on from others, before the next update


def fit(
    policy: Policy, steps: Iterator[Step], updates: int, lr: dict[str, float], ema_decay: float = 0.995,
    warmup: int = 20, max_norm: float = 100.0, max_skipped: int = 5, begin: dict[str, Tensor] | None = None,
    enough: Callable[[], bool] = lambda: False, rate: Callable[[int], float] | None = None,
) -> Iterator[Update]:  # fmt: skip
    """Train the policy's controls on a learner's stream of losses; the caller logs and stops.

    Args:
        policy: its control parameters are trained in place.
        steps, updates: the learner's stream, and how many updates to take from it, at most.
        lr: peak learning rate per parameter group ("embedding", "adapter").
        ema_decay: of the averaged weights that are kept at the end.
        warmup: updates of linear warm-up.
        max_norm: of the whole gradient, a last resort; learners clip per sample.
        max_skipped: batches (of paths, where these serve several updates) in a row that may be left out.
        begin: the state of an earlier update to continue from; `steps` are those that come after it.
        enough: asked before every update whether to end here, with the averaged weights.
        rate: returns what the learning rates are multiplied by after so many updates were taken, beside the warm-up;
            None lets them decay as a `cosine` over all updates.

    An update whose loss or gradient is not finite is left out and counted. In float16 the loss is scaled up; where only
    the gradient is too large, the scale is lowered instead. Ranks begin with rank 0's weights and step on the sum of
    their losses (`ranks`), so that they stay alike.

    Raises:
        FloatingPointError: too many in a row were not finite; the weights keep their last good values.
    """
    ranks.state()  # before accelerate decides by itself: without CUDA it would take this for the only process
    # everything is where the policy is, and in the policy's own precision, whatever accelerate is set up for
    accelerator = Accelerator(device_placement=False, mixed_precision="no")
    weights, number, skipped, in_a_row = Weights(policy, accelerator, ema_decay), 0, 0, 0
    if begin:
        number, weights.ema.optimization_step, skipped, in_a_row = begin["counts"].tolist()
        weights.load(begin)
    if ranks.world_size() > 1:
        policy.restore(ranks.broadcast(lambda: [value.cpu() for value in policy.snapshot()]))
    while number < updates and not enough() and (gradient := accumulate(policy, steps, accelerator)):
        number += 1
        loss, metrics, whole = gradient
        norm = float(accelerator.clip_grad_norm_(weights.parameters, max_norm))
        if math.isfinite(loss) and math.isfinite(norm):
            i = weights.ema.optimization_step  # updates that were taken
            factor = (rate(i) if rate else cosine(i, updates)) * min(1.0, (i + 1) / warmup)
            for group in weights.optimizer.param_groups:
                group["lr"] = lr[group["name"]] * factor
            weights.optimizer.step()
            weights.ema.step(weights.parameters)
            in_a_row = 0
        elif math.isfinite(loss) and loss_scale(policy) > 1:  # too large for float16: this update is left out
            policy.prior.loss_scale = max(1.0, loss_scale(policy) / 16)
        else:
            skipped, in_a_row = skipped + 1, in_a_row + whole
            if in_a_row > max_skipped:
                name, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
                before = f", as in {in_a_row - 1} batches before it" if in_a_row > 1 else ""
                raise FloatingPointError(f"the {name} of update {number} is {value}{before}. Lower the learning rate.")
        weights.optimizer.zero_grad()
        counts = [number, weights.ema.optimization_step, skipped, in_a_row]
        state = partial(weights.state, counts) if whole else None
        yield Update(number, loss, norm, metrics, skipped, state, weights)
    weights.ema.copy_to(weights.parameters)


class Weights:
    """Hold the trained weights with their averages and AdamW's moments."""

    def __init__(self, policy: Policy, accelerator: Accelerator, ema_decay: float) -> None:
        self.policy, self.parameters = policy, policy.trainable()
        groups = [{"name": name, "params": group} for name, group in policy.parameter_groups().items()]
        self.optimizer = accelerator.prepare(torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0))
        self.ema = EMAModel(self.parameters, decay=ema_decay, use_ema_warmup=True, power=0.75)

    def state(self, counts: list[int]) -> dict[str, Tensor]:
        """Copy everything by name, with counts."""
        tensors = {"counts": torch.tensor(counts)}
        for i, (p, average) in enumerate(zip(self.parameters, self.ema.shadow_params, strict=True)):
            moments = self.optimizer.state.get(p, {})
            tensors |= {f"weight.{i}": p.detach().clone(), f"average.{i}": average.clone()}
            tensors |= {f"{name}.{i}": moments[name].clone() for name in MOMENTS if moments}
        return tensors

    def average(self) -> list[Tensor]:
        """Copy the averaged weights."""
        return [value.clone() for value in self.ema.shadow_params]

    def restart(self, snapshot: list[Tensor]) -> None:
        """Go on from a snapshot, which is the average, too; AdamW keeps its moments."""
        self.policy.restore(snapshot)
        self.ema.shadow_params = self.policy.snapshot()

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore everything from a state."""
        self.policy.restore([state[f"weight.{i}"] for i in range(len(self.parameters))])
        self.ema.shadow_params = [state[f"average.{i}"].to(p.device) for i, p in enumerate(self.parameters)]
        for i, p in enumerate(self.parameters):
            if f"step.{i}" in state:
                step, *moments = (state[f"{name}.{i}"] for name in MOMENTS)  # AdamW counts on the CPU
                self.optimizer.state[p] = dict(zip(MOMENTS, (step, *(m.to(p.device) for m in moments)), strict=True))


def accumulate(
    policy: Policy, steps: Iterator[Step], accelerator: Accelerator
) -> tuple[float, dict[str, float], bool] | None:
    """Add up the gradients of an update, over parts and ranks; return its loss, metrics and `whole` as in `Step`.

    None if the stream has ended.
    """
    parts: list[dict[str, float | Tensor]] = []
    for step in steps:
        if step.loss.requires_grad:  # there may be rows alone on which no trained control speaks
            accelerator.backward(loss_scale(policy) * step.loss)  # finite or not: a check would wait for the device
        parts.append({"": step.loss.detach(), **step.metrics})  # no metric of a learner has an empty name
        if step.last:
            break
    else:
        return None
    sums: Counter[str] = Counter()
    for part in parts:
        sums.update({name: float(value) for name, value in part.items()})  # a Counter adds up
    metrics, parameters = ranks.all_reduce_metrics(dict(sums)), policy.trainable()
    ranks.all_reduce_gradients(parameters)
    ranks.reshard(policy)
    if loss_scale(policy) != 1.0:
        for p in parameters:
            if p.grad is not None:
                p.grad /= loss_scale(policy)
    return metrics.pop(""), metrics, step.whole
