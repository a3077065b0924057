"""The two labels of compressibility_aesthetic.yaml: functions from an image as the prior makes it to 0 or 1.

`size` is 1 where the image as a JPEG of quality 95 takes at most 70 kB; `aesthetic` is 1 where LAION's aesthetic
predictor gives at least 5.7. Both are `functools.partial`s: other cuts, or weights that lie elsewhere, are one line in
a file of yours:

    aesthetic = functools.partial(scores.at_least, cut=5.2, score=scores.Aesthetic("my-clip", "my-head"))
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ctrl_diffusion.data.rules import Rule, jpeg_size

CLIP = "openai/clip-vit-large-patch14"
# sac+logos+ava1-l14-linearMSE of github.com/christophschuhmann/improved-aesthetic-predictor, here as safetensors
HEAD, REVISION = "ttj/sac-logos-ava1-l14-linearMSE", "1e77fa05081323d99725fc40a9bf9f88180490e7"


class Aesthetic:
    """Score images by LAION's aesthetic predictor (version 2), about 1 … 10: linear layers on CLIP's image embedding.

    Weights are read as safetensors only, when the first image is scored; on a GPU if there is one.

    Args:
        clip: a folder or hub id of a CLIP.
        head: a folder with model.safetensors, or a hub id; its layers are `layers.N.weight` and `layers.N.bias`.
        revision: of the hub's head.
    """

    def __init__(self, clip: str = CLIP, head: str = HEAD, revision: str | None = REVISION) -> None:
        self.clip, self.head, self.revision = clip, head, revision
        self.network: CLIPVisionModelWithProjection | None = None
        self.layers: list[tuple[Tensor, Tensor]] = []

    def load(self) -> None:
        """Read the weights.

        Raises:
            ValueError: the head has no layers of that name.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        file = Path(self.head, "model.safetensors")
        if not file.is_file():
            file = Path(hf_hub_download(self.head, "model.safetensors", revision=self.revision))
        found = load_file(file, device=device)
        # in the order of their numbers, between which the checkpoint counts dropouts; it has no activations
        numbers = sorted(int(name.split(".")[1]) for name in found if name.startswith("layers.") and "weight" in name)
        if not numbers:
            raise ValueError(f"{self.head} has no layers.N.weight; it has: {', '.join(list(found)[:5])}.")
        self.layers = [(found[f"layers.{i}.weight"], found[f"layers.{i}.bias"]) for i in numbers]
        self.network = CLIPVisionModelWithProjection.from_pretrained(self.clip, use_safetensors=True).eval().to(device)

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> float:
        """Score an image, stretched to CLIP's square (bicubic)."""
        if self.network is None:
            self.load()
        size = self.network.config.image_size
        pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)) / 255
        x = torch.from_numpy((pixels - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD).permute(2, 0, 1)[None]
        embedding = self.network(pixel_values=x.to(self.network.device, torch.float32)).image_embeds
        embedding = F.normalize(embedding, dim=1)
        for weight, bias in self.layers:
            embedding = F.linear(embedding, weight, bias)
        return float(embedding)


def at_least(image: Image.Image, score: Rule, cut: float) -> int:
    """Return 1 where the score reaches the cut, else 0."""
    return int(score(image) >= cut)


size = partial(jpeg_size, cuts=(70.0,))
aesthetic = partial(at_least, score=Aesthetic(), cut=5.7)
