"""Prior, p̂ and paths on another device than the CPU: the same numbers to the bit, and nothing left behind."""

import sys
from functools import cache

import pytest
import torch
from elsewhere import DEVICE, MPS, There, open_device
from pipelines import BUILDERS, LARGE, saved

from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.commands.jobs.estimate import estimate_job
from ctrl_diffusion.commands.jobs.train import train_job
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.data.labelled import LabelledImages, write_imagefolder
from ctrl_diffusion.evaluate.judge import SecondOpinion
from ctrl_diffusion.guide.classifier_guidance import ClassifierGuidance
from ctrl_diffusion.guide.free_guidance import FreeGuidance
from ctrl_diffusion.guide.noisy import NoisyClassifier
from ctrl_diffusion.guide.particles import TDS, FeynmanKac
from ctrl_diffusion.guide.reconstruction import DPS, MPGD
from ctrl_diffusion.guide.selection import BestOf, Importance, Rejection
from ctrl_diffusion.learn.adjoint import Adjoint
from ctrl_diffusion.learn.backprop import Backprop
from ctrl_diffusion.learn.contrast import Contrast
from ctrl_diffusion.learn.fit import fit
from ctrl_diffusion.learn.labelled import Labelled
from ctrl_diffusion.learn.ppo import PPO
from ctrl_diffusion.learn.weighted import Weighted
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.reward.reward import Reward, prior_table
from ctrl_diffusion.reward.scorer import Classifier
from ctrl_diffusion.run.run import Run
from tests.prior.priors import states_to

LEARNERS = {
    "contrast": lambda times, x_0: Contrast(states_to(x_0, times), times, batch=6, micro=4),
    "weighted": lambda times, x_0: Weighted(x_0, times, batch=6),
    "adjoint": lambda times, x_0: Adjoint(times, 4, regressed=2, micro=3),
    "backprop": lambda times, x_0: Backprop(times, 4),
    "labelled": lambda times, x_0: Labelled(x_0, {"dark": torch.arange(len(x_0)) % 2}, {}, times, batch=6),
    "ppo": lambda times, x_0: PPO(times, 4, surrogates=2),
    "adjoint, offloaded": lambda times, x_0: Adjoint(times, 4, regressed=2, micro=3, offload=True),
    "ppo, offloaded": lambda times, x_0: PPO(times, 4, surrogates=2, micro=3, offload=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pipeline folder of a family, made when it is first needed."""
    root = tmp_path_factory.mktemp("devices")

    @cache
    def made(name):
        saved(name, root / name)
        return root / name

    return made


@pytest.fixture
def elsewhere(monkeypatch):
    """Another device, and tensors and modules that can be moved to it."""
    with open_device(monkeypatch):
        yield


@pytest.fixture
def mps(monkeypatch):
    """Apple's device, which refuses float64."""
    with open_device(monkeypatch, MPS):
        yield


def job(folder, device, learner, only=None):
    """A small whole job: control and figures; the control may speak at one step only."""
    prior = Prior.from_pretrained(folder, (32, 32) if folder.name in LARGE else None)
    prior = (prior.with_prompts(["a seven", "two"]) if prior.text else prior).placed(device)
    place = prior.denoiser.device
    assert place.type == torch.device(device).type
    torch.manual_seed(0)
    classifier, second = (Classifier(3, 2).eval().requires_grad_(False).to(place) for _ in range(2))
    policy = Policy(prior.denoiser, LoRAControl("dark", "01", prior.denoiser, rank=2))
    conditions = Conditions({} if prior.classes is None else {"c": torch.arange(2)}, {"dark": 2})
    times = prior.denoiser.times(3, 0.2)
    if only is not None:
        sigma = float(policy.schedule(times[only])[1])
        policy.controls["dark"].interval = (0.99 * sigma, sigma)
    reward = Reward({"dark": classifier}, codec=prior.codec, device=place)
    n = 4 * conditions.groups
    cond = conditions.cond_of(torch.arange(n) * conditions.groups // n)
    x_0 = paths(prior.denoiser, n, times, torch.Generator().manual_seed(1), cond).x_0
    stream = LEARNERS[learner](times, x_0)(policy, reward, conditions, torch.Generator().manual_seed(2))
    updates = list(fit(policy, stream, 2, {"embedding": 1e-3, "adapter": 1e-3}, warmup=1))
    labels, cond = conditions.of(conditions.all(2))
    generator = torch.Generator().manual_seed(3)
    found = paths(policy, 2 * conditions.pairs, times, generator, cond, labels, compare=True)
    judge = SecondOpinion({}, None, {"dark": second}, codec=prior.codec, device=place)
    observation = judge.measure(found[0], conditions)
    with torch.no_grad():
        earned = reward(found[0], labels, cond)
        figures = [
            *found,
            earned,
            prior_table(reward, conditions, x_0),
            observation.features,
            observation.labels["dark"],
        ]
    assert not any(isinstance(figure, There) for figure in figures)
    return [*(p.detach().cpu() for p in policy.trainable()), *figures, torch.tensor([u.loss for u in updates])]


@pytest.mark.parametrize("only", [None, 1])
@pytest.mark.parametrize("learner", LEARNERS)
def test_every_learner_works_elsewhere_as_on_the_cpu(folder, elsewhere, learner, only):
    found, expected = (job(folder("DDPM"), device, learner, only) for device in (DEVICE, "cpu"))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("learner", [name for name in LEARNERS if "offloaded" not in name])
def test_every_learner_works_without_float64_on_mps(folder, mps, learner):
    found, expected = (job(folder("DDPM"), device, learner) for device in ("mps", "cpu"))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_float64_on_mps_is_noticed(mps):
    with pytest.raises(TypeError, match="no float64"):
        torch.zeros(2, dtype=torch.float64).to("mps")
    with pytest.raises(TypeError, match="no float64"):
        torch.zeros(2).to("mps").double()


@pytest.mark.parametrize("learner", ["adjoint", "ppo"])
def test_paths_are_kept_on_the_cpu_where_that_is_asked_for(folder, elsewhere, monkeypatch, learner):
    kept, module = {}, sys.modules[f"ctrl_diffusion.learn.{learner}"]
    revisit = module.revisit

    def watched(policy, rollout, *given):
        held = sys._getframe(1).f_locals  # by the learner, while it learns from the paths
        rows = [rollout.path.x, rollout.path.z, *(held[name] for name in ("adjoints", "means") if name in held)]
        kept.setdefault(name, set()).update(map(type, rows))
        return revisit(policy, rollout, *given)

    monkeypatch.setattr(module, "revisit", watched)
    for name in (learner, f"{learner}, offloaded"):
        job(folder("DDPM"), DEVICE, name)
    assert kept == {learner: {There}, f"{learner}, offloaded": {torch.Tensor}}


BASELINES = {
    "classifier guidance": ClassifierGuidance,
    "free guidance": lambda noisy: FreeGuidance(),
    "DPS": lambda noisy: DPS(),
    "MPGD": lambda noisy: MPGD(),
    "TDS": lambda noisy: TDS(particles=2, batch=3),
    "Feynman-Kac": lambda noisy: FeynmanKac(particles=2),
    "importance": lambda noisy: Importance(particles=2),
    "best of n": lambda noisy: BestOf(n=2),
    "rejection": lambda noisy: Rejection(),
}


def guided(folder, device, name):
    """Samples of a baseline."""
    prior = Prior.from_pretrained(folder).placed(device).denoiser
    torch.manual_seed(0)
    clean, seeing = (Classifier(c, 2).eval().requires_grad_(False).to(prior.device) for c in (3, 5))
    policy = Policy(prior, LoRAControl("dark", "01", prior, rank=2))
    method = BASELINES[name]({"dark": NoisyClassifier(seeing, prior.schedule)})
    gamma = 0.01 if name == "rejection" else 1.0  # this p̂ is never in doubt: another γ would wait for ever
    reward, labels = Reward({"dark": clean}, gamma, device=prior.device), {"dark": torch.tensor([0, 1, 1])}
    denoiser = policy if name == "free guidance" else prior
    found = method(denoiser, reward, labels, None, prior.times(3, 0.2), torch.Generator().manual_seed(1), 1.5)
    assert not isinstance(found.x_0, There)
    return found


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_works_elsewhere_as_on_the_cpu(folder, elsewhere, name):
    found, expected = (guided(folder("DDPM"), device, name) for device in (DEVICE, "cpu"))
    assert torch.equal(found.x_0, expected.x_0)
    assert found.cost == expected.cost


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in BUILDERS if name not in ("DDPM", "SD 1", "SD 2")]


@pytest.mark.parametrize("name", ["SD 1", *SLOW])
def test_every_family_works_elsewhere_as_on_the_cpu(folder, elsewhere, name):
    found, expected = (job(folder(name), device, "adjoint") for device in (DEVICE, "cpu"))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["DPS", "TDS", "rejection"])
def test_baselines_work_without_float64_on_mps(folder, mps, name):
    found, expected = (guided(folder("DDPM"), device, name) for device in ("mps", "cpu"))
    assert torch.equal(found.x_0, expected.x_0)


def test_what_is_left_behind_is_noticed(elsewhere):
    """The device of these tests refuses what an accelerator refuses."""
    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="two devices"):
        x.to(DEVICE) + x
    assert torch.equal((x.to(DEVICE) + 1.0).cpu(), x + 1)


def test_a_device_that_is_not_here_is_one_line(folder):
    with pytest.raises(ValueError, match="device: 'cuda:7' is not available here") as caught:
        Prior.from_pretrained(folder("DDPM")).placed("cuda:7")
    assert "\n" not in str(caught.value)


def shades(folder):
    """Sixty labelled images, dark or not."""
    dark = torch.arange(60) % 2
    x = torch.where(dark[:, None, None, None] == 1, -0.5, 0.5) + 0.1 * torch.randn(60, 3, 32, 32)
    labels = {"prompt": torch.arange(60) // 30, "dark": dark}
    values = {"prompt": ("a seven", "two"), "dark": ("no", "yes")}
    write_imagefolder(folder, LabelledImages(x, labels, values))
    return str(folder)


def settings(folder, data, device, latents=False):
    """Of a small whole job on a Stable Diffusion."""
    return {
        "prior": str(folder("SD 1")), "data": data, "control": "dark", "condition": "prompt",
        "classifier": {"updates": 60, "grid": 1, "depth": 1, "head": "categorical", "latents": latents},
        "weighted": {"updates": 1, "batch": 4, "cache": 8, "renoising": 1}, "adjoint": {"updates": 1, "batch": 4},
        "evaluation": {"prior_samples": 8, "paths": 8, "probes": 1, "sweep_paths": 8}, "steps": 3, "rank": 2,
        "device": device,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_a_dry_run_works_elsewhere(folder, elsewhere, tmp_path):
    given = settings(folder, shades(tmp_path / "data"), str(DEVICE))
    found = estimate_job({**given, "prior": str(folder("DDPM")), "condition": None})
    assert found["device"] == str(DEVICE)
    assert found["memory_mb"]["activations"] >= 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("latents", [False, True])
def test_the_whole_job_works_elsewhere_as_on_the_cpu(folder, elsewhere, tmp_path, latents):
    """Data, classifiers, training, certificate, report, loading and sampling; but for the seconds, the same figures."""
    data, found = shades(tmp_path / "data"), []
    for device in (str(DEVICE), "cpu"):
        metrics = train_job(settings(folder, data, device, latents), tmp_path / device)
        run = Run.load(tmp_path / device, device)
        y, c = torch.tensor([0, 1, -1]), torch.tensor([0, 1, 1])
        drawn = run.sample(y, c)
        exact = run.sample(y[:2], c[:2], strength=0.5, exact=True)
        del metrics["seconds"]
        found.append((metrics, drawn, exact))
    (metrics, drawn, exact), (expected, *images) = found
    assert metrics == expected
    assert torch.equal(drawn, images[0])
    assert torch.equal(exact, images[1])
