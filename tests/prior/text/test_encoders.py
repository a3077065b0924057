"""Text encoders are known by all that an encoded prompt depends on, and by nothing else."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.text.encoders import fingerprint, vocabulary_of
from tests.prior.priors import SIZE


def opened(folders, name, folder=None):
    return Prior.from_pretrained(folder or folders[name][0], SIZE.get(name)).text


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("SD 1", {"text_encoder": 16}),
        ("SDXL", {"text_encoder": 16, "text_encoder_2": 16}),
        ("SD 3", {"text_encoder": 16, "text_encoder_2": 16}),  # its third was left out
        ("Flux", {"text_encoder": 16, "text_encoder_2": 512}),
        ("PixArt-alpha", {"text_encoder": 120}),
        ("PixArt-Sigma", {"text_encoder": 300}),
        ("AuraFlow", {"text_encoder": 256}),
        ("Z-Image", {"text_encoder": 512 - 19}),  # the template has the words user and assistant, three signs, lines
    ],
)
def test_every_family_names_its_encoders_and_their_windows(folders, tmp_path, name, windows):
    """A copy in another folder has the same fingerprint, and so have encoders in use."""
    text = opened(folders, name)
    assert {key: encoder.window for key, encoder in text.encoders.items()} == windows
    before = fingerprint(text.encoders)
    text.encode(["two", "a seven"], "" if name != "Flux" else None)
    shutil.copytree(folders[name][0], tmp_path / "copy")
    assert fingerprint(text.encoders) == before == fingerprint(opened(folders, name, tmp_path / "copy").encoders)


def shift(encoder):
    with torch.no_grad():
        next(encoder.module.parameters())[0, 0] += 1e-3


def rename(encoder):
    encoder.tokenizer.add_tokens(["zebra"])


@pytest.mark.parametrize(
    "change",
    [
        shift,
        lambda encoder: encoder.module.half(),
        lambda encoder: encoder.module.config.update({"hidden_act": "relu"}),
        lambda encoder: setattr(encoder.tokenizer, "pad_token", "a"),
        rename,
    ],
    ids=["weights", "dtype", "activation", "padding", "vocabulary"],
)
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_whatever_changes_the_rows_changes_the_fingerprint(folders, part, change):
    text = opened(folders, "SDXL")
    before = fingerprint(text.encoders)
    change(text.encoders[part])
    assert fingerprint(text.encoders) != before


def test_the_template_of_a_chat_is_known(folders):
    """What a prompt is put into changes its rows."""
    text = opened(folders, "Z-Image")
    before = fingerprint(text.encoders)
    text.encoders["text_encoder"].tokenizer.chat_template += "!"
    assert fingerprint(text.encoders) != before


def test_a_slow_tokenizer_is_known_by_its_files(tmp_path):
    def tokenizer(words, **options):
        def save_vocabulary(folder):
            file = f"{folder}/vocab.txt"
            with open(file, "w") as out:
                out.write(words)
            return (file,)

        about = {"pad_token": "<pad>", "padding_side": "right", "truncation_side": "right", **options}
        return SimpleNamespace(save_vocabulary=save_vocabulary, get_added_vocab=dict, **about)

    assert vocabulary_of(tokenizer("a b")) == vocabulary_of(tokenizer("a b"))
    assert vocabulary_of(tokenizer("a b")) != vocabulary_of(tokenizer("a c"))
    assert vocabulary_of(tokenizer("a b")) != vocabulary_of(tokenizer("a b", padding_side="left"))
