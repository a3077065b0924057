"""Decode and encode images by the autoencoder of a latent model."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..chain.codec import Codec
from .family import check_class
from .network import shape_of
from .parts import refusing

PIXELS = 2**20  # decoded together: what a decoder keeps for the gradient is many times its image


def factor_of(vae: nn.Module) -> int:
    """Return how many pixels a side one latent covers."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


class Autoencoder(Codec):
    """Turn images of a size (H, W) into latents of about unit variance and back; the autoencoder is frozen."""

    latent = True
    batch = 16  # images are many times their latents

    def __init__(self, vae: nn.Module, size: tuple[int, int]) -> None:
        check_class("vae", vae, "AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")
        super().__init__((vae.config.in_channels, *size))
        self.vae = vae.requires_grad_(False).eval()
        config = vae.config
        if not config.get("scaling_factor"):
            raise ValueError("its vae's config.json does not say scaling_factor, by which latents are multiplied")
        with refusing("its vae's config.json has a scale or shift of latents that is no number"):
            if config.get("latents_mean") is not None:
                mean, std = (torch.tensor(config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
                self.scale, self.shift = config.scaling_factor / std, mean
            else:
                self.scale = torch.tensor(config.scaling_factor)
                self.shift = torch.tensor(config.get("shift_factor") or 0.0)
        self.shape = (config.latent_channels, *(side // factor_of(vae) for side in size))
        self.micro_batch = max(1, PIXELS // (size[0] * size[1]))
        with refusing("its vae cannot be called"):
            latents = shape_of(vae, self._modes, (1, *self.image_shape)) or (1, *self.shape)
            images = shape_of(vae, self._images, (1, *self.shape)) or (1, *self.image_shape)
        if (latents[1:], images[1:]) != (self.shape, self.image_shape):
            raise ValueError(
                f"its vae turns images of {self.image_shape} into latents of {latents[1:]}, and latents of "
                f"{self.shape} into images of {images[1:]}, which do not belong together"
            )

    def _modes(self, images: Tensor) -> Tensor:
        """Return the mode of the encoder's distribution, or what an encoder gives that has none."""
        code = self.vae.encode(images)
        return code.latent_dist.mode() if hasattr(code, "latent_dist") else code.latents

    def _images(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]

    def decode(self, x: Tensor) -> Tensor:
        """Return the images of latents, differentiable: a few at a time, each recomputed on the way back."""
        decode = partial(checkpoint, self._decode, use_reentrant=False) if x.requires_grad else self._decode
        return torch.cat([decode(part) for part in x.split(self.micro_batch)])

    def _decode(self, x: Tensor) -> Tensor:
        vae, raw = self._vae_on(x.device), x / self.scale.to(x) + self.shift.to(x)
        return self._images(raw.to(vae.dtype)).to(x.dtype)

    def _vae_on(self, device: torch.device) -> nn.Module:
        """Move the autoencoder to a device, when it is first needed there."""
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.float()  # its authors say that it overflows
        return self.vae.to(device)

    @torch.no_grad()
    def encode(self, images: Tensor, device: torch.device) -> Tensor:
        """Return the latents of images: the mode of the encoder's distribution."""
        x, vae = images.to(device), self._vae_on(device)
        modes = [self._modes(part.to(vae.dtype)) for part in x.split(self.micro_batch)]
        return ((torch.cat(modes).to(x) - self.shift.to(x)) * self.scale.to(x)).to(images.device)

    def enable_tiling(self) -> None:
        self.vae.enable_tiling()

    def cpu(self) -> None:
        self.vae.cpu()
