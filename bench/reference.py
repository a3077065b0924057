"""Transcribe the paper's schedule of an update from its algorithm, for bench/speed.py to compare ours with.

A second copy of the network is the prior. Every step calls the policy and the prior, each without and with the prompt:
four calls, each checkpointed by `torch.utils.checkpoint`, and the graph of everything else is kept. The mathematics
are those of `Backprop`: the same chain, KL and adapter, which lies beside the layers here, as PEFT has it.

python bench/reference.py FOLDER BATCH TIMES        (a contender of bench/speed.py)
"""

import copy
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from race import CLASSES, GUIDANCE, PROMPTS, RANK, Brightness, serve
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]


class Reference:
    """Hold the policy and the prior's copy, and compute one update's loss.

    Args:
        folder: of a Stable Diffusion pipeline.
        times: the chain's grid, 1 is noise.
    """

    def __init__(self, folder: str, times: tuple[float, ...]) -> None:
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        self.unet, self.vae = pipeline.unet.requires_grad_(False).eval(), pipeline.vae.requires_grad_(False).eval()
        self.prior = copy.deepcopy(self.unet)
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), self.unet)
        self.table = nn.Embedding(CLASSES, self.unet.time_embedding.linear_2.out_features)
        nn.init.zeros_(self.table.weight)
        self.y: Tensor | None = None
        self.unet.time_embedding.register_forward_hook(lambda module, args, output: output + self.table(self.y))
        with torch.no_grad():
            self.rows, self.null, *_ = pipeline.encode_prompt(
                list(PROMPTS), torch.device("cpu"), 1, True, negative_prompt=[""] * len(PROMPTS)
            )
        self.times, self.alphas_bar = times, pipeline.scheduler.alphas_cumprod.double()

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters: the table, then the adapter."""
        return [self.table.weight, *(p for p in self.unet.parameters() if p.requires_grad)]

    def mean(self, network: nn.Module, x_t: Tensor, t: float, s: float, c: Tensor) -> tuple[Tensor, float]:
        """Return mean and std of a step's Gaussian, from two calls."""
        k, last = round(t * len(self.alphas_bar)) - 1, round(s * len(self.alphas_bar)) - 1
        prompts, null = self.rows[c], self.null[c]
        call = partial(checkpoint, network, use_reentrant=False, preserve_rng_state=False, return_dict=False)
        without, prompted = (call(x_t, k, encoder_hidden_states=rows)[0] for rows in (null, prompts))
        noise = without + GUIDANCE * (prompted - without)
        before, after = float(self.alphas_bar[k]), float(self.alphas_bar[last])
        variance = (1 - after) / (1 - before) * (1 - before / after)
        x_hat = (x_t - (1 - before) ** 0.5 * noise) / before**0.5
        return after**0.5 * x_hat + max(1 - after - variance, 0.0) ** 0.5 * noise, variance**0.5

    def loss(self, x_t: Tensor, noise: list[Tensor], c: Tensor, y: Tensor) -> Tensor:
        """Return −J of paths that start at x_t (B, *), in nats."""
        self.y, kl = y, torch.zeros(len(x_t))
        for (t, s), z in zip(pairwise(self.times), noise, strict=True):
            (policy, std), (prior, _) = (self.mean(network, x_t, t, s, c) for network in (self.unet, self.prior))
            kl = kl + 0.5 * ((policy - prior) / std).flatten(1).square().sum(1)
            x_t = policy + std * z
        k = round(self.times[-1] * len(self.alphas_bar)) - 1
        last = float(self.alphas_bar[k])
        call = partial(checkpoint, self.prior, use_reentrant=False, return_dict=False)
        without, prompted = (call(x_t, k, encoder_hidden_states=rows[c])[0] for rows in (self.null, self.rows))
        x_0 = (x_t - (1 - last) ** 0.5 * (without + GUIDANCE * (prompted - without))) / last**0.5
        images = checkpoint(self.vae.decode, x_0 / self.vae.config.scaling_factor, use_reentrant=False).sample
        rewards = Brightness().log_prob(images).gather(1, y[:, None]).squeeze(1)
        return (kl - rewards).mean()


def updates(reference: Reference, batch: int) -> Iterator[None]:
    """Yield after each update."""
    parameters = reference.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    shape = (batch, reference.unet.config.in_channels, *[reference.unet.config.sample_size] * 2)
    while True:
        x_1, *noise = (torch.randn(shape) for _ in reference.times)
        loss = reference.loss(x_1, noise, torch.randint(len(PROMPTS), (batch,)), torch.randint(CLASSES, (batch,)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 100.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def main() -> None:
    folder, batch, times = sys.argv[1], int(sys.argv[2]), tuple(map(float, sys.argv[3].split(",")))
    torch.manual_seed(0)
    serve(updates(Reference(folder, times), batch).__next__)


if __name__ == "__main__":
    main()
