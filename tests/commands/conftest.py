"""Runs that several commands' tests look at; no test may change them."""

import pytest
from tiny import TINY

from ctrl_diffusion.commands.jobs.demo import demo_job


@pytest.fixture(scope="session")
def both(once):
    """A tiny run with two controls from two datasets."""
    settings = {**TINY, "learners": ["weighted", "adjoint"]}
    return once("both", lambda folder: demo_job(settings, folder, controls="ink,slant"))
