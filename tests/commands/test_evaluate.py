"""A run measured again."""

import json
from dataclasses import replace

import pytest
import torch

from ctrl_diffusion.run.measure import evaluate, remeasured
from ctrl_diffusion.run.programs.chains import GridSchedule
from ctrl_diffusion.run.programs.evaluate import ProgramChain, ProgramRun, evaluate_as, figures_of
from ctrl_diffusion.run.run import Run
from ctrl_diffusion.system.progress import silent
from tests.commands.families import run_on

pytestmark = pytest.mark.filterwarnings("ignore:log Z", "ignore:samples leave the region")


def evaluated(ctrl_here, run, out, *options):
    done = ctrl_here("evaluate", run, "-n", 80, "--out", out, "--quiet", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_evaluate(ctrl_here, quick_run, tmp_path):
    """By noise of its own, the same each time; by the run's seed, with the samples the run was measured with."""
    metrics = json.loads((quick_run / "metrics.json").read_text())
    figures = evaluated(ctrl_here, quick_run, tmp_path / "a.json")
    assert figures["ctrl"]["samples"] == 80
    assert {len(column) for column in figures["certificate"]["pairs"].values()} == {40}
    assert figures["seed"] == 1
    assert figures["target"] != metrics["target"]
    again = evaluated(ctrl_here, quick_run, tmp_path / "b.json", "--seed", 1)
    assert again == figures
    # the prior's samples depend on the seed alone, not on n
    of_run = evaluated(ctrl_here, quick_run, tmp_path / "c.json", "--seed", 0)
    assert (of_run["seed"], of_run["target"]) == (0, metrics["target"])


def test_more_samples_of_the_prior_certify_more(ctrl_here, quick_run, tmp_path):
    few, more = (evaluated(ctrl_here, quick_run, tmp_path / f"{n}.json", "--prior-samples", n) for n in (20, 300))
    assert (few["prior_samples"], more["prior_samples"]) == (20, 300)
    certified = [figures["certificate"]["certified_pairs"] for figures in (few, more)]
    assert certified[0] < certified[1] == more["certificate"]["of_pairs"] - len(more["certificate"]["uncertified"])
    assert few["certificate"]["uncertified"][0].startswith("c = 0, ink = ")


def test_fewer_samples_than_classes_are_refused(quick_run):
    with pytest.raises(ValueError, match=r"--prior-samples 3: give 4 at least"):
        remeasured(Run.load(quick_run), prior_samples=3)


@pytest.fixture
def strong(finished, tmp_path):
    """A run whose control does something."""
    return run_on("SD 1", finished, tmp_path)[0]


def as_chain(run, **options):
    chain = ProgramChain(**{"program": "a1111", "steps": 5, **options})
    return evaluate_as(chain.of(remeasured(Run.load(run))), chain, 16)


def test_as_another_program(ctrl_here, strong, tmp_path):
    """By the command: its chain is named, and the same options give the same figures."""
    options = ("-n", 16, "--as", "a1111", "--sampler", "euler_a", "--steps", 5, "--strength", 0.8, "--quiet")
    first, again = (tmp_path / f"{name}.json" for name in "ab")
    for out in (first, again):
        done = ctrl_here("evaluate", strong, *options, "--out", out)
        assert done.returncode == 0, done.stderr
    assert first.read_bytes() == again.read_bytes()
    figures = json.loads(first.read_text())
    chain = {"program": "a1111", "sampler": "euler_a", "steps": 5, "strength": 0.8}
    assert {name: figures["as"][name] for name in chain} == chain
    assert figures["ctrl"]["kl_nats"] > 0
    assert figures["own_last_step"]["rms"] > 0
    assert "every_step" not in figures


def test_at_strength_zero_it_is_the_prior(strong):
    figures = as_chain(strong, strength=0.0)
    assert figures["ctrl"]["kl_nats"] == 0
    assert figures["own_last_step"]["rms"] == 0
    assert figures["own_last_step"]["accuracy"] == figures["ctrl"]["accuracy"]


def test_on_the_grid_of_the_run_it_is_the_run(strong):
    """The same chain by a table of its noise levels and timesteps: times differ, states do not."""
    run = remeasured(Run.load(strong))
    ours = evaluate(run, 16).metrics()
    t = torch.tensor(run.times, dtype=torch.float64)
    grid = GridSchedule(*run.policy.schedule(t), run.policy.schedule.timestep(t))
    run.prior.denoiser.schedule = run.policy.schedule = grid
    theirs = figures_of(ProgramRun(run.config, run.prior, run.policy, run.panels, None, grid), 16, silent)
    for key in ("objective_nats", "log_z_policy_nats"):
        # the coefficients are float64; linear interpolation at a grid point may round their last digit
        assert theirs["certificate"][key] == pytest.approx(ours["certificate"][key], rel=1e-4)
    assert theirs["ctrl"]["kl_nats"] == pytest.approx(ours["ctrl"]["kl_nats"], rel=1e-4)


def test_a_control_with_an_interval_is_measured_both_ways(strong):
    """On the interval's steps, here none, and as a program does that applies a file at every step."""
    path = strong / "control" / "control.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "interval": [1e-6, 2e-6]}))
    figures = as_chain(strong)
    assert figures["ctrl"]["kl_nats"] == 0
    path.write_text(json.dumps({**json.loads(path.read_text()), "interval": None}))
    everywhere = as_chain(strong)
    assert everywhere["ctrl"]["kl_nats"] > 0
    assert figures["every_step"] == {name: value for name, value in everywhere.items() if name != "as"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampler", "ddpm"], "--sampler is of another program's chain. Name the program with --as"),
        (["--as", "a1111"], "--as a1111: it loads no LoRA of a DDPMPipeline"),
        (["--as", "forge"], "--as forge: must be one of diffusers, comfyui, a1111, invokeai"),
        (["--as", "a1111", "--strength", "nan"], "--strength nan: must be a number"),
    ],
)
def test_what_is_no_chain_of_a_program_is_one_line(finished, ctrl_here, tmp_path, options, message):
    run, _ = run_on("DDPM", finished, tmp_path)
    done = ctrl_here("evaluate", run, *options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_a_control_on_layers_that_a_program_does_not_map_has_no_chain_there(strong, monkeypatch):
    run = Run.load(strong)
    control = run.policy.controls["dark"]
    lora = control.as_lora(0, 1.0)
    wider = replace(lora, down=lora.down | {"conv_in": torch.zeros(2, 4, 3, 3)})
    monkeypatch.setattr(control, "as_lora", lambda y, gamma: wider)
    with pytest.raises(ValueError, match="--as a1111: it does not map conv_in, which lora_targets adapted"):
        ProgramChain("a1111").of(run)
    ProgramChain("diffusers").of(run)
