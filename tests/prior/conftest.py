"""Tiny pipelines of every family, saved once."""

import warnings

import diffusers
import pytest
from pipelines import BUILDERS, saved


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Of every family a pipeline as diffusers saves it."""
    root = tmp_path_factory.mktemp("families")
    diffusers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return {name: (root / name, saved(name, root / name)) for name in BUILDERS}
