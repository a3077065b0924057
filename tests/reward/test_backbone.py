import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from ctrl_diffusion.data.labelled import LabelledImages, write_imagefolder
from ctrl_diffusion.reward.backbone import Backbone, Elsewhere, Frozen, Own
from ctrl_diffusion.reward.classifiers import ClassifierSettings, fit_panel, settings_of
from ctrl_diffusion.reward.panel import Panel
from ctrl_diffusion.reward.reward import Reward
from ctrl_diffusion.run.config import Config, read_settings

TINY = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
NETWORKS = {
    "clip_vision": lambda: CLIPVisionModel(CLIPVisionConfig(**TINY)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**TINY)),
    "vit": lambda: ViTModel(ViTConfig(**TINY)),
    "vit_without_pooling": lambda: ViTModel(ViTConfig(**TINY), add_pooling_layer=False),
    "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 32], depths=[1, 1])),
}


def saved(folder, name):
    """A tiny network of random weights as `save_pretrained` leaves it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        NETWORKS[name]().eval().save_pretrained(folder)
    return str(folder)


def sided(n, channels=1, seed=0):
    """Noisy images, brighter on one side, which is y."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = 0.2 * torch.randn(n, channels, 8, 8, generator=generator)
    x[..., :4] += torch.where(y == 0, 0.6, -0.6)[:, None, None, None]
    return LabelledImages(x, {"y": y}, {"y": ("left", "right")})


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", ["backbone", "factory", "grid"])
def test_the_settings_of_a_saved_classifier_are_those_it_was_fitted_with(tmp_path, monkeypatch, kind, known):
    """Of an older folder what the network shows, with a line on the rest: never another kind of network."""
    (tmp_path / "ownnet.py").write_text(
        "from torch import nn\ndef make(k, shape):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, k))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    choice = {
        "backbone": lambda: {"backbone": saved(tmp_path / "eyes", "vit"), "head": "categorical"},
        "factory": lambda: {"factory": "ownnet:make"},
        "grid": lambda: {"grid": 2, "depth": 3, "head": "categorical", "augment": "none"},
    }[kind]()
    settings = ClassifierSettings(**choice, updates=40, balanced=True)
    panel, _ = fit_panel(sided(120), "y", settings=settings, check=False)
    panel.save(tmp_path / "saved")
    about = json.loads((tmp_path / "saved" / "classifier.json").read_text())
    if not known:
        del about["settings"]
        (tmp_path / "saved" / "classifier.json").write_text(json.dumps(about))
    again = Panel.load(tmp_path / "saved", trust=True)
    if known:
        assert settings_of(again, ClassifierSettings()) == settings
        return
    with pytest.warns(UserWarning, match="classifier of 'y' does not say how it was fitted: .* updates 7 and augment"):
        found = settings_of(again, ClassifierSettings(updates=7))
    assert found.updates == 7
    assert found.balanced
    assert {name: getattr(found, name) for name in choice if name != "augment"} == {
        name: value for name, value in choice.items() if name != "augment"
    }


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_head_on_frozen_features(tmp_path, name, channels):
    """It is fitted, calibrated and saved as ours are, without the network, and its gradient reaches x."""
    folder = saved(tmp_path / "eyes", name)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    settings = ClassifierSettings(backbone=folder, updates=200)
    panel, held_out = fit_panel(sided(200, channels), "y", settings=settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert panel.quality.accuracy > 0.8
    assert panel.judge_accuracy > 0.8
    panel.save(tmp_path / "saved")
    kept = (tmp_path / "saved" / "classifier.safetensors").stat().st_size
    assert kept < 10_000, "the network itself is not saved"
    again = Panel.load(tmp_path / "saved")
    torch.testing.assert_close(again.log_prob(held_out), panel.log_prob(held_out))
    assert isinstance(again.judge, Backbone)
    x = held_out.x[:4].clone().requires_grad_()
    Reward({"y": again.classifier})(x, {"y": held_out.labels["y"][:4]}).sum().backward()
    assert (x.grad[:, : min(channels, 3)] != 0).flatten(1).any(1).all()
    assert not any(p.requires_grad for p in again.classifier.parameters())


def test_the_features_are_the_networks_own_on_images_prepared_as_it_wants_them(tmp_path):
    folder = saved(tmp_path, "clip_vision")
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    processor = {"image_processor_type": "CLIPImageProcessor", "image_mean": mean, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, "crop_size": 16}))
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    network = CLIPVisionModel.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(Frozen(folder).raw(2 * x - 1), network(pixels).pooler_output)
    # a smaller image is stretched, also one that is not square
    assert Frozen(folder).raw(torch.zeros(2, 1, 8, 6)).shape == (2, 32)


def test_a_pooling_that_was_never_trained_is_not_used(tmp_path):
    folder = saved(tmp_path, "vit_without_pooling")
    network = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        torch.testing.assert_close(Frozen(folder).raw(x), network(x).last_hidden_state.mean(1))


def test_of_two_towers_the_eyes_are_taken(tmp_path):
    words = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**words, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config=TINY)).save_pretrained(tmp_path)
    frozen = Frozen(str(tmp_path))
    assert frozen.size == (16, 16)
    assert frozen.raw(torch.zeros(2, 1, 8, 8)).shape == (2, 32)


def test_a_backbone_that_is_gone_or_another_one_is_one_line(tmp_path):
    folder = saved(tmp_path / "eyes", "dinov2")
    panel, _ = fit_panel(sided(200), "y", ruler=True, settings=ClassifierSettings(backbone=folder, updates=100))
    panel.save(tmp_path / "saved")
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"^the backbone .*eyes cannot be read: [^\n]*$"):
        Panel.load(tmp_path / "saved")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        NETWORKS["dinov2"]().save_pretrained(folder)
    with pytest.raises(ValueError, match="is not the one the head was fitted on"):
        Panel.load(tmp_path / "saved")


def test_a_backbone_that_is_a_pickle_is_not_loaded(tmp_path):
    folder = Path(saved(tmp_path / "eyes", "vit"))
    torch.save(NETWORKS["vit"]().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(Elsewhere, match=r"cannot be read: .*safetensors"):
        Frozen(str(folder))


def test_a_backbone_given_c(tmp_path):
    """y is the bright side for c = 0 and the other for c = 1."""
    data = sided(300)
    c = torch.randint(2, (300,), generator=torch.Generator().manual_seed(1))
    data = LabelledImages(data.x, {"y": data.labels["y"] ^ c, "c": c}, {**data.values, "c": ("0", "1")})
    data.x[:, :, 0] = (c * 1.6 - 0.8)[:, None, None]
    settings = ClassifierSettings(backbone=saved(tmp_path, "vit"), updates=400, conditional=True)
    assert fit_panel(data, "y", "c", ruler=True, settings=settings)[0].quality.accuracy > 0.8


def test_a_backbones_folder_is_relative_to_its_config(tmp_path):
    saved(tmp_path / "eyes", "vit")
    path = tmp_path / "config.yaml"
    path.write_text("classifier: {backbone: eyes}")
    assert read_settings(path)["classifier"]["backbone"] == str(tmp_path / "eyes")
    path.write_text("classifier: {backbone: openai/clip-vit-base-patch32}")
    assert read_settings(path)["classifier"]["backbone"] == "openai/clip-vit-base-patch32"
    path.write_text("classifier: none")
    assert read_settings(path) == {"classifier": "none"}


OWN = """
import torch
from torch import nn

def net(classes, shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))

def wide(classes, shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes + 1))

def scalar(classes, shape):
    return nn.Identity()

def fails(classes, shape):
    raise RuntimeError("no weights")

def chokes(classes, shape):
    return nn.Linear(3, classes)

def function(classes, shape):
    return lambda x: x

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(OWN)
    (tmp_path / "broken_networks.py").write_text("import nothing_of_that_name")
    monkeypatch.chdir(tmp_path)


def test_a_network_of_ones_own(own, tmp_path):
    settings = ClassifierSettings(factory="my_networks:net", updates=300)
    panel, held_out = fit_panel(sided(200), "y", settings=settings)
    assert panel.quality.accuracy > 0.9
    assert panel.judge_accuracy > 0.9
    other, _ = fit_panel(sided(200), "y", settings=settings)
    assert torch.equal(other.log_prob(held_out), panel.log_prob(held_out)), "one seed, one classifier"
    assert float(panel.classifier.temperature) != 1.0
    panel.save(tmp_path / "saved")
    with pytest.raises(Elsewhere, match=r"runs code: p̂ is made by my_networks:net\. If you know it, pass --trust"):
        Panel.load(tmp_path / "saved")
    again = Panel.load(tmp_path / "saved", trust=True)
    assert isinstance(again.classifier, Own)
    assert torch.equal(again.log_prob(held_out), panel.log_prob(held_out))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("my_networks", "'my_networks' is not of the form module:function"),
        ("missing_networks:net", "cannot import missing_networks: No module named"),
        ("broken_networks:net", "cannot import broken_networks: No module named 'nothing_of_that_name'"),
        ("my_networks:missing", "my_networks has no function missing"),
        ("my_networks:number", "my_networks has no function number"),
        ("my_networks:fails", r"my_networks:fails\(2, \(1, 8, 8\)\) failed: no weights"),
        ("my_networks:function", "must return an nn.Module, got function"),
        ("my_networks:chokes", r"the network fails on x \(2, 1, 8, 8\): "),
        ("my_networks:wide", r"must give logits \(B, 2\), got \(2, 3\) for B = 2"),
        ("my_networks:scalar", r"must give logits \(B, 2\), got \(2, 1, 8, 8\)"),
    ],
)
def test_a_factory_that_cannot_serve_is_one_line(own, factory, message):
    with pytest.raises(Elsewhere, match=f"^classifier.factory: .*{message}") as caught:
        Own(factory, 2, (1, 8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("also", [{"backbone": "eyes"}, {"conditional": True}, {"head": "ordinal"}])
def test_a_factory_has_its_own_head_and_features(also):
    given = {"prior": "digits", "data": "x", "control": "y", "classifier": {"factory": "a:b", **also}}
    with pytest.raises(ValueError, match="factory excludes backbone, conditional and an ordinal head"):
        Config.from_values(given)


def test_the_command_takes_the_kind_from_a_config(tmp_path, ctrl_here):
    saved(tmp_path / "eyes", "dinov2")
    write_imagefolder(tmp_path / "photos", sided(200))
    config = tmp_path / "mine.yaml"
    config.write_text("classifier: {backbone: eyes, updates: 100}")
    fit = ("classifier", tmp_path / "photos", "--control", "y", "--quiet", "--config", config)
    done = ctrl_here(*fit, "--out", tmp_path / "fitted")
    assert done.returncode == 0, done.stderr
    assert "frozen features of" in (tmp_path / "fitted" / "report.html").read_text()
    assert isinstance(Panel.load(tmp_path / "fitted").classifier, Backbone)
    config.write_text("classifier: {backbone: nowhere/at-all}")
    done = ctrl_here(*fit, "--out", tmp_path / "other")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("ctrl: the backbone nowhere/at-all cannot be read"), done.stderr
    config.write_text("classifier: {backbon: eyes}")
    assert "classifier.backbon: Extra inputs are not permitted" in ctrl_here(*fit, "--out", tmp_path / "x").stderr
