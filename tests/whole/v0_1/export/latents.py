"""The autoencoder of a latent model: images ↔ what the network denoises."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DECODED_AT_ONCE = 2**20  # pixels; decoded together: what a decoder keeps for the gradient is many times its image


def factor_of(vae: nn.Module) -> int:
    """How many pixels a side one latent covers."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


class Codec:
    """Images (B, C, H, W) in [−1, 1] as latents of about unit variance, and back.

    Args:
        vae: an AutoencoderKL of diffusers; frozen here.
        size: (H, W) of the images.
    """

    def __init__(self, vae: nn.Module, size: tuple[int, int]) -> None:
        self.vae = vae.requires_grad_(False).eval()
        config = vae.config
        if config.get("latents_mean") is not None:
            mean, std = (torch.tensor(config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
            self.scale, self.shift = config.scaling_factor / std, mean
        else:
            self.scale, self.shift = torch.tensor(config.scaling_factor), torch.tensor(config.shift_factor or 0.0)
        self.image_shape = (config.in_channels, *size)
        factor = factor_of(vae)
        self.shape = (config.latent_channels, size[0] // factor, size[1] // factor)
        self.at_once = max(1, DECODED_AT_ONCE // (size[0] * size[1]))

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, differentiable: a few at a time, each computed again on the way back."""
        parts = latents.split(self.at_once)
        if latents.requires_grad:
            return torch.cat([checkpoint(self.of_latents, part, use_reentrant=False) for part in parts])
        return torch.cat([self.of_latents(part) for part in parts])

    def of_latents(self, latents: Tensor) -> Tensor:
        vae, raw = self.beside(latents), latents / self.scale.to(latents) + self.shift.to(latents)
        return vae.decode(raw.to(vae.dtype), return_dict=False)[0].to(latents.dtype)

    def beside(self, x: Tensor) -> nn.Module:
        """The autoencoder where x is: it comes to the accelerator when it is first needed there."""
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.float()  # its authors say that it overflows
        return self.vae.to(x.device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents of images, the mode of the encoder's distribution."""
        vae = self.beside(images)
        modes = [vae.encode(part.to(vae.dtype)).latent_dist.mode() for part in images.split(self.at_once)]
        return (torch.cat(modes).to(images) - self.shift.to(images)) * self.scale.to(images)
