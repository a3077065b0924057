"""CTRL: new conditional controls for pre-trained diffusion and flow models by KL-regularised reinforcement learning."""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import CodeType, ModuleType
from typing import Any

__version__ = version("ctrl-diffusion")

# where the public names live; loaded on first use, so that `ctrl --help` does not wait for torch
_HOME = {
    "Adjoint": "learn.adjoint",
    "Backprop": "learn.backprop",
    "BestOf": "guide.selection",
    "Certificate": "evaluate.certificate",
    "Classifier": "reward.scorer",
    "ClassifierGuidance": "guide.classifier_guidance",
    "Conditions": "control.conditions",
    "Config": "run.config",
    "DPS": "guide.reconstruction",
    "Denoiser": "chain.denoise",
    "Estimator": "reward.scorer",
    "FeynmanKac": "guide.particles",
    "FreeGuidance": "guide.free_guidance",
    "Importance": "guide.selection",
    "Labelled": "learn.labelled",
    "Judges": "reward.panel:Panel",  # its name in 0.1
    "LabelledImages": "data.labelled",
    "LoRAControl": "control.lora",
    "MPGD": "guide.reconstruction",
    "PPO": "learn.ppo",
    "Panel": "reward.panel",
    "Policy": "control.policy",
    "Prior": "prior.prior",
    "Rejection": "guide.selection",
    "Reward": "reward.reward",
    "Run": "run.run",
    "Support": "reward.support",
    "TDS": "guide.particles",
    "Weighted": "learn.weighted",
    "as_denoiser": "prior.network",
    "calibrate": "reward.fit",
    "certify": "evaluate.certificate",
    "exact_samples": "evaluate.resample",
    "fit": "learn.fit",
    "fit_classifier": "reward.fit",
    "fit_judges": "reward.classifiers:fit_panel",  # its name in 0.1
    "fit_panel": "reward.classifiers",
    "fit_noisy": "guide.noisy",
    "paths": "chain.paths",
    "prior_table": "reward.reward",
    "read_images": "data.read",
    "report_classifier": "reward.fit",
    "resume_job": "commands.jobs.train",
    "train_job": "commands.jobs.train",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(import_module(f".{module}", __name__), attribute or name)


# modules of version 0.1 that documents, settings and scripts name, and where their contents live now
_MOVED = {
    "assets": "prior.prior",
    "cli": "commands.app",
    "denoise": "prior.network",
    "rules": "data.rules",
    "schedule": "chain.schedule",
}


class _Moved:
    """Find a moved module under its old name."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, self, origin=__file__) if package == __name__ and old in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave the making of an empty module to Python."""

    def exec_module(self, module: ModuleType) -> None:
        home = import_module(f".{_MOVED[module.__name__.rpartition('.')[2]]}", __name__)
        module.__getattr__ = lambda attribute: getattr(home, attribute)

    def get_code(self, name: str) -> CodeType:
        """Give the entry point of `python -m ctrl_diffusion.cli`."""
        return compile(f"from {__name__}.commands.app import main\nmain()", name, "exec")


sys.meta_path.append(_Moved())
