"""Turn what the chain samples into images and back: the identity, unless the prior is a latent model."""

import torch
from torch import Tensor


class Codec:
    """Take x for the images themselves; `prior.latents.Autoencoder` decodes the x of a latent model."""

    latent = False
    batch = 1024  # images that are decoded and looked at together where no gradient is kept

    def __init__(self, image_shape: tuple[int, ...] = ()) -> None:
        self.image_shape = self.shape = image_shape  # (C, H, W) of an image in [−1, 1], and of one x

    def decode(self, x: Tensor) -> Tensor:
        """Return the images (B, C, H, W) of x (B, *), differentiable."""
        return x

    def encode(self, images: Tensor, device: torch.device) -> Tensor:
        """Return x (B, *) of images (B, C, H, W), computed on `device`, where the images are."""
        return images

    def enable_tiling(self) -> None:
        """Decode large images in tiles."""

    def cpu(self) -> None:
        """Free the accelerator's memory until the next call."""
