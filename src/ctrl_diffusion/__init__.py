"""CTRL: new conditional controls for pre-trained diffusion and flow models by KL-regularised reinforcement learning."""

from importlib.metadata import version

__version__ = version("ctrl-diffusion")
