"""Compute p̂(y | x) by networks from elsewhere: a vision network of transformers (CLIP, DINOv2, ViT, …), or your own.

On the first only a linear head is fitted, to features that are computed once and standardised; a gradient reaches x
through the frozen network. Saved are the head, the scale of the features and the network's name or folder.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from ..data.rules import function_of
from .scorer import Classifier, Scorer, of_embedding


class Elsewhere(ValueError):
    """Say in one line that what a classifier needs from elsewhere is missing or wrong."""


@contextmanager
def required(failure: str, errors: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Turn errors into one `Elsewhere` that says what failed."""
    try:
        yield
    except errors as error:
        raise Elsewhere(" ".join(f"{failure}: {error}".split())) from error


class Frozen(nn.Module):
    """Compute standardised features (B, F) of x (B, C, H, W) in [−1, 1] by a frozen network.

    x is stretched to the network's size (bicubic, antialiased), grey is repeated and an alpha channel left out. Size,
    mean and deviation of a pixel are those of the saved image processor; without one the size is the config's and x
    stays in [−1, 1]. The features are the network's own pooling (`pooler_output`: CLIP's and DINOv2's normalised class
    token, the mean of a convolutional network), or the mean of the last tokens if it has no trained one. `source` is a
    folder or a hub id that `AutoModel` opens, else `Elsewhere`; of two towers the vision tower is taken.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = str(Path(source).resolve()) if Path(source).is_dir() else source
        errors = (OSError, ValueError, KeyError, ImportError, RuntimeError)
        # a pooling that the checkpoint lacks is initialised at random
        with required(f"the backbone {source} cannot be read", errors), torch.random.fork_rng(devices=[]):
            options = {"output_loading_info": True, "use_safetensors": True, "trust_remote_code": False}
            network, info = AutoModel.from_pretrained(self.source, **options)
            self.network = getattr(network, "vision_model", network).eval().requires_grad_(False)
        self.pooled = not any("pooler" in key for key in info["missing_keys"])
        try:
            processor, _ = ImageProcessingMixin.get_image_processor_dict(self.source)
        except OSError:
            processor = {}
        size = processor.get("crop_size") or processor.get("size") or getattr(self.network.config, "image_size", 224)
        if isinstance(size, dict):
            size = (size.get("height") or size["shortest_edge"], size.get("width") or size["shortest_edge"])
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.tensor(processor.get(name, [0.5] * 3)).view(3, 1, 1), persistent=False)
        failure = f"the backbone {source} has no features of images"
        with required(failure, (TypeError, ValueError, AttributeError, RuntimeError)):
            grey = self.raw(torch.zeros(1, 3, 8, 8))[0]
        self.register_buffer("grey", grey)  # a fingerprint of the network
        self.register_buffer("mean", torch.zeros_like(grey))
        self.register_buffer("std", torch.ones_like(grey))

    def raw(self, x: Tensor) -> Tensor:
        """Return the network's features (B, F), not standardised."""
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]
        x = F.interpolate((x + 1) / 2, self.size, mode="bicubic", antialias=True)
        out = self.network(pixel_values=(x - self.image_mean) / self.image_std)
        if self.pooled and getattr(out, "pooler_output", None) is not None:
            return out.pooler_output.flatten(1)
        last = out.last_hidden_state  # tokens (B, N, F), or a map (B, F, H, W)
        return last.mean(1) if last.ndim == 3 else last.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.raw(x) - self.mean) / self.std

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Return features (n, F) of x (n, C, H, W), a few at a time, on the CPU."""
        rows = torch.arange(len(x)).split(Backbone.at_once)
        return torch.cat([self(x[few].to(self.grey.device)).cpu() for few in rows])

    def fit(self, features: Tensor) -> Tensor:
        """Set mean and deviation from features (n, F) not yet standardised; return them standardised."""
        mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
        self.mean, self.std = mean.to(self.grey.device), std.to(self.grey.device)
        return (features - mean) / std


class Backbone(Scorer):
    """Compute p̂(y | x) by a linear head on `Frozen` features (B, width), or on x itself with an identity as trunk."""

    at_once = 32
    borrowed = "trunk.network."

    def __init__(
        self, backbone: str, width: int, classes: int, head: str = "categorical", balanced: bool = False,
        conditions: int = 0, trunk: nn.Module | None = None, embedding: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(trunk or Frozen(backbone), width, classes, head, balanced, conditions, embedding)
        self.shape = {"backbone": backbone, "width": width, "classes": classes, "head": head, "balanced": balanced}
        self.shape |= {"conditions": conditions, **of_embedding(embedding)}
        self.described = f"the {width} frozen features of {backbone}, linear head: {head}"

    @classmethod
    def load(cls, folder: Path) -> "Backbone":
        """Read a saved head and its backbone; raise `Elsewhere` if that is gone, or is not the one it was."""
        classifier = super().load(folder)
        trunk, grey = classifier.trunk, classifier.trunk.raw(torch.zeros(1, 3, 8, 8))[0]
        if grey.shape != trunk.grey.shape or not torch.allclose(grey, trunk.grey, rtol=1e-2, atol=1e-2):
            raise Elsewhere(f"the backbone {trunk.source} is not the one the head was fitted on.")
        return classifier


class Own(Scorer):
    """Compute p̂(y | x) by a network of the user's own; its logits are also its features.

    `factory` is "module:function", importable or beside the working directory; called with K and (C, H, W), it returns
    an `nn.Module` from x (B, C, H, W) in [−1, 1] to logits (B, K), else `Elsewhere` says what is wrong.
    """

    def __init__(self, factory: str, classes: int, input: Sequence[int], balanced: bool = False) -> None:
        name, _, attribute = factory.partition(":")
        if not name or not attribute:
            raise Elsewhere(f"classifier.factory: {factory!r} is not of the form module:function.")
        with required(f"classifier.factory: cannot import {name}"):
            make = function_of(factory)
        if not callable(make):
            raise Elsewhere(f"classifier.factory: {name} has no function {attribute}.")
        with required(f"classifier.factory: {factory}({classes}, {tuple(input)}) failed"):
            network = make(classes, tuple(input))
        if not isinstance(network, nn.Module):
            raise Elsewhere(f"classifier.factory: {factory} must return an nn.Module, got {type(network).__name__}.")
        shape = ", ".join(map(str, input))
        with required(f"classifier.factory: the network fails on x (2, {shape})"), torch.no_grad():
            logits = network.eval()(torch.zeros(2, *input))
        if not isinstance(logits, Tensor) or logits.shape != (2, classes):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise Elsewhere(f"classifier.factory: the network must give logits (B, {classes}), got {got} for B = 2.")
        super().__init__(network, 0, classes, balanced=balanced)
        self.shape = {"factory": factory, "classes": classes, "input": list(input), "balanced": balanced}
        self.described = f"the network that {factory} makes"


KINDS = {kind.__name__: kind for kind in (Classifier, Own, Backbone)}


def load_classifier(folder: Path, trust: bool = False) -> Scorer:
    """Read a saved classifier of any kind; with `trust` run the code that it names, else raise `Elsewhere`."""
    about = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
    if about["kind"] == Own.__name__ and not trust:
        factory = about["shape"]["factory"]
        raise Elsewhere(f"{folder} runs code: p̂ is made by {factory}. If you know it, pass --trust (trust=True).")
    return KINDS[about["kind"]].load(folder)
