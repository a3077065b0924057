"""A control with an interval of noise levels speaks inside it; outside the policy is the prior, bit for bit."""

import json

import pytest
import torch
from silenced import calls_of, silenced, talkative

from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow, VariancePreserving
from ctrl_diffusion.control.control import FORMAT
from ctrl_diffusion.control.kinds import KINDS, load_control
from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.data.labels import NULL
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.source import DIGITS

SCHEDULES = [Cosine(), RectifiedFlow(), VariancePreserving(torch.linspace(0.999, 0.005, 100))]
B, FLOW = 6, RectifiedFlow()  # σ = t
Y = torch.tensor([0, 1, 1, 0, 1, 0])
X = torch.randn(B, 2, generator=torch.Generator().manual_seed(0))
TIMES = {"a number": [0.1, 0.35, 0.5, 0.75, 0.9], "a number each": [torch.tensor([0.1, 0.35, 0.5, 0.75, 0.9, 0.35])]}
INTERVALS = [
    {"y": (0.3, 0.6)},
    {"y": (0.0, 0.5), "z": (0.4, 0.8)},
    {"y": (0.2, 0.4), "z": (0.7, 0.8)},
    {"y": None, "z": (0.7, 0.8)},
]


@pytest.fixture
def lora(digits):
    """A LoRA control on the embedded prior that speaks between σ = 0.3 and 0.6, and a batch."""
    denoiser = digits.denoiser
    control = LoRAControl("ink", "12", denoiser, rank=2, interval=(0.3, 0.6))
    with torch.no_grad():
        for i, p in enumerate(sum(control.parameter_groups().values(), [])):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    x_t = torch.randn(B, *denoiser.shape, generator=torch.Generator().manual_seed(0))
    return Policy(denoiser, control), x_t, {"c": torch.arange(B)}


def time_of(schedule, sigma):
    """The time at which a schedule has a noise level."""
    return min((i / 1000 for i in range(1, 1000)), key=lambda t: abs(float(schedule(t)[1]) - sigma))


@pytest.mark.parametrize(("sigma", "inside"), [(0.1, False), (0.45, True), (0.8, False)])
def test_outside_a_lora_is_the_network_itself(lora, sigma, inside):
    policy, x_t, c = lora
    labels, t = {"ink": Y}, time_of(policy.schedule, sigma)
    with torch.no_grad():
        prior, calls = policy.prior(x_t, t, **c), calls_of(policy.base)
        for strength in (1.0, 1.5):
            x_hat = policy(x_t, t, labels, strength, **c)
            assert torch.equal(x_hat, prior) != inside
            assert torch.isclose(x_hat, prior, atol=1e-3).flatten(1).all(1).any() != inside
    assert len(calls) == (3 if inside else 2), "outside the prior is called once, as it is"


def test_outside_rows_of_a_lora_are_the_network_itself(lora):
    policy, x_t, c = lora
    t = torch.tensor([time_of(policy.schedule, sigma) for sigma in (0.1, 0.45, 0.8, 0.5, 0.2, 0.35)])
    with torch.no_grad():
        x_hat, prior = policy(x_t, t, {"ink": Y}, **c), policy.prior(x_t, t, **c)
        policy.controls["ink"].interval = None
        everywhere = policy(x_t, t, {"ink": Y}, **c)
    silent = torch.tensor([True, False, True, False, True, False])
    assert torch.equal(x_hat[silent], prior[silent])
    torch.testing.assert_close(x_hat[~silent], everywhere[~silent])  # last bits change with the batch
    assert not torch.isclose(everywhere, prior, atol=1e-3).flatten(1).all(1).any(), "the control must say something"


@pytest.mark.parametrize("kind", TIMES)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("intervals", INTERVALS, ids=str)
def test_a_silent_control_is_one_whose_label_is_null(intervals, strength, kind):
    """Of several controls each has its own interval."""
    policy, explicit = talkative(FLOW, intervals), silenced(FLOW, intervals)
    labels = {name: Y.roll(i) for i, name in enumerate(intervals)}
    spoke = []
    for t in TIMES[kind]:
        with torch.no_grad():
            x_hat, expected = policy(X, t, labels, strength), explicit(X, t, labels, strength)
        assert torch.equal(x_hat, expected)
        spoke.append(not torch.equal(x_hat, policy.prior(X, t)))
    if strength and kind == "a number":
        assert spoke == [
            any(bounds is None or bounds[0] <= t <= bounds[1] for bounds in intervals.values()) for t in TIMES[kind]
        ]


def test_the_policy_says_where_it_speaks():
    policy = talkative(FLOW, {"y": (0.2, 0.4), "z": (0.7, 0.8)})
    names = {0.1: set(), 0.3: {"y"}, 0.5: set(), 0.75: {"z"}, 0.9: set()}
    for t, speaking in names.items():
        assert policy.speaks(t, ["y", "z"]) == bool(speaking)
        assert {name for name in policy.controls if policy.speaks(t, {name: Y})} == speaking
        assert not policy.speaks(t, ["y", "z"], strength=0.0)
        assert not policy.speaks(t)
    policy.controls["y"].interval = None
    assert all(policy.speaks(t, ["y"]) for t in names)


@pytest.mark.parametrize("t", [0.1, torch.full((B,), 0.1)], ids=TIMES)
@pytest.mark.parametrize(("labels", "message"), [({"x": Y}, "unknown control 'x'"), ({"y": Y + 1}, "0 … 1")])
def test_wrong_labels_are_refused_where_they_would_not_be_heard(labels, message, t):
    policy = talkative(FLOW, {"y": (0.3, 0.6)})
    with pytest.raises(ValueError, match=message):
        policy(X, t, labels)
    with pytest.raises(ValueError, match="unknown control 'x'"):
        policy.speaks(0.1, ["x"])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_steps_at_the_bounds_are_inside(schedule):
    """However their σ is computed: of one time, of many, in single precision."""
    times = schedule.times(9, 0.1)
    sigmas = [float(schedule(t)[1]) for t in times]
    policy = talkative(schedule, {"y": (sigmas[6], sigmas[3])})
    speaking = [policy.speaks(t, ["y"]) for t in times]
    assert speaking == [3 <= i <= 6 for i in range(10)]
    assert policy.active_steps(times).tolist() == [3, 4, 5, 6]
    for dtype in (torch.float64, torch.float32):
        null = policy.labels_at(torch.tensor(times, dtype=dtype), {"y": torch.zeros(10, dtype=torch.long)})["y"] == NULL
        assert (~null).tolist() == speaking


def test_active_steps_are_those_of_what_is_trained():
    times = FLOW.times(9, 0.1)  # σ = 1, 0.9 … 0.1; the last is no step's
    policy = talkative(FLOW, {"y": (0.15, 0.35), "z": (0.65, 0.85)})
    assert policy.active_steps(times).tolist() == [2, 3, 7, 8]
    policy.controls["z"].fix()
    assert policy.active_steps(times).tolist() == [7, 8]
    policy.controls["y"].interval = (0.05, 0.15)
    assert policy.active_steps(times).tolist() == []
    policy.controls["y"].interval = None
    assert policy.active_steps(times).tolist() == list(range(9))
    policy.controls["y"].fix()
    assert policy.active_steps(times).tolist() == []
    assert policy.prior.active_steps(times).tolist() == list(range(9))


@pytest.mark.parametrize("other", [0, 1, 2])
def test_ranks_with_parts_of_the_weights_call_the_network_in_step(other):
    """At one time all agree; with a time each, every rank calls the network for what any other rank's rows need."""
    policy = talkative(FLOW, {"y": (0.3, 0.6)})
    gathered, calls = [], calls_of(policy.base)

    def all_gather(active):
        gathered.append(active)
        return (torch.arange(4) < other)[None]

    policy.base.all_gather = all_gather
    with torch.no_grad():
        assert torch.equal(policy(X, 0.1, {"y": Y}), policy.prior(X, 0.1))
        assert (len(gathered), len(calls)) == (0, 2)
        t = torch.full((B,), 0.1)
        assert torch.equal(policy(X, t, {"y": Y}), policy.prior(X, t))
    assert [active.any() for active in gathered] == [False]
    assert len(calls) == 4 + (other > 0)


@pytest.mark.parametrize(
    "interval", [(0.5,), (0.1, 0.2, 0.3), (0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.1, float("nan")), (0, float("inf"))]
)
def test_what_is_no_interval_is_refused(interval):
    control = talkative(FLOW, {"y": (0.3, 0.6)}).controls["y"]
    with pytest.raises(ValueError, match="two noise levels, 0 ≤ σ_off < σ_on, got"):
        control.interval = interval
    assert control.interval == (0.3, 0.6)
    control.interval = [0, 1]
    assert control.interval == (0.0, 1.0)


def mixture():
    return GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.5, FLOW)


PRIORS = {"lora": lambda: Prior.from_pretrained(DIGITS).denoiser, "side": mixture}


@pytest.fixture(params=PRIORS)
def saved(request, tmp_path, monkeypatch):
    """A saved control of each kind, its control.json, and how to load it; made with an interval."""
    monkeypatch.setitem(KINDS, "side", SideControl)

    def save(interval):
        control = KINDS[request.param]("y", "ab", PRIORS[request.param]())
        control.interval = interval
        control.save(tmp_path)
        return tmp_path / "control.json"

    return request.param, save, lambda: load_control(tmp_path, PRIORS[request.param]())


@pytest.mark.parametrize("interval", [None, (0.0, 1.0), (0.123456789012, 80.123456789)])
def test_an_interval_is_saved_with_every_digit(saved, interval):
    kind, save, load = saved
    about = json.loads(save(interval).read_text())
    assert (about["format"], about["kind"]) == (2, kind)
    assert about["interval"] == (interval and list(interval))
    assert load().interval == interval


def test_a_file_of_version_0_1_has_no_interval(saved):
    _, save, load = saved
    path = save((0.1, 0.2))
    about = json.loads(path.read_text())
    del about["format"], about["interval"]
    path.write_text(json.dumps(about))
    assert load().interval is None


def test_a_newer_format_is_refused_in_one_line(saved):
    kind, save, load = saved
    path = save(None)
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": FORMAT + 1, "gate": "?"}))
    newer = f"format {FORMAT + 1}, this version .* reads formats up to {FORMAT}"
    message = rf"control\.json has {newer}\. Install a newer version\.$"
    for door in (load, lambda: KINDS[kind].load(path.parent, PRIORS[kind]())):
        with pytest.raises(ValueError, match=message) as error:
            door()
        assert "damaged" not in str(error.value)


@pytest.mark.parametrize("change", [{"format": "new"}, {"interval": [0.5]}, {"interval": [0.6, 0.5]}, {"interval": 1}])
def test_a_damaged_file_is_one_line(saved, change):
    _, save, load = saved
    path = save(None)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=r"is damaged: .* Train it again\.$"):
        load()
