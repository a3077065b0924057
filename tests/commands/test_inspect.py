import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine
from ctrl_diffusion.commands.jobs.inspect import calls, evaluations, kept_bytes
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.prior.network import as_denoiser
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.text.prompted import TextFamily
from ctrl_diffusion.reward.reward import Reward
from ctrl_diffusion.run import stages
from ctrl_diffusion.run.config import Config


class Ink:
    """p(y | x) of two classes, by the mean of the images."""

    def log_prob(self, x):
        mean = x.flatten(1).mean(1, keepdim=True)
        return torch.cat([mean, -mean], dim=1).log_softmax(1)


class Tiny:
    """What `learner_of` reads of a run."""

    def __init__(self, config, prior):
        self.config, self.times = config, prior.denoiser.times(config.steps, 0.1)
        self.shape = prior.denoiser.shape
        self.training_conditions = Conditions({"c": torch.arange(10)}, {"y": 2})


@pytest.mark.parametrize("name", ["offload", "micro_batch"])
def test_what_is_said_of_memory_reaches_the_learners(digits, name):
    given = {"offload": True, "micro_batch": 3}
    config = Config.from_values({"prior": "-", "control": "-", "data": "-", **given})
    for learner in ("adjoint", "ppo"):
        made = stages.learner_of(Tiny(config, digits), learner, None)
        assert getattr(made, {"micro_batch": "micro"}.get(name, name)) == given[name]


def test_what_two_rows_tell_of_the_memory_holds_for_many(digits):
    """What is kept is a part that all rows share and as much again for every row."""
    policy = Policy(digits.denoiser, LoRAControl("probe", ("no", "yes"), digits.denoiser, rank=4))
    one, two, many = (kept_bytes(policy, digits, rows) for rows in (1, 2, 16))
    assert many == pytest.approx(one + 15 * (two - one), rel=0.01)
    changed = sum(m.get_base_layer().weight.nbytes for m in policy.controls["probe"]._layers)
    # every row shares the weights that the control changes, and little else
    assert 2 * one - two == pytest.approx(changed, rel=0.1)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("learner", ["weighted", "adjoint", "backprop", "ppo"])
def test_the_evaluations_said_are_those_made(digits, monkeypatch, learner, lean):
    """All of them, but for the read-outs at the end of a chain, which are no steps."""
    learners = {name: {"batch": 4, "updates": 8} for name in ("weighted", "adjoint", "backprop", "ppo")}
    learners["adjoint"] |= {"lean": lean, "reuse": 4, "regressed": 5}
    learners["ppo"] |= {"reuse": 4, "surrogates": 5}
    config = Config.from_values({"prior": "-", "control": "-", "data": "-", "steps": 8, **learners})
    policy = Policy(digits.denoiser, LoRAControl("ink", "01", digits.denoiser, rank=4))
    rows = 0

    def count(module, args, kwargs):
        nonlocal rows
        rows += len(args[0])

    conditions = Conditions({"c": torch.tensor([3])}, {"ink": 2})
    monkeypatch.setattr(stages, "prior_samples", lambda tiny, conditions, n, **_: torch.zeros(n, *tiny.shape))
    made_by = stages.learner_of(Tiny(config, digits), learner, None)
    if learner == "weighted":  # what re-noising alone does is taken off
        made_by.learned_renoising = policy.snapshot()
    steps = made_by(policy, Reward({"ink": Ink()}), conditions, torch.Generator().manual_seed(0))
    handle = digits.denoiser.network.register_forward_pre_hook(count, with_kwargs=True)
    for _ in range(8):
        next(steps).loss.backward()
    handle.remove()
    # of four samples and eight updates; a rollout reads x_0 out, and the reward's gradient does so again
    made, readouts = rows / (4 * 8), 0.0 if learner == "weighted" else 2.0
    assert sum(evaluations(config)[learner]) <= made <= sum(evaluations(config)[learner]) + readouts


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("default", [1.0, 7.5])
@pytest.mark.parametrize("guidance", [None, 1.0, 4.0])
def test_the_calls_said_are_those_of_the_guidance_there_is(default, guidance, distilled):
    """Counted in the rows the network is called with; without prompts the pipeline's default speaks."""
    rows = 0

    def call(x_t, timestep, **inputs):
        nonlocal rows
        rows += len(x_t)
        return x_t

    def encode(prompts, negative):
        return {"prompt": torch.zeros(len(prompts), 2)}, {"prompt": torch.zeros(1, 2)}

    denoiser = as_denoiser(call, Cosine(), (1, 4, 4))
    prior = Prior(denoiser, None, {}, text=TextFamily(encode, call, default, distilled))
    assert calls(prior) == (2 if default != 1 and not distilled else 1)
    prompted = prior.with_prompts(["a seven", "two"], guidance)
    prompted.denoiser(torch.zeros(3, 1, 4, 4), 0.5, c=torch.tensor([0, 1, 1]))
    assert calls(prompted) == rows / 3
