import math

import pytest
import torch

from ctrl_diffusion.chain.codec import Codec
from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.data.labelled import LabelledImages
from ctrl_diffusion.data.labels import LabelSpace
from ctrl_diffusion.evaluate.judge import SecondOpinion
from ctrl_diffusion.evaluate.scores import score_samples
from ctrl_diffusion.reward.classifiers import Choice, ClassifierSettings, fit_panel, open_choices
from ctrl_diffusion.reward.panel import Panel
from ctrl_diffusion.reward.reward import Among, Reward
from ctrl_diffusion.reward.scorer import Architecture

FAST = ClassifierSettings(head="ordinal", grid=1, depth=1, updates=300)


def tagged(data):
    """The same images, each with its number written into the first pixel, too faintly to matter."""
    x = data.x.clone()
    x[:, 0, 0, 0] = torch.arange(len(x)) * 1e-6 - 1
    return LabelledImages(x, data.labels, data.values)


@pytest.mark.parametrize(("elsewhere", "sizes"), [(False, [200, 50, 75, 175]), (True, [350, 75, 75, 1297])])
def test_no_label_serves_two_masters(monkeypatch, elsewhere, sizes):
    """p̂, its calibration, the judge and the held-out figures each have images of their own."""
    from ctrl_diffusion.reward import classifiers as module

    seen = {}

    def spy(name):
        original = getattr(module, name)

        def call(*arguments, **options):
            x = arguments[0] if name == "fit_classifier" else arguments[1]
            seen.setdefault(name, []).append({round((float(v) + 1) * 1e6) for v in x[:, 0, 0, 0]})
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    for name in ("fit_classifier", "calibrated_nll"):
        spy(name)
    ((data, others),) = labelled_digits("ink", 0)
    labels = {name: torch.cat([data.labels[name], others.labels[name]]) for name in data.labels}
    both = tagged(LabelledImages(torch.cat([data.x, others.x]), labels, data.values))
    data, others = both[range(500)], both[range(500, len(both))]
    _, held_out = fit_panel(data, "ink", settings=FAST, judge_data=others if elsewhere else None)
    reward, judge = seen["fit_classifier"]
    parts = [reward, seen["calibrated_nll"][0], {round((float(v) + 1) * 1e6) for v in held_out.x[:, 0, 0, 0]}, judge]
    assert [len(part) for part in parts] == sizes
    assert len(set.union(*parts)) == sum(sizes)


def test_save_and_load(tmp_path):
    data = labelled_digits("ink", 0)[0][0]
    panel, held_out = fit_panel(data, "ink", "digit", settings=FAST)
    panel.save(tmp_path)
    again = Panel.load(tmp_path)
    assert (again.control, again.values, again.shape) == ("ink", ("1", "2", "3", "4"), (1, 8, 8))
    figures, before = ({k: v for k, v in one.metrics().items() if v is not None} for one in (again, panel))
    assert figures == pytest.approx(before, rel=1e-5)
    for name in ("classifier", "judge", "reader"):
        assert torch.equal(getattr(again, name).log_prob(held_out.x), getattr(panel, name).log_prob(held_out.x))
    assert torch.equal(again.outside(held_out.x), panel.outside(held_out.x))
    assert panel.judge_accuracy > 0.6
    assert panel.reader_accuracy > 0.8
    (tmp_path / "classifier.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        Panel.load(tmp_path)
    with pytest.raises(ValueError, match="holds no classifier"):
        Panel.load(tmp_path / "missing")


def test_a_classifier_no_better_than_chance_is_refused():
    data = labelled_digits("ink", 0)[0][0]
    shuffled = data.labels["ink"][torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    wrong = LabelledImages(data.x, {"ink": shuffled}, data.values)
    with pytest.raises(ValueError, match="not clearly better than chance"):
        fit_panel(wrong, "ink", settings=FAST)


def test_what_is_left_open_is_tried():
    everything = ClassifierSettings()
    assert len(open_choices(everything, LabelSpace(("low", "high")))) == 3
    assert len(open_choices(everything, LabelSpace(("1", "2", "3")))) == 6
    assert {choice.architecture.head for choice in open_choices(everything, LabelSpace(("1", "2")))} == {"categorical"}
    assert open_choices(FAST, LabelSpace(("1", "2", "3"))) == [Choice(Architecture("ordinal", 1, 1))]
    assert len(open_choices(ClassifierSettings(backbone="eyes"), LabelSpace(("1", "2", "3")))) == 4
    assert open_choices(ClassifierSettings(factory="mine:net"), LabelSpace(("1", "2", "3"))) == [Choice(Architecture())]


def flipped(n, seed):
    """Noisy images, brighter on one side; y is that side for c = 0 and the other one for c = 1."""
    generator = torch.Generator().manual_seed(seed)
    c, side = torch.randint(2, (2, n), generator=generator)
    x = 0.2 * torch.randn(n, 1, 8, 8, generator=generator)
    x[..., :4] += torch.where(side == 0, 0.4, -0.4)[:, None, None, None]
    return LabelledImages(x, {"y": side ^ c, "c": c}, {"y": ("a", "b"), "c": ("0", "1")})


CONDITIONAL = ClassifierSettings(head="categorical", grid=4, depth=1, augment="none", updates=400, conditional=True)


def test_what_turns_round_with_c_is_learned_given_c(tmp_path):
    """The images do not show c: without it y is a coin."""
    data = flipped(400, 0)
    with pytest.raises(ValueError, match="not clearly better than chance"):
        fit_panel(data, "y", "c", settings=CONDITIONAL.model_copy(update={"conditional": False}))
    panel, held_out = fit_panel(data, "y", "c", settings=CONDITIONAL)
    assert panel.quality.accuracy > 0.95
    assert panel.judge_accuracy > 0.95
    assert panel.quality.chance_nll == pytest.approx(math.log(2), abs=0.05)
    panel.save(tmp_path)
    again = Panel.load(tmp_path)
    assert torch.equal(again.log_prob(held_out), panel.log_prob(held_out))
    # the reward hands it c, also where the prior numbers its classes otherwise
    x, y, c = held_out.x, held_out.labels["y"], held_out.labels["c"]
    reward = Reward({"y": again.classifier})
    assert float((reward.table("y", x, {"c": c}).argmax(1) == y).float().mean()) > 0.95
    assert float((reward.table("y", x, {"c": 1 - c}).argmax(1) == y).float().mean()) < 0.05
    renumbered = Reward({"y": Among(again.classifier, [3, 7])})
    torch.testing.assert_close(renumbered(x, {"y": y}, {"c": 3 + 4 * c}), reward(x, {"y": y}, {"c": c}))
    with pytest.raises(ValueError, match=r"knows c in \[3, 7\], got \[0, 1\]"):
        renumbered(x, {"y": y}, {"c": c})
    with pytest.raises(ValueError, match="give c"):
        reward(x, {"y": y})
    with pytest.raises(ValueError, match=r"c must lie in 0 … 1, got \[0, 5\]"):
        again.classifier.log_prob(x[:2], torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="leave c out"):
        again.reader.log_prob(x, c)
    # so does whoever scores samples: two for each (c, y) in turn
    rows = torch.cat([((y == k) & (c == g)).nonzero()[:2, 0] for g in (0, 1) for k in (0, 1)])
    score = score_samples(
        SecondOpinion({}, judges={"y": again.judge}).measure(x[rows], Conditions({"c": torch.arange(2)}, {"y": 2})),
        Conditions({"c": torch.arange(2)}, {"y": 2}),
    )
    assert score.accuracy == score.judge_accuracy > 0.8


def test_a_conditional_classifier_needs_its_condition():
    with pytest.raises(ValueError, match="needs the column of c"):
        fit_panel(flipped(100, 0), "y", settings=CONDITIONAL)
    data = flipped(100, 0)
    data.labels["c"] = (torch.arange(100) < 3).long()
    with pytest.raises(ValueError, match="c = '1' has 3 example"):
        fit_panel(data, "y", "c", settings=CONDITIONAL)


def test_a_classifier_may_look_at_latents_while_its_judge_looks_at_images(tmp_path):
    """Reader, judge and their accuracies are of images; p̂, its report and the region it was fitted on of latents."""
    data = labelled_digits("ink", 0)[0][0]
    asked = []

    def encode(images):
        asked.append(len(images))
        return torch.nn.functional.avg_pool2d(images, 2).repeat(1, 3, 1, 1)

    settings = ClassifierSettings(head="ordinal", grid=1, depth=1, updates=300, latents=True)
    panel, held_out = fit_panel(data, "ink", "digit", settings=settings, encode=encode)
    assert panel.shape == (1, 8, 8)
    assert held_out.x.shape[1:] == (3, 4, 4)
    # each label of p̂'s three parts is encoded once; the judge's part is not
    assert sum(asked) == 200 + 50 + 75
    assert [c.shape["channels"] for c in (panel.classifier, panel.judge, panel.reader)] == [3, 1, 1]
    panel.save(tmp_path)
    again = Panel.load(tmp_path)
    assert again.latent
    assert torch.equal(again.outside(held_out.x), panel.outside(held_out.x))
    # both rewards add, the images are decoded once for the one that needs them
    decoded = []

    class Doubling(Codec):
        latent = True

        def decode(self, latents):
            decoded.append(len(latents))
            return latents[:, :1].repeat_interleave(2, 2).repeat_interleave(2, 3)

    z, y = torch.randn(5, 3, 4, 4), torch.arange(5) % 4
    reward = Reward({"latent": again.classifier, "image": panel.judge}, codec=Doubling())
    rows = torch.arange(5)
    expected = again.classifier.log_prob(z)[rows, y] + panel.judge.log_prob(Doubling().decode(z))[rows, y]
    decoded.clear()
    torch.testing.assert_close(reward(z, {"latent": y, "image": y}), expected)
    assert decoded == [5]
    reward(z, {"latent": y})
    assert decoded == [5]


def test_latents_are_refused_where_there_are_none_or_they_would_be_turned():
    data = labelled_digits("ink", 0)[0][0]
    with pytest.raises(ValueError, match="p̂ looks at latents, but there is no prior on latents. Leave it out"):
        fit_panel(data, "ink", settings=ClassifierSettings(latents=True))
    for wrong in ({"backbone": "x"}, {"augment": "half_turn"}, {"augment": "any_side_up"}):
        with pytest.raises(ValueError, match="latents excludes a backbone and turning"):
            ClassifierSettings(latents=True, **wrong)
