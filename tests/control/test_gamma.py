"""A control for several γ takes γ beside y: one evaluation at any, null untouched, at γ = 1 what it is without."""

import json

import pytest
import torch
from silenced import calls_of

from ctrl_diffusion.chain.schedule import RectifiedFlow
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.kinds import KINDS, load_control
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.data.labels import NULL
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.source import DIGITS

B, RANGE = 6, (0.25, 4.0)
Y = torch.tensor([0, 1, 1, 0, 1, 0])
EACH = torch.tensor([0.25, 0.5, 1.0, 2.0, 3.0, 4.0])


def mixture():
    return GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.5, RectifiedFlow())


PRIORS = {"lora": lambda: Prior.from_pretrained(DIGITS).denoiser, "side": mixture}


@pytest.fixture(params=PRIORS)
def kind(request, monkeypatch):
    monkeypatch.setitem(KINDS, "side", SideControl)
    return request.param


def made(kind, gammas=RANGE, values="ab", scale=False):
    """A policy of one control that has something to say, the same with and without γ; a batch, its conditions."""
    prior = PRIORS[kind]()
    options = {"rank": 2, "scale": scale} if kind == "lora" else {"width": 8}
    control = KINDS[kind]("y", values, prior, gammas=gammas, **options)
    with torch.no_grad():
        for i, p in enumerate(control.parameter_groups()["embedding"] + control.parameter_groups()["adapter"]):
            if p.shape[0] == control.size + 1:  # T0, T1, T2, whose last row is null
                p[:-1] += 0.5 * torch.randn(p[:-1].shape, generator=torch.Generator().manual_seed(i))
    for i, p in enumerate(control.parameter_groups()["adapter"]):
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + i))
    x_t = torch.randn(B, *prior.shape, generator=torch.Generator().manual_seed(0))
    return Policy(prior, control), x_t, {"c": torch.arange(B)} if kind == "lora" else {}


def test_at_one_it_is_the_control_without_the_other_tables(kind):
    """And without a γ that is given; an untrained one is at every γ what it is at 1."""
    (policy, x_t, c), (plain, _, _) = made(kind), made(kind, None)
    with torch.no_grad():
        plain.controls["y"].table.weight.copy_(policy.controls["y"].table.weight)
        expected = plain(x_t, 0.5, {"y": Y}, **c)
        for gamma in (None, 1.0, torch.ones(B)):
            assert torch.equal(policy(x_t, 0.5, {"y": Y}, gamma=gamma, **c), expected)
        apart = policy(x_t, 0.5, {"y": Y}, gamma=2.0, **c)
        assert not torch.isclose(apart, expected, atol=1e-3).flatten(1).all(1).any(), "γ must say something"
        for table in policy.controls["y"].of_gamma:
            table.weight.zero_()
        assert torch.equal(policy(x_t, 0.5, {"y": Y}, gamma=2.0, **c), expected)


def test_a_new_one_differs_by_two_tables_of_zeros(kind):
    policy, plain = (Policy(prior := PRIORS[kind](), KINDS[kind]("y", "ab", prior, gammas=g)) for g in (RANGE, None))
    extra = [p for p in policy.trainable() if not any(torch.equal(p, q) for q in plain.trainable())]
    shared = policy.trainable()
    assert len(shared) - len(plain.trainable()) == 2
    assert all(not table.weight.any() for table in policy.controls["y"].of_gamma)
    assert all(not p.any() for p in extra)


def test_null_is_the_prior_bit_for_bit_at_any_gamma(kind):
    policy, x_t, c = made(kind)
    with torch.no_grad():
        prior = policy.prior(x_t, 0.5, **c)
        null = torch.full((B,), NULL)
        for gamma in (0.25, 2.0, EACH):
            assert torch.equal(policy(x_t, 0.5, {"y": null}, gamma=gamma, **c), prior)
            assert torch.equal(policy(x_t, 0.5, {"y": Y}, 0.0, gamma, **c), prior)
            mixed = policy(x_t, 0.5, {"y": torch.where(Y == 0, NULL, Y)}, gamma=gamma, **c)
            assert torch.equal(mixed[Y == 0], prior[Y == 0])
            assert not torch.isclose(mixed[Y == 1], prior[Y == 1], atol=1e-3).flatten(1).all(1).any()


@pytest.mark.parametrize("strength", [1.0, 1.5])
def test_a_row_has_its_own_gamma(kind, strength):
    policy, x_t, c = made(kind)
    labels = torch.tensor([0, 1, NULL, 0, 1, NULL])
    with torch.no_grad():
        rows = policy(x_t, 0.5, {"y": labels}, strength, EACH, **c)
        for i, gamma in enumerate(EACH.tolist()):
            alone = policy(x_t, 0.5, {"y": labels}, strength, gamma, **c)[i]
            torch.testing.assert_close(rows[i], alone, rtol=1e-4, atol=1e-5)  # last bits change with the batch


def test_any_gamma_takes_one_evaluation(kind):
    policy, x_t, c = made(kind)
    calls = calls_of(policy.base)
    with torch.no_grad():
        for gamma in (0.25, 1.0, 2.7, EACH):
            policy(x_t, 0.5, {"y": Y}, gamma=gamma, **c)
    assert len(calls) == 4


@pytest.mark.parametrize("gamma", [0.2, 4.1, float("nan"), torch.tensor([1.0] * 5 + [5.0])], ids=str)
def test_a_gamma_beyond_the_range_is_one_clear_line(kind, gamma):
    policy, x_t, c = made(kind)
    with pytest.raises(ValueError, match=r"the control 'y' was trained for γ = 0\.25 … 4, got (0\.2|4\.1|nan|5)\.$"):
        policy(x_t, 0.5, {"y": Y}, gamma=gamma, **c)
    with torch.no_grad():
        policy(x_t, 0.5, {"y": torch.full((B,), NULL)}, gamma=gamma, **c)  # which is the prior


def test_a_control_of_a_single_gamma_takes_no_other(kind):
    policy, x_t, c = made(kind, None)
    with torch.no_grad():
        assert torch.equal(policy(x_t, 0.5, {"y": Y}, gamma=1.0, **c), policy(x_t, 0.5, {"y": Y}, **c))
    with pytest.raises(ValueError, match=r"'y' was trained for γ = 1 alone, got 2\. Train it with gammas"):
        policy(x_t, 0.5, {"y": Y}, gamma=2.0, **c)
    policy.gamma = 2.0  # of the run
    with torch.no_grad():
        policy(x_t, 0.5, {"y": Y}, gamma=2.0, **c)
    with pytest.raises(ValueError, match=r"'y' was trained for γ = 2 alone, got 1\."):
        policy(x_t, 0.5, {"y": Y}, gamma=1.0, **c)


def test_at_a_fixed_gamma_it_is_a_shift_of_the_embedding():
    """As at γ = 1: a table T0 of its rows does the same."""
    policy, x_t, c = made("lora")
    control = policy.controls["y"]
    with torch.no_grad():
        expected = policy(x_t, 0.5, {"y": Y}, gamma=3.0, **c)
        rows = control.embedded_at([control.table, *control.of_gamma], torch.tensor([0, 1]), 3.0)
        control.table.weight[:-1] = rows
        assert torch.equal(policy(x_t, 0.5, {"y": Y}, gamma=1.0, **c), expected)


def test_a_place_on_a_scale_has_a_gamma_too():
    policy, x_t, c = made("lora", values=("0", "1", "2"), scale=True)
    with torch.no_grad():
        x_hat = policy(x_t, 0.5, {"y": torch.tensor([0.5, 1.0, NULL, 2.0, 0.0, 1.5])}, gamma=2.0, **c)
        assert torch.equal(x_hat[2], policy.prior(x_t, 0.5, **c)[2])
        whole = policy(x_t, 0.5, {"y": torch.full((B,), 1)}, gamma=2.0, **c)
    torch.testing.assert_close(x_hat[1], whole[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gammas", [None, RANGE, (0.123456789, 2.5)])
def test_gammas_are_saved_and_loaded(kind, gammas, tmp_path):
    policy, x_t, c = made(kind, gammas)
    policy.controls["y"].save(tmp_path)
    about = json.loads((tmp_path / "control.json").read_text())
    assert about.get("gammas") == (gammas and list(gammas))
    assert ("gammas" in about) == (gammas is not None), "a file of a single γ is as before"
    prior = PRIORS[kind]()
    loaded = Policy(prior, load_control(tmp_path, prior))
    assert loaded.controls["y"].gammas == gammas
    with torch.no_grad():
        for gamma in (1.0, 2.0, 0.5) if gammas else (1.0,):
            x_hat = policy(x_t, 0.5, {"y": Y}, gamma=gamma, **c)
            assert torch.equal(loaded(x_t, 0.5, {"y": Y}, gamma=gamma, **c), x_hat)


@pytest.mark.parametrize("gammas", [(1.0,), (0.5, 0.5), (2.0, 1.0), (0.0, 1.0), (1.0, float("inf")), (0.5, 1.0, 2.0)])
def test_what_is_no_range_is_refused(kind, gammas):
    with pytest.raises(ValueError, match="0 < smallest < largest"):
        KINDS[kind]("y", "ab", PRIORS[kind](), gammas=gammas)


def test_half_of_the_draws_are_the_first_gamma():
    conditions, generator = Conditions({}, {"y": 2}, gammas=(1.0, 0.5, 2.0, 4.0)), torch.Generator().manual_seed(0)
    for n in (12, 60, 128):
        gamma = conditions.draw_gamma(n, generator)["gamma"]
        shares = [(gamma == value).sum().item() / n for value in conditions.gammas]
        assert shares == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6], abs=1.01 / n)
    again = [conditions.draw_gamma(60, torch.Generator().manual_seed(1))["gamma"] for _ in range(2)]
    assert torch.equal(*again)
    assert Conditions({}, {"y": 2}).draw_gamma(60, generator) == {}


def test_cells_number_pairs_and_gammas():
    conditions = Conditions({}, {"y": 2}, gammas=(1.0, 0.5, 2.0))
    pair = torch.tensor([0, 1, 0, 1])
    assert conditions.cells == 6
    assert conditions.cell(pair, torch.tensor([1.0, 1.0, 2.0, 0.5])).tolist() == [0, 1, 4, 3]
    assert Conditions({}, {"y": 2}).cell(pair) is pair
