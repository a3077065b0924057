"""Hold where a training stands: its best control, and the states from which it can go on."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..control.policy import Policy
from ..learn.fit import Update
from ..system import ranks
from ..system.checkpoint import Checkpoints, pack, subset, unpack
from .run import Run

COLLAPSE = 10.0  # nats


@dataclass
class BestControl:
    """Keep the best control so far, by J on the paths of the probes, which share their noise.

    The one-standard-error rule (Breiman et al. 1984) on paired differences: averaged weights may have a J lower by less
    than one standard error. A control that earns less reward, by more than the error of that loss, needs a J higher by
    its own error and by no less than the loss minus its error: J alone would sell most of a control's reward for as
    much KL.
    """

    policy: Policy
    first: float | None = None  # J of the first probe
    record: dict[str, Any] = field(default_factory=dict)  # of the best probe, for the log
    log_w: Tensor | None = None  # (n,), of its paths
    rewards: Tensor | None = None  # (n,)
    snapshot: list[Tensor] = field(default_factory=list)  # of its weights

    def consider(self, record: dict[str, Any], log_w: Tensor, rewards: Tensor) -> bool:
        """Keep the policy if its probe is the best so far; return whether it is. log w and rewards (n,) are its own."""
        if self.first is None:
            self.first = record["J"]
        else:
            gain, error = paired(log_w - self.log_w)
            reward, reward_error = paired(rewards - self.rewards)
            loses = reward < -reward_error
            needed = max(error, -reward - reward_error) if loses else -error if "averaged" in record else 0.0
            if not gain > needed:  # a J that is NaN is not better
                return False
        self.record, self.log_w, self.rewards, self.snapshot = record, log_w, rewards, self.policy.snapshot()
        return True

    def reason_to_stop(self, record: dict[str, Any], idle: int, patience: int | None) -> str | None:
        """Return why a learner should stop after a probe, `idle` probes in turn not being the best; None to go on.

        The warm start never counts as diverged: it may pay many nats, which the next learner wins back.
        """
        if record["stage"] != "weighted" and not record["J"] >= self.first - abs(self.first) - COLLAPSE:
            return f"diverged: J fell to {record['J']:.1f} from the {self.first:.1f} training began with"
        return f"no better control in {idle} probes" if patience and idle >= patience else None


def paired(difference: Tensor) -> tuple[float, float]:
    """Return the mean of differences (n,) and its standard error."""
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


@dataclass
class TrainingState:
    """Hold where a training stands, and save what it takes to go on from there as if it had never stopped.

    States are taken only where no paths of a learner are left to use. Its next paths come from the stage's generator,
    which is saved with the learner's own tensors, the state of `fit` (weights, their averages, AdamW's moments, the
    position in the learning rate's schedule) and the best control. Everything else is computed again to the same
    values: p̂ is in the run folder; untrained controls, prior samples, probes and certificates draw from streams of the
    seed and their purpose alone. Writing takes time, so ten states are taken for each that is written.
    """

    best: BestControl
    checkpoints: Checkpoints | None = None  # None saves none
    done: int = 0  # finished stages
    records: list[dict[str, Any]] = field(default_factory=list)  # of the log
    idle: int = 0  # probes in turn that were not the best
    seconds: float = 0.0  # of training before this process
    renoising: list[Tensor] = field(default_factory=list)  # the weights that learned what re-noising alone does
    within: dict[str, Tensor] = field(default_factory=dict)  # the last state of the current stage; empty at its start
    unsaved: tuple[dict[str, Tensor], dict[str, Any]] | None = None  # the newest state, until it is written
    started: float = field(default_factory=time.perf_counter)  # when this process began to train
    taken: int = 0  # the update of the last state that was taken in this stage, and of the last written
    saved: int = 0
    due: bool = False  # whether the next state is to be written

    @classmethod
    def from_checkpoints(cls, run: Run, checkpoints: Checkpoints) -> "TrainingState":
        """Read the newest state, the same on every rank; without one return the beginning."""
        training = cls(BestControl(run.policy), checkpoints)
        if state := ranks.broadcast(checkpoints.newest):
            tensors, about = state
            best, device = training.best, run.policy.device
            best.first, best.record = about["first"], about["record"]
            best.log_w, best.rewards = tensors.get("log_w"), tensors.get("earned")
            best.snapshot = [value.to(device) for value in unpack("best", tensors)]
            training.renoising = [value.to(device) for value in unpack("renoising", tensors)]
            training.within = subset("within", tensors)
            training.done, training.records, training.idle = about["done"], about["records"], about["idle"]
            training.seconds = about["seconds"]
            for name, interval in about.get("intervals", {}).items():  # refined since training began
                run.policy.controls[name].interval = interval
            if about["precision"] == str(run.policy.base.precision):  # another precision finds its own scale
                run.policy.base.loss_scale = about["gradient_scale"]
        return training

    @property
    def elapsed(self) -> float:
        """Seconds of training so far."""
        return self.seconds + time.perf_counter() - self.started

    def update(self, within: dict[str, Tensor], save: bool = True) -> None:
        """Take the state of the current stage, and save it now or with the next."""
        self.within, best, base = within, self.best, self.best.policy.base
        tensors = {f"within.{name}": value for name, value in within.items()}
        tensors |= pack("best", best.snapshot) | pack("renoising", self.renoising)
        tensors |= {"log_w": best.log_w, "earned": best.rewards} if best.snapshot else {}
        about = {"done": self.done, "idle": self.idle, "records": self.records.copy(), "seconds": self.elapsed}
        about |= {"first": best.first, "record": best.record}
        about["intervals"] = {name: control.interval for name, control in best.policy.controls.items()}
        self.unsaved = tensors, about | {"precision": str(base.precision), "gradient_scale": base.loss_scale}
        if save:
            self.save()

    def finish_stage(self) -> None:
        """Count a stage as finished."""
        self.done, self.idle, self.within = self.done + 1, 0, {}
        if self.checkpoints:
            self.update({})

    def save(self) -> None:
        """Write the newest state, if it is not written yet; of several ranks the main one does."""
        if self.unsaved and ranks.is_main():
            self.checkpoints.write(*self.unsaved)
            self.unsaved = None

    def after(
        self, update: Update, probed: bool, every: int, generator: torch.Generator, carried: list[Tensor]
    ) -> None:
        """Take a state of a stage if it is time and the learner has no paths left to use; save one of `every` updates.

        The state has the stage's generator, and the learner's own tensors (`carried`).
        """
        self.due = self.due or probed or update.number - self.saved >= every
        if not update.state or not self.checkpoints:
            return
        if self.due or update.number - self.taken >= every // 10:
            within = {f"fit.{name}": value for name, value in update.state().items()}
            within |= {"generator": generator.get_state(), **pack("carried", ranks.gather_lists(carried))}
            self.update(within, self.due)
            self.taken, self.saved = update.number, update.number if self.due else self.saved
            self.due = False
