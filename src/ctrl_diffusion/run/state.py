"""Hold where a training stands: its best control, the pace of its stage, and the states from which it can go on."""

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..control.policy import Policy
from ..evaluate.verdict import Climb, Gain
from ..learn.fit import Update, cosine
from ..system import ranks
from ..system.checkpoint import Checkpoints, pack, subset, unpack
from .run import Run

COLLAPSE = 10.0  # nats
STILL = 1e-3  # nats: a smaller gain is none
TRIAL = 3  # probes in which a learner that follows another may show that it does not lose
LAST = 3  # intervals between probes over which J is said to climb
HALVED = 100  # updates after which the rate of a stage that follows its probes is a half, after twice as many a third
DECAYS = 4  # times as many updates come before a rate's decay as in it
NEAR = "the limit of its updates was near"


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
            gain, error = Gain.from_paths(log_w, self.log_w)
            reward, reward_error = Gain.from_paths(rewards, self.rewards)
            loses = reward < -reward_error
            needed = max(error, -reward - reward_error) if loses else -error if "averaged" in record else 0.0
            if not gain > needed:  # a J that is NaN is not better
                return False
        self.record, self.log_w, self.rewards, self.snapshot = record, log_w, rewards, self.policy.snapshot()
        return True

    def divergence(self, record: dict[str, Any]) -> str | None:
        """Return how far a probe's J has fallen if a learner should stop there; None to go on.

        The warm start never counts as diverged: it may pay many nats, which the next learner wins back.
        """
        if not record["stage"].startswith("weighted") and not record["J"] >= self.first - abs(self.first) - COLLAPSE:
            return f"diverged: J fell to {record['J']:.1f} from the {self.first:.1f} training began with"
        return None


@dataclass
class ProbeHistory:
    """Hold the probes of a stage, whose paths share their noise: what a stage gains is a paired difference.

    The patience k stops a stage when the mean of its last k probes is above that of the k before neither in J nor in
    reward (the warm start pays J for reward). For a learner that climbs by g a probe, where the noise of its weights
    adds s to each probe, that mean difference is k g with a standard error of s √(2/k): noise stops it at a probe with
    probability Φ(−k^1.5 g / (√2 s)) at most. At g = s/2 that is 16 % for k = 2, 3 % for k = 3 and 0.2 % for k = 4, the
    default: of ten probes two may stop a stage, which noise then does to one in 240 such learners. A learner that
    stands still is stopped by every second probe, or later if its reward rises. The first probe is made before the
    stage's first update, often of averaged weights, which lack the noise: it is nothing the stage did, and not counted.
    """

    updates: list[int] = field(default_factory=list)
    log_w: list[Tensor] = field(default_factory=list)  # (n,) of each probe
    rewards: list[Tensor] = field(default_factory=list)

    def add(self, update: int, log_w: Tensor, rewards: Tensor) -> None:
        """Append a probe."""
        self.updates.append(update)
        self.log_w.append(log_w)
        self.rewards.append(rewards)

    def standstill(self, patience: int | None) -> str | None:
        """Say that the last probes gained nothing, if so; None while a stage is to go on."""
        k = patience or 0
        if not k or len(self.updates) < 2 * k + 1:
            return None
        for values in (self.log_w, self.rewards):
            gain = float((torch.stack(values[-k:]).mean(0) - torch.stack(values[-2 * k : -k]).mean(0)).mean())
            if gain > STILL:
                return None
        return f"J and reward of the last {k} probes are no higher than of the {k} before"

    def flat(self, patience: int, restarts: bool = False) -> str | None:
        """Say that averaged weights gained nothing over the last `patience` probes, if so; None while they gain.

        A gain in J or in reward (the warm start pays J for reward) is one above its standard error (`Gain.is_clear`).
        The first probe is of what was there before, and is not counted; nor are those up to the last that had fallen,
        where a stage restarts after it.
        """
        fallen = [i for i, fell in enumerate(self.falls, start=1) if restarts and fell]
        if len(self.updates) - max(fallen, default=0) - 1 <= patience:
            return None
        if any(Gain.from_paths(v[-1], v[-1 - patience]).is_clear for v in (self.log_w, self.rewards)):
            return None
        return f"J and reward gained nothing over the last {patience} probes"

    def loss(self) -> str | None:
        """Say that a stage loses what it began with, if its last TRIAL probes are all clearly lower.

        A learner that follows the reward's gradient does not see a choice between modes, and sells what another has
        learned of it; each probe is lower by two standard errors of the paired difference.
        """
        if len(self.log_w) <= TRIAL:
            return None
        for log_w in self.log_w[-TRIAL:]:
            gain, error = Gain.from_paths(log_w, self.log_w[0])
            if gain > -2 * error:
                return None
        return f"J of its last {TRIAL} probes is lower than what it began with"

    @property
    def falls(self) -> list[bool]:
        """Whether J of each probe after the first is lower than the first's by two standard errors."""
        gains = [Gain.from_paths(log_w, self.log_w[0]) for log_w in self.log_w[1:]]
        return [gain < -2 * error for gain, error in gains]

    @property
    def rate_share(self) -> float:
        """What a learning rate is multiplied by: a half for every probe in which J had fallen."""
        return 0.5 ** sum(self.falls)

    def climb(self, until: int | None = None) -> Climb | None:
        """Return what a probe has gained over that of LAST intervals before it; None of a single probe.

        It is the last probe, or the last that was made `until` an update, when its rate had not decayed yet.
        """
        count = sum(until is None or update <= until for update in self.updates)
        if count < 2:
            return None
        last, i = count - 1, max(0, count - 1 - LAST)
        gain = Gain.from_paths(self.log_w[last], self.log_w[i])
        return Climb(*gain, self.updates[last] - self.updates[i], until is not None)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a saved state holds of it, by name."""
        log_w, rewards = ([value.clone() for value in values] for values in (self.log_w, self.rewards))
        names = pack("log_w", log_w) | pack("rewards", rewards)  # copies: the best probe is saved beside them
        return {"updates": torch.tensor(self.updates), **names} if self.updates else {}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "ProbeHistory":
        """Restore it from a saved state; an earlier version's has none."""
        updates = tensors["updates"].tolist() if tensors else []
        return cls(updates, unpack("log_w", tensors), unpack("rewards", tensors))


class Decay(NamedTuple):
    """Say after which update a stage's rate begins to decay to zero, after which the stage ends, and why."""

    begin: int
    end: int
    reason: str

    def share(self, taken: int) -> float:
        """Return what multiplies the rate after so many updates: 1 − √progress (Hägele et al. 2024, 2405.18392)."""
        progress = (taken - self.begin) / (self.end - self.begin)
        return 1 - min(1.0, max(0.0, progress)) ** 0.5


def decay_after(update: int, limit: int, flat: str | None) -> Decay | None:
    """Return the decay to zero that begins after an update; None while the stage is to learn.

    Args:
        update: how many the stage has taken.
        limit: of its updates; the decay ends there at the latest, which takes the last fifth of them.
        flat: why it is to begin, from the probes (`ProbeHistory.flat`); it takes a quarter of the updates so far.
    """
    if flat:
        return Decay(update, min(limit, update + max(1, update // DECAYS)), flat)
    return Decay(update, limit, NEAR) if update >= limit - max(1, limit // (DECAYS + 1)) else None


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
    spare: int = 0  # evaluations of the budget that the last learner left
    history: ProbeHistory = field(default_factory=ProbeHistory)  # of the current stage
    decay: Decay | None = None  # of its rate, once that has begun
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
            training.history = ProbeHistory.from_tensors(subset("history", tensors))
            training.done, training.records = about["done"], about["records"]
            training.spare = about.get("spare", 0)
            training.decay = Decay(*about["decay"]) if about.get("decay") else None
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

    @property
    def climb(self) -> Climb | None:
        """What the probes of the stage gained in the end; where its rate decays, before that, if the limit cut it off.

        As a rate decays to zero the noise of the weights vanishes and J rises, whether more could be learned or not.
        """
        if self.decay is None:
            return self.history.climb()
        return self.history.climb(self.decay.begin) if self.decay.reason == NEAR else None

    def update(self, within: dict[str, Tensor], save: bool = True) -> None:
        """Take the state of the current stage, and save it now or with the next."""
        self.within, best, base = within, self.best, self.best.policy.base
        tensors = {f"within.{name}": value for name, value in within.items()}
        tensors |= pack("best", best.snapshot) | pack("renoising", self.renoising)
        tensors |= {f"history.{name}": value for name, value in self.history.tensors().items()}
        tensors |= {"log_w": best.log_w, "earned": best.rewards} if best.snapshot else {}
        about = {"done": self.done, "spare": self.spare, "records": self.records.copy(), "seconds": self.elapsed}
        about |= {"first": best.first, "record": best.record, "decay": self.decay}
        about["intervals"] = {name: control.interval for name, control in best.policy.controls.items()}
        self.unsaved = tensors, about | {"precision": str(base.precision), "gradient_scale": base.loss_scale}
        if save:
            self.save()

    def finish_stage(self) -> None:
        """Count a stage as finished."""
        self.done, self.history, self.decay, self.within = self.done + 1, ProbeHistory(), None, {}
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


@dataclass
class Pace:
    """Set the rate of a stage by its probes, and say when it ends.

    The rate of a stage that `follows` its probes falls as 1 / (1 + taken / HALVED), by no count of updates, while they
    gain (`ProbeHistory.flat`). Once they do not, or the limit of its updates is near, it decays to zero and the stage
    ends. At a constant rate the noise of the weights holds back what is learned, also of averaged ones, and a plateau
    says only that the rate is too high (docs/why/lab-notes.md). Another stage has a rate that decays as a cosine over
    all of its updates, and ends early where its probes stand still. The first learner goes on from the best control at
    half the rate where J has fallen, one that comes after it ends. Without a patience no probe counts.
    """

    training: TrainingState
    limit: int  # of its updates
    patience: int | None
    follows: bool
    first: bool  # whether it is of the first learner, which may pay J for the reward
    before: int = 0  # updates of the learner in earlier stages
    stopped: str | None = None  # why it ends, if not by its updates
    slowed: float = 1.0  # what the rate is multiplied by where J has fallen

    def __post_init__(self) -> None:
        self.follows = bool(self.follows and self.patience)

    def consider(self, update: int, probed: bool) -> None:
        """Decide after an update how to go on, the same on all ranks; `probed` whether it has a new probe."""
        flat = None
        if probed and self.patience:
            self.stopped, self.slowed, flat = ranks.broadcast(self.read_probes)
        if self.follows and not self.training.decay:
            self.training.decay = decay_after(update, self.limit, flat)

    def read_probes(self) -> tuple[str | None, float, str | None]:
        """Return why the stage ends at once, what slows its rate, and why that begins to decay, or None."""
        history = self.training.history
        still = None if self.follows else history.standstill(self.patience)
        flat = history.flat(self.patience, self.first) if self.follows else None
        if self.first:
            return still, history.rate_share, flat
        return still or history.loss(), 1.0, flat

    @property
    def slows(self) -> bool:
        """Whether J has fallen in the last probe of a stage that then goes on from the best control."""
        return bool(self.patience and self.first and self.training.history.falls[-1:] == [True])

    @property
    def end(self) -> int:
        """The number of the stage's updates, as far as that is known."""
        return self.training.decay.end if self.training.decay else self.limit

    def has_ended(self, update: int) -> bool:
        return bool(self.stopped) or update >= self.end

    def rate(self, taken: int) -> float:
        """Return the share of the peak rate after so many updates, beside the warm-up."""
        if not self.follows:
            return self.slowed * cosine(taken, self.limit)
        falling = HALVED / (HALVED + self.before + taken)
        return self.slowed * falling * (self.training.decay.share(taken) if self.training.decay else 1.0)
