"""How far a LoRA goes, against closed forms, against nothing, and against a control of ours in a file."""

import math
from types import SimpleNamespace

import pytest
import torch
from pipelines import saved
from torch import nn

from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.chain.transition import step_coefficients
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.exact.lattice import LatticeChain
from ctrl_diffusion.exact.task import RADIUS, Task
from ctrl_diffusion.prior.network import NetworkDenoiser
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.source import DIGITS
from ctrl_diffusion.run.adapters.aim import Aim
from ctrl_diffusion.run.adapters.certify import HALVINGS, MOST_STRENGTH, Base, Rival, best_score, certify_lora, measure
from ctrl_diffusion.run.adapters.policy import AdaptedDenoiser
from ctrl_diffusion.run.adapters.read import Adapter, read_adapter
from ctrl_diffusion.run.programs.files import write_files

ON = Conditions({}, {"slope": 1}, names={"slope": ("high",)})
W0 = torch.tensor([[0.5, 0.1], [-0.2, 0.3]])
W1 = torch.tensor([[0.3, -0.2], [0.1, 0.4]])
B1 = torch.tensor([0.2, -0.1])
SLOPE = torch.tensor([0.8, -0.5], dtype=torch.float64)
SCHEDULES = {"diffusion": Cosine(), "flow": RectifiedFlow()}


class Linear(nn.Module):
    """A network that is one linear layer on two pixels."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        with torch.no_grad():
            self.linear.weight.copy_(W0)
            self.linear.bias.zero_()


def linear_prior(schedule):
    network = Linear()

    def call(x_t, timestep):
        return network.linear(x_t.flatten(1)).view_as(x_t)

    return Prior(NetworkDenoiser(network, call, schedule, "sample", (1, 1, 2)), None, {})


LORA = Adapter("lora", {"linear": W1}, {"linear": B1}, (2,), 6)


class Chain:
    """Mean and covariance of every state of a linear chain, and the KL of its steps, in closed form; float64."""

    def __init__(self, schedule, times, delta, shift):
        prior, delta, shift = W0.double(), delta.double(), shift.double()
        mean, cov = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        self.kl = []
        for t, s in zip(times[:-1], times[1:], strict=True):
            a, b, std = map(float, step_coefficients(schedule, t, s, 1.0))
            square = (delta @ mean + shift).square().sum() + (delta @ cov @ delta.mT).trace()  # E‖ΔW x + Δb‖²
            self.kl.append(float(0.5 * (a / std) ** 2 * square))
            matrix = a * (prior + delta) + b * torch.eye(2)
            mean, cov = matrix @ mean + a * shift, matrix @ cov @ matrix.mT + std**2 * torch.eye(2)
        self.mean, self.cov = prior @ mean, prior @ cov @ prior.mT  # read out by the prior's denoiser


class Slope:
    """A rating that is linear in the pixels: its tilt of a Gaussian is one."""

    def log_prob(self, x):
        return (x.flatten(1).double() @ SLOPE)[:, None].float()


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_linear_lora_goes_as_far_as_its_closed_form_says(kind, strength):
    """KL of every step; J, log Z and gap against a linear rating; and the most that this KL can buy."""
    prior = linear_prior(SCHEDULES[kind])
    times = prior.denoiser.times(6, 0.2)
    base = Base(prior, times, ON, 20000, 0)
    aim = Aim("slope", "high", 0.7, Slope(), False)
    figures = certify_lora(base, AdaptedDenoiser(prior.denoiser, LORA, strength), aim)
    exact = Chain(SCHEDULES[kind], times, strength * W1, strength * B1)
    before = Chain(SCHEDULES[kind], times, torch.zeros(2, 2), torch.zeros(2))
    # twenty figures of independent noise in all: four standard errors and half
    assert len(figures["kl_per_step"]) == 6
    for row, kl in zip(figures["kl_per_step"], exact.kl, strict=True):
        assert abs(row["kl_nats"] - kl) < 4.5 * row["kl_stderr"]
        assert row["kl_stderr"] < 0.03 * kl  # 20,000 paths, of a spread of a few times the mean
    assert abs(figures["kl_nats"] - sum(exact.kl)) < 4.5 * figures["kl_stderr"]
    mean, spread = float(exact.mean @ SLOPE), float(before.cov @ SLOPE @ SLOPE)
    assert abs(figures["score"] - mean) < 4.5 * figures["score_stderr"]
    certificate = figures["certificate"]
    j, log_z = 0.7 * mean - sum(exact.kl), 0.7 * float(before.mean @ SLOPE) + 0.5 * 0.7**2 * spread
    assert abs(certificate["objective_nats"] - j) < 4.5 * certificate["objective_stderr"]
    assert abs(certificate["log_z_nats"] - log_z) < 4.5 * certificate["log_z_stderr"]
    gap = certificate["gap_nats"]
    assert gap == pytest.approx(certificate["log_z_nats"] - certificate["objective_nats"], abs=1e-9)
    if sum(exact.kl) < 3:
        # of a Gaussian with spread s² the tilt of KL k has mean √(2k) s above; 20,000 samples show few nats of it
        most = float(before.mean @ SLOPE) + math.sqrt(2 * figures["kl_nats"] * spread)
        assert figures["best_score"] is None or figures["best_score"] == pytest.approx(most, rel=0.05)


class Bent(NetworkDenoiser):
    """The testbed's mixture with a linear layer of zeros added to its x̂: a LoRA of that layer bends it."""

    def __init__(self, mixture):
        super().__init__(Linear(), None, mixture.schedule, "sample", mixture.shape)
        torch.nn.init.zeros_(self.network.linear.weight)
        self.mixture = mixture

    def forward(self, x_t, t, c=None):
        linear = self.network.linear
        return self.mixture(x_t, t, c) + nn.functional.linear(x_t, linear.weight.to(x_t), linear.bias.to(x_t))


@pytest.mark.parametrize("schedule", ["vp", "flow"])
def test_on_the_lattice_a_known_perturbation_has_its_kl(schedule):
    """On a prior that is not Gaussian the KL of every step is a sum over a lattice, without samples."""
    task = Task(schedule, "logistic", steps=8)
    lora = Adapter("lora", {"linear": 0.3 * W1}, {"linear": B1}, (2,), 6)
    exact, sampled = (Bent(task.prior(dtype)) for dtype in (torch.float64, torch.float32))
    cond = {"c": torch.tensor([1])}
    lattice = LatticeChain(exact, task.times, RADIUS, task.spread, cond=cond)
    steps = list(lattice.steps(AdaptedDenoiser(exact, lora)))
    kl = lattice.outcome(steps, torch.zeros(len(lattice.x_0), dtype=torch.float64)).kl_steps
    conditions = Conditions(cond, {"slope": 1}, names={"slope": ("high",)})
    base = Base(Prior(sampled, None, {}), task.times, conditions, 20_000, 0)
    figures = certify_lora(base, AdaptedDenoiser(sampled, lora))
    assert float(kl.sum()) > 0.1
    for row, expected in zip(figures["kl_per_step"], kl.tolist(), strict=True):
        # sixteen figures in all: four standard errors and half
        assert abs(row["kl_nats"] - expected) < 4.5 * row["kl_stderr"]
        assert row["kl_stderr"] < 0.05 * expected  # 20,000 paths, of a spread of a few times the mean


@pytest.mark.parametrize("kl", [0.05, 0.5, 1.5, 9.0])
def test_the_most_that_a_kl_buys_is_the_tilts(kl):
    """√(2 KL) of a standard normal rating; unknown where the samples do not reach."""
    table = torch.randn(1, 200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = best_score(table, kl)
    if kl > math.log(200_000 / 30):
        assert found is None
    else:
        # the tilt has 200,000 exp(−2 KL) effective samples of spread 1: below 0.01 at all of these, three errors
        assert found == pytest.approx(math.sqrt(2 * kl), abs=0.03)


def test_a_lora_of_zeros_goes_nowhere_in_any_step():
    """Exactly: not a rounding error at any step of any path."""
    prior = Prior.from_pretrained(DIGITS)
    layers = [name for name, _ in prior.denoiser.network.named_modules() if name.endswith(("to_q", "linear_2"))]
    shapes = {name: prior.denoiser.network.get_submodule(name).weight.shape for name in layers}
    zeros = Adapter("zeros", {name: torch.zeros(shape) for name, shape in shapes.items()}, {}, (2,), 0)
    conditions = Conditions({"c": torch.tensor([3, 5])}, {"lora": 1}, names={"lora": ("on",), "c": ("3", "5")})
    base = Base(prior, prior.denoiser.times(4, 0.05), conditions, 8, 0)
    found = measure(base, AdaptedDenoiser(prior.denoiser, zeros), None, "zeros")
    assert len(layers) > 2
    assert torch.equal(found.kl, torch.zeros(8, 4))
    assert torch.equal(found.log_ratio, torch.zeros(8))
    figures = certify_lora(base, AdaptedDenoiser(prior.denoiser, zeros))
    assert figures["kl_nats"] == figures["kl_stderr"] == 0.0
    assert [row["kl_nats"] for row in figures["kl_per_step"]] == [0.0] * 4
    assert [row["name"] for row in figures["kl_per_prompt"]] == ["c = 3", "c = 5"]


@pytest.mark.parametrize("program", ["diffusers", "comfyui"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_our_own_file_goes_as_far_as_our_control(tmp_path, program, guidance):
    """On the same noise, path by path: the file's certificate is the control's."""
    pipeline = saved("SD 1", tmp_path / "prior")
    prior = Prior.from_pipeline(pipeline, "StableDiffusionPipeline").with_prompts(["a seven", "two"], guidance)
    control = LoRAControl("dark", ("no", "yes"), prior.denoiser, rank=2)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameters in control.parameter_groups().values():
            for p in parameters:
                p += 0.1 * torch.randn(p.shape, generator=draw)
        control.table.weight[-1] = 0
    network = prior.denoiser.network
    (files,) = write_files(
        tmp_path, [control], network, prior.denoiser.schedule, "StableDiffusionPipeline", 1.0, [program]
    )
    folder = tmp_path / ("diffusers" if program == "diffusers" else "lora")
    adapter = read_adapter(folder / f"{files.files['yes']}.safetensors", network, "StableDiffusionPipeline")
    names = {"lora": ("on",), "c": ("a seven", "two")}
    base = Base(prior, prior.denoiser.times(3, 0.1), Conditions({"c": torch.arange(2)}, {"lora": 1}, names=names), 8, 0)
    ours = measure(base, Policy(prior.denoiser, control), None, "paths", labels={"dark": 1}, strength=1.0)
    theirs = measure(base, AdaptedDenoiser(prior.denoiser, adapter), None, "paths")
    assert (ours.kl > 1e-2).all()
    # float32 sums in another order; guidance and 1/std of the last steps enlarge them
    torch.testing.assert_close(theirs.kl, ours.kl, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(theirs.log_ratio, ours.log_ratio, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(theirs.x_0, ours.x_0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kl", "strength", "reached"), [(0.3, 0.3, True), (2.5, 2.5, True), (9.0, MOST_STRENGTH, False)]
)
def test_the_strength_of_a_kl_is_searched_under_one_bar(monkeypatch, kl, strength, reached):
    """Where the KL is the strength itself; a bracket of at most 3 is halved."""
    bars = []

    def phase(what, total):
        bars.append([total, 0])
        return lambda n=1, note="": bars[-1].__setitem__(1, bars[-1][1] + n)

    def linear(self, base, aim, w, purpose, phase, repeats):
        phase(purpose, 3 * repeats)(3 * repeats)
        return SimpleNamespace(kl=torch.full((5, 2), w / 2))

    monkeypatch.setattr(Rival, "measure", linear)
    base = SimpleNamespace(repeats=16, conditions=SimpleNamespace(pairs=3))
    found = Rival(None, 0).strength_at(base, kl, phase)
    assert found == (pytest.approx(strength, abs=3 / 2 ** (HALVINGS + 1)), reached)
    ((total, done),) = bars
    assert total == done
