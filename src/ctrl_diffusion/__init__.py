"""CTRL: new conditional controls for pre-trained diffusion and flow models by KL-regularised reinforcement learning."""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers and editors, which run no code
    from .chain.denoise import Denoiser
    from .chain.paths import paths
    from .commands.jobs.train import resume_job, train_job
    from .control.conditions import Conditions
    from .control.lora import LoRAControl
    from .control.policy import Policy
    from .data.labelled import LabelledImages
    from .data.read import read_images
    from .evaluate.certificate import Certificate, certify
    from .evaluate.resample import exact_samples
    from .guide.classifier_guidance import ClassifierGuidance
    from .guide.free_guidance import FreeGuidance
    from .guide.noisy import fit_noisy
    from .guide.particles import TDS, FeynmanKac
    from .guide.reconstruction import DPS, MPGD
    from .guide.selection import BestOf, Importance, Rejection
    from .learn.adjoint import Adjoint
    from .learn.backprop import Backprop
    from .learn.contrast import Contrast
    from .learn.fit import fit
    from .learn.labelled import Labelled
    from .learn.ppo import PPO
    from .learn.weighted import Weighted
    from .prior.network import as_denoiser
    from .prior.prior import Prior
    from .reward.classifiers import fit_panel
    from .reward.classifiers import fit_panel as fit_judges
    from .reward.fit import (
        calibrate,
        fit_classifier,
        report_classifier,
    )
    from .reward.panel import Panel
    from .reward.panel import Panel as Judges
    from .reward.reward import Reward, prior_table
    from .reward.scorer import Classifier, Estimator
    from .reward.support import Support
    from .run.config import Config
    from .run.run import Run

__version__ = "0.2.0"

# where the public names live; loaded on first use, so that `ctrl --help` does not wait for torch
_MODULES = {
    "Denoiser": "chain.denoise", "paths": "chain.paths",
    "LabelledImages": "data.labelled", "read_images": "data.read",
    "as_denoiser": "prior.network", "Prior": "prior.prior",
    "Conditions": "control.conditions", "LoRAControl": "control.lora", "Policy": "control.policy",
    "fit_panel": "reward.classifiers", "calibrate": "reward.fit", "fit_classifier": "reward.fit",
    "report_classifier": "reward.fit", "Panel": "reward.panel", "Reward": "reward.reward",
    "prior_table": "reward.reward", "Classifier": "reward.scorer", "Estimator": "reward.scorer",
    "Support": "reward.support",
    "Adjoint": "learn.adjoint", "Backprop": "learn.backprop", "fit": "learn.fit", "Labelled": "learn.labelled",
    "PPO": "learn.ppo", "Contrast": "learn.contrast", "Weighted": "learn.weighted",
    "ClassifierGuidance": "guide.classifier_guidance", "FreeGuidance": "guide.free_guidance",
    "fit_noisy": "guide.noisy", "FeynmanKac": "guide.particles", "TDS": "guide.particles",
    "DPS": "guide.reconstruction", "MPGD": "guide.reconstruction", "BestOf": "guide.selection",
    "Importance": "guide.selection", "Rejection": "guide.selection",
    "Certificate": "evaluate.certificate", "certify": "evaluate.certificate", "exact_samples": "evaluate.resample",
    "Config": "run.config", "Run": "run.run",
    "resume_job": "commands.jobs.train", "train_job": "commands.jobs.train",
    "Judges": "reward.panel:Panel", "fit_judges": "reward.classifiers:fit_panel",  # names of 0.1
}  # fmt: skip
__all__ = [
    "DPS", "MPGD", "PPO", "TDS", "Adjoint", "Backprop", "BestOf", "Certificate", "Classifier", "ClassifierGuidance",
    "Conditions", "Config", "Contrast", "Denoiser", "Estimator", "FeynmanKac", "FreeGuidance", "Importance",
    "Judges", "Labelled", "LabelledImages", "LoRAControl", "Panel", "Policy", "Prior", "Rejection", "Reward", "Run",
    "Support", "Weighted", "as_denoiser", "calibrate", "certify", "exact_samples", "fit", "fit_classifier",
    "fit_judges", "fit_noisy", "fit_panel", "paths", "prior_table", "read_images", "report_classifier",
    "resume_job", "train_job",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _MODULES[name].partition(":")
    return getattr(import_module(f".{module}", __name__), attribute or name)


# modules of version 0.1 that documents, settings and scripts name, and where their contents live now
_MOVED = {
    "assets": "prior.source", "cli": "commands.app", "denoise": "prior.network", "rules": "data.rules",
    "schedule": "chain.schedule",
}  # fmt: skip


class _Moved:
    """Find a moved module under its old name."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, self, origin=__file__) if package == __name__ and old in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave the making of an empty module to Python."""

    def exec_module(self, module: ModuleType) -> None:
        contents = import_module(f".{_MOVED[module.__name__.rpartition('.')[2]]}", __name__)
        module.__getattr__ = lambda attribute: getattr(contents, attribute)

    def get_code(self, name: str) -> CodeType:
        """Give the entry point of `python -m ctrl_diffusion.cli`."""
        return compile(f"from {__name__}.commands.app import main\nmain()", name, "exec")


sys.meta_path.append(_Moved())
