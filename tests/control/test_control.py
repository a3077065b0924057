import json

import pytest
import torch
from peft.tuners.lora import LoraLayer

from ctrl_diffusion.chain.schedule import Cosine
from ctrl_diffusion.control.kinds import KINDS, load_control
from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.data.labels import NULL
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.prior.network import as_denoiser
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.source import DIGITS

B = 6
VALUES = ("1", "2", "3", "4")


@pytest.fixture
def network(digits):
    """The bare network's own prediction, before any control is attached, and a batch."""
    generator = torch.Generator().manual_seed(0)
    x_t, c = torch.randn(B, 1, 8, 8, generator=generator), torch.arange(B)
    with torch.no_grad():
        bare = digits.denoiser(x_t, 0.5, c=c)
    return digits.denoiser, x_t, c, bare


def lora(denoiser, name="ink"):
    """A control with something to say: every parameter, the zero half too, is random."""
    control = LoRAControl(name, VALUES, denoiser, rank=4)
    with torch.no_grad():
        for i, parameter in enumerate(sum(control.parameter_groups().values(), [])):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return control


def test_a_new_control_changes_nothing(network):
    denoiser, x_t, c, bare = network
    policy = Policy(denoiser, LoRAControl("ink", VALUES, denoiser))
    assert torch.equal(policy(x_t, 0.5, labels={"ink": torch.zeros(B, dtype=torch.long)}, c=c), bare)


@pytest.mark.parametrize("labels", [None, {}, {"ink": torch.full((B,), NULL)}])
def test_null_labels_are_the_networks_prediction_exactly(network, labels):
    denoiser, x_t, c, bare = network
    policy = Policy(denoiser, lora(denoiser))
    with torch.no_grad():
        policy(x_t, 0.5, labels={"ink": torch.zeros(B, dtype=torch.long)}, c=c)  # leaves nothing behind
        assert torch.equal(policy(x_t, 0.5, labels=labels, c=c), bare)
        assert torch.equal(policy.prior(x_t, 0.5, c=c), bare)


def test_mixed_batches_and_strength(network):
    denoiser, x_t, c, bare = network
    policy = Policy(denoiser, lora(denoiser))
    y = torch.tensor([0, NULL, 2, NULL, 3, 1])
    with torch.no_grad():
        full = policy(x_t, 0.5, labels={"ink": torch.where(y == NULL, 0, y)}, c=c)
        mixed = policy(x_t, 0.5, labels={"ink": y}, c=c)
        assert torch.equal(mixed[y == NULL], bare[y == NULL])
        torch.testing.assert_close(mixed[y != NULL], full[y != NULL])  # last bits change with the batch
        assert not torch.isclose(full, bare, atol=1e-3).flatten(1).all(1).any(), "the control must say something"
        assert torch.equal(policy(x_t, 0.5, labels={"ink": y}, strength=0.0, c=c), bare)
        half = policy(x_t, 0.5, labels={"ink": y.clamp(min=0)}, strength=0.5, c=c)
        torch.testing.assert_close(half, (full + bare) / 2)
        beyond = policy(x_t, 0.5, labels={"ink": y.clamp(min=0)}, strength=2.0, c=c)
        torch.testing.assert_close(beyond, 2 * full - bare)


def test_only_the_control_learns(network):
    denoiser, x_t, c, _ = network
    policy = Policy(denoiser, lora(denoiser))
    policy(x_t, 0.5, labels={"ink": torch.tensor([0, NULL, 2, NULL, 3, 1])}, c=c).square().sum().backward()
    control = {id(p) for group in policy.parameter_groups().values() for p in group}
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == (id(parameter) in control), name
        assert (parameter.grad is not None) == (id(parameter) in control), name
    table = policy.controls["ink"].table.weight
    assert torch.equal(table.grad[-1], torch.zeros_like(table[-1])), "the null row never learns"


def test_gradients_survive_a_prior_pass_before_backward(network):
    """The prior has its own weights back before backward runs: the graph must not notice."""
    denoiser, x_t, c, _ = network
    policy = Policy(denoiser, lora(denoiser))
    y = {"ink": torch.zeros(B, dtype=torch.long)}
    adapter = policy.parameter_groups()["adapter"]
    plain = torch.autograd.grad(policy(x_t, 0.5, labels=y, c=c).sum(), adapter)
    x_hat = policy(x_t, 0.5, labels=y, c=c)
    policy.prior(x_t, 0.5, c=c)
    x_hat.sum().backward()
    for expected, parameter in zip(plain, adapter, strict=True):
        assert torch.equal(parameter.grad, expected)


def test_the_weights_of_an_active_control_are_pefts_adapter(network):
    """W + BA in place of peft's own Wx + B(Ax): the same prediction and gradients, but for rounding."""
    denoiser, x_t, c, _ = network
    policy = Policy(denoiser.double(), lora(denoiser).double())
    control, x_t, y = policy.controls["ink"], x_t.double(), {"ink": torch.arange(B) % 4}
    adapter = policy.parameter_groups()["adapter"]
    ours = policy(x_t, 0.5, labels=y, c=c)
    gradients = torch.autograd.grad(ours.square().sum(), adapter)
    control._shift = control.table(y["ink"])
    layers = [module for module in denoiser.network.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = False
    theirs = denoiser(x_t, 0.5, c=c)
    torch.testing.assert_close(ours, theirs)
    for gradient, expected in zip(gradients, torch.autograd.grad(theirs.square().sum(), adapter), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_save_and_load(network, tmp_path):
    denoiser, x_t, c, _ = network
    policy, y = Policy(denoiser, lora(denoiser)), {"ink": torch.tensor([0, 1, 2, 3, 0, 1])}
    with torch.no_grad():
        before = policy(x_t, 0.5, labels=y, c=c)
    policy.controls["ink"].save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["control.json", "control.safetensors"]

    fresh = Prior.from_pretrained(DIGITS).denoiser
    control = LoRAControl.load(tmp_path, fresh)
    assert control.values == VALUES
    with torch.no_grad():
        assert torch.equal(Policy(fresh, control)(x_t, 0.5, labels=y, c=c), before)


@pytest.mark.parametrize(("labels", "message"), [({"slant": 0}, "slant"), ({"ink": 4}, "0 … 3"), ({"ink": -2}, "-2")])
def test_wrong_labels_are_refused(network, labels, message):
    denoiser, x_t, c, _ = network
    policy = Policy(denoiser, LoRAControl("ink", VALUES, denoiser, rank=1))
    with pytest.raises(ValueError, match=message):
        policy(x_t, 0.5, labels={name: torch.full((B,), y) for name, y in labels.items()}, c=c)


@pytest.mark.parametrize("name", ["type", "half", "stroke.width", "Größe in mm"])
def test_any_column_name_will_do(digits, name, tmp_path):
    """Modules cannot be called "type" or have dots in their names; controls can."""
    control = LoRAControl(name, VALUES, digits.denoiser, rank=1)
    policy = Policy(digits.denoiser, control)
    assert (
        policy(torch.randn(2, 1, 8, 8), 0.5, labels={name: torch.tensor([0, 1])}, c=torch.tensor([0, 1])).shape[0] == 2
    )
    control.save(tmp_path)
    assert LoRAControl.load(tmp_path, Prior.from_pretrained(DIGITS).denoiser).name == name


def test_names_are_given_once_and_global_randomness_is_left_alone(network):
    denoiser, *_ = network
    before = torch.get_rng_state()
    LoRAControl("ink", VALUES, denoiser, rank=1)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="already carries a control 'ink'"):
        LoRAControl("ink", VALUES, denoiser, rank=1)


def test_two_controls_on_one_network_leave_no_trace_where_they_are_null(network):
    denoiser, x_t, c, bare = network
    first = lora(denoiser)
    y = torch.tensor([0, 3, 2, 1, 3, 1])
    null = torch.full((B,), NULL)
    with torch.no_grad():
        before = Policy(denoiser, first)(x_t, 0.5, labels={"ink": y}, c=c)
        policy = Policy(denoiser, first, lora(denoiser, "slant"))
        alone = {name: policy(x_t, 0.5, labels={name: y}, c=c) for name in ("ink", "slant")}
        both = policy(x_t, 0.5, labels={"ink": y, "slant": y}, c=c)
        # to the bit: the network itself, the model with the other control alone, and the one before the second came
        assert torch.equal(policy(x_t, 0.5, labels={"ink": null, "slant": null}, c=c), bare)
        assert torch.equal(alone["ink"], before)
        assert torch.equal(policy(x_t, 0.5, labels={"ink": y, "slant": null}, c=c), before)
        assert not torch.isclose(both, alone["ink"], atol=1e-3).flatten(1).all(1).any(), "both must say something"
        # row by row in one batch: nothing, each alone, both; last bits change with the batch
        labels = {"ink": torch.tensor([NULL, 3, NULL, 1, 3, NULL]), "slant": torch.tensor([NULL, NULL, 2, 1, NULL, 1])}
        mixed = policy(x_t, torch.full((B,), 0.5), labels=labels, c=c)
        assert torch.equal(mixed[0], bare[0])
        for rows, expected in (([1, 4], alone["ink"]), ([2, 5], alone["slant"]), ([3], both)):
            torch.testing.assert_close(mixed[rows], expected[rows])
        beyond = policy(x_t, 0.5, labels=labels, strength=2.0, c=c)
        torch.testing.assert_close(beyond, 2 * mixed - bare)


def test_a_fixed_control_is_not_trained_beside_another(network):
    denoiser, x_t, c, _ = network
    old, new = lora(denoiser).fix(), lora(denoiser, "slant")
    policy = Policy(denoiser, old, new)
    y = torch.zeros(B, dtype=torch.long)
    policy(x_t, 0.5, labels={"ink": y, "slant": y}, c=c).square().sum().backward()
    trained = sum(new.parameter_groups().values(), [])
    assert {id(p) for p in policy.trainable()} == {id(p) for p in trained}
    assert all(p.grad.abs().max() > 0 for p in trained)
    assert all(p.grad is None and not p.requires_grad for p in sum(old.parameter_groups().values(), []))
    with policy.frozen(), torch.no_grad():
        policy(x_t, 0.5, labels={"ink": y, "slant": y}, c=c)
    assert all(p.requires_grad for p in trained)
    assert not any(p.requires_grad for p in sum(old.parameter_groups().values(), [])), "fixed for good"


def test_a_second_control_leaves_the_first_one_learning(network):
    denoiser, *_ = network
    controls = [lora(denoiser, name) for name in ("ink", "slant")]
    assert all(p.requires_grad for control in controls for p in sum(control.parameter_groups().values(), []))


def test_a_control_of_another_network_is_refused(network, tmp_path):
    denoiser, *_ = network
    control = LoRAControl("ink", VALUES, denoiser, rank=2)
    control.save(tmp_path)
    (tmp_path / "control.json").write_text((tmp_path / "control.json").read_text().replace('"rank": 2', '"rank": 3'))
    with pytest.raises(ValueError, match="another network"):
        LoRAControl.load(tmp_path, Prior.from_pretrained(DIGITS).denoiser)


def test_a_control_needs_a_site():
    denoiser = as_denoiser(lambda x, timestep: x, Cosine(), (2,))
    with pytest.raises(ValueError, match="ControlSite"):
        LoRAControl("y", VALUES, denoiser)


def test_side_control_obeys_the_same_laws():
    prior = GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.3, Cosine())
    policy = Policy(prior, SideControl("y", ("a", "b"), prior))
    x_t, y = torch.randn(5, 1), torch.tensor([0, NULL, 1, 0, NULL])
    assert torch.equal(policy(x_t, 0.5, labels={"y": y}), prior(x_t, 0.5))
    with torch.no_grad():
        for parameter in policy.controls["y"].parameters():
            parameter.add_(0.1)
    mixed = policy(x_t, 0.5, labels={"y": y})
    assert torch.equal(mixed[y == NULL], prior(x_t, 0.5)[y == NULL])
    assert (mixed[y != NULL] != prior(x_t, 0.5)[y != NULL]).all()


def test_a_new_kind_of_control_is_a_row_of_the_table(monkeypatch, tmp_path):
    def prior():
        return GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.3, Cosine())

    first = prior()
    policy = Policy(first, SideControl("y", ("a", "b"), first, width=8))
    x_t, y = torch.randn(5, 1), torch.tensor([0, NULL, 1, 0, NULL])
    with torch.no_grad():
        for parameter in policy.controls["y"].parameters():
            parameter.add_(0.1)
        expected = policy(x_t, 0.5, labels={"y": y})
    policy.controls["y"].save(tmp_path)
    with pytest.raises(ValueError, match=r"is damaged: unknown kind of control 'side', not lora\. Train it again\."):
        load_control(tmp_path, prior())
    monkeypatch.setitem(KINDS, "side", SideControl)
    second = prior()
    with torch.no_grad():
        assert torch.equal(Policy(second, load_control(tmp_path, second))(x_t, 0.5, labels={"y": y}), expected)


def test_a_control_of_version_0_1_is_a_lora(network, tmp_path):
    lora(network[0]).save(tmp_path)
    about = json.loads((tmp_path / "control.json").read_text())
    assert about.pop("kind") == "lora"
    (tmp_path / "control.json").write_text(json.dumps(about))
    assert isinstance(load_control(tmp_path, Prior.from_pretrained(DIGITS).denoiser), LoRAControl)


def test_snapshots_of_the_controls_parameters(network):
    denoiser, x_t, c, bare = network
    policy = Policy(denoiser, LoRAControl("ink", VALUES, denoiser, rank=4))
    y, untrained = torch.zeros(B, dtype=torch.long), policy.snapshot()

    def predict():
        with torch.no_grad():
            return policy(x_t, 0.5, labels={"ink": y}, c=c)

    with torch.no_grad():
        for parameter in policy.trainable():
            parameter.add_(0.3)
    trained = predict()
    assert not torch.isclose(trained, bare, atol=1e-3).flatten(1).all(1).any()
    with policy.holding(untrained):
        assert torch.equal(predict(), bare)
    assert torch.equal(predict(), trained)
    with pytest.raises(RuntimeError), policy.holding(untrained):
        raise RuntimeError
    assert torch.equal(predict(), trained), "an error inside changes nothing"
    policy.restore(untrained)
    assert torch.equal(predict(), bare)
    with torch.no_grad():
        policy.trainable()[0].add_(1.0)
    assert not any(p is q for p, q in zip(policy.trainable(), untrained, strict=True))
    assert not torch.equal(policy.trainable()[0], untrained[0]), "a snapshot does not follow"


def test_what_is_cached_of_a_control_changes_with_its_parameters(network):
    """BA is computed once inside `frozen` and always outside, whoever changed the parameters in between."""
    denoiser, x_t, c, _ = network
    policy, y = Policy(denoiser, lora(denoiser)), {"ink": torch.arange(B) % 4}

    def fresh():
        return policy(x_t, 0.5, labels=y, c=c).detach()  # with a gradient, so from the parameters themselves

    before = policy.snapshot()
    with torch.no_grad():
        assert torch.equal(policy(x_t, 0.5, labels=y, c=c), fresh())
    optimizer = torch.optim.SGD(policy.trainable(), lr=1e-3)
    policy(x_t, 0.5, labels=y, c=c).square().sum().backward()
    optimizer.step()
    first = policy.trainable()[1]
    for change in (
        lambda: None,
        lambda: policy.restore(before),
        lambda: first.add_(0.1),
        lambda: first.mul_(2.0),
        lambda: first.data.mul_(2.0),  # as averaged weights are copied: torch does not count it as a change
    ):
        with torch.no_grad():
            change()
            expected = fresh()
            assert torch.equal(policy(x_t, 0.5, labels=y, c=c), expected)
            with policy.frozen():
                for _ in range(2):
                    assert torch.equal(policy(x_t, 0.5, labels=y, c=c), expected)
    with policy.frozen():
        x_t = x_t.clone().requires_grad_()
        (frozen,) = torch.autograd.grad(policy(x_t, 0.5, labels=y, c=c).sum(), x_t)
    (whole,) = torch.autograd.grad(policy(x_t, 0.5, labels=y, c=c).sum(), x_t)
    assert torch.equal(frozen, whole)
    assert all(p.requires_grad for p in policy.trainable())


def test_a_null_label_is_a_control_left_out_whatever_the_other_predict():
    prior = GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.3, Cosine())
    policy = Policy(prior, *(SideControl(name, ("a", "b"), prior, width=8) for name in ("side", "height")))
    with torch.no_grad():
        for parameter in policy.trainable():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        x_t, y = torch.randn(4, 1), torch.tensor([0, 1, 1, 0])
        alone = policy(x_t, 0.5, labels={"side": y})
        assert torch.equal(policy(x_t, 0.5, labels={"side": y, "height": torch.full_like(y, NULL)}), alone)
        assert not torch.equal(policy(x_t, 0.5, labels={"side": y, "height": y}), alone)


def test_a_control_that_is_active_already_is_refused(network):
    denoiser, *_ = network
    control = lora(denoiser)
    y = torch.zeros(1, dtype=torch.long)
    with control.active(y), pytest.raises(RuntimeError, match="active already"), control.active(y):
        pass


def test_between_two_levels_of_a_scale_the_embedding_is_a_line(network):
    denoiser, x_t, c, bare = network
    control = LoRAControl("ink", VALUES, denoiser, rank=4, scale=True)
    with torch.no_grad():
        control.table.weight[:-1] = torch.randn(
            control.table.weight[:-1].shape, generator=torch.Generator().manual_seed(0)
        )
        rows = control.embedded(control.table, torch.tensor([0.0, 1.25, 3.0, float(NULL)]))
        table = control.table.weight
        torch.testing.assert_close(rows[0], table[0])
        torch.testing.assert_close(rows[1], 0.75 * table[1] + 0.25 * table[2])
        torch.testing.assert_close(rows[2], table[3])
        assert torch.equal(rows[3], torch.zeros_like(rows[3]))
        policy = Policy(denoiser, control)
        y = torch.tensor([0, 1, 2, 3, 3, 0])
        torch.testing.assert_close(
            policy(x_t, 0.5, labels={"ink": y.float()}, c=c), policy(x_t, 0.5, labels={"ink": y}, c=c)
        )
        mixed = policy(x_t, 0.5, labels={"ink": torch.tensor([float(NULL), 0.5, 1.5, NULL, 2.5, 3.0])}, c=c)
        assert torch.equal(mixed[[0, 3]], bare[[0, 3]])
    for wrong in (3.01, -0.5, -2.0):
        with pytest.raises(ValueError, match="must lie in 0 … 3"):
            policy(x_t, 0.5, labels={"ink": torch.full((B,), wrong)}, c=c)


def test_classes_are_whole_numbers(network):
    denoiser, x_t, c, _ = network
    policy = Policy(denoiser, lora(denoiser))
    with pytest.raises(ValueError, match="are classes: whole numbers"):
        policy(x_t, 0.5, labels={"ink": torch.full((B,), 1.5)}, c=c)
