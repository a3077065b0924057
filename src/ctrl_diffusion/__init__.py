"""CTRL: new conditional controls for pre-trained diffusion and flow models by KL-regularised reinforcement learning."""

from importlib import import_module
from importlib.metadata import version
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
    "Judges": "reward.classifiers",
    "Labelled": "learn.labelled",
    "LabelledImages": "data.labelled",
    "LoRAControl": "control.lora",
    "MPGD": "guide.reconstruction",
    "PPO": "learn.ppo",
    "Policy": "control.policy",
    "Prior": "prior.prior",
    "Rejection": "guide.selection",
    "Reward": "reward.reward",
    "Run": "run.run",
    "Support": "reward.support",
    "TDS": "guide.particles",
    "Weighted": "learn.weighted",
    "as_denoiser": "chain.denoise",
    "calibrate": "reward.fit",
    "certify": "evaluate.certificate",
    "exact_samples": "evaluate.resample",
    "fit": "learn.fit",
    "fit_classifier": "reward.fit",
    "fit_judges": "reward.classifiers",
    "fit_noisy": "guide.noisy",
    "paths": "chain.paths",
    "prior_table": "reward.reward",
    "read_images": "data.read",
    "report_classifier": "reward.fit",
    "resume_job": "job",
    "train_job": "job",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
