"""A pipeline folder that is damaged or odd is one line before anything is fitted; what is undone or chosen is said."""

import shutil
import warnings

import pytest
import torch
from diffusers import AutoencoderTiny

from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.scheduler import not_followed
from tests.prior.odd import (
    ODD, as_variant, config, put, renamed, rewrite, scheduler, sharded, text, tiny_vae, unet, with_added,
)  # fmt: skip
from tests.prior.priors import PROMPTS, SIZE


@pytest.fixture
def odd(folders, tmp_path):
    """Return a changed copy of a family's folder, beside those of the others."""

    def made(name, change):
        shutil.copytree(folders[name][0], tmp_path / "odd")
        if not (tmp_path / "SD 1").exists():
            (tmp_path / "SD 1").symlink_to(folders["SD 1"][0])
        change(tmp_path / "odd")
        return tmp_path / "odd"

    return made


@pytest.mark.parametrize("name", ODD)
def test_an_odd_pipeline_is_one_line_and_nothing_is_written(odd, ctrl_here, tmp_path, name):
    """By `inspect` and `train` alike, with the folder, the part and what to do."""
    family, change, message = ODD[name]
    folder, run = odd(family, change), tmp_path / "run"
    size = [] if family not in SIZE else ["--size", *SIZE[family]]
    (tmp_path / "prompts.txt").write_text("two\n")
    prompts = [] if family in ("DDPM", "DiT") else ["--prompts", tmp_path / "prompts.txt"]
    (tmp_path / "size.yaml").write_text(f"size: {list(SIZE[family])}\n" if size else "{}")
    training = ["--data", tmp_path, "--control", "dark", "--config", tmp_path / "size.yaml", *prompts, "--out", run]
    for command in (["inspect", folder, *size], ["train", "--prior", folder, *training]):
        done = ctrl_here(*command)
        with pytest.MonkeyPatch.context():
            lines = [line for line in done.stderr.splitlines() if not line.startswith("ctrl: warning: ")]
        assert done.returncode == 2, done.stderr
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith(f"ctrl: {folder}")
        assert len(lines[0]) < 700
        import re

        assert re.search(message, lines[0]), lines[0]
    assert not run.exists()
