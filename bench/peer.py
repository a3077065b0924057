"""Run AlignProp or DDPO of trl 0.22.2, the last release that has them, in an environment of its own.

python bench/peer.py FOLDER alignprop|ddpo BATCH STEPS                   (a contender of bench/speed.py)
python bench/peer.py FOLDER lora BATCH STEPS PROMPTS UPDATES OUT         (AlignProp's LoRA for bench/certify.py)

AlignProp differentiates the reward through every step of the chain, each call of the network checkpointed; it has no
KL, no second network and no control. DDPO rolls out and takes a step of its surrogate at every step of the chain.
"""

import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from race import CLASSES, GUIDANCE, PROMPTS, Brightness, serve
from trl import AlignPropConfig, AlignPropTrainer, DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

HARDLY = 1.001  # guidance: its pipeline fails without any


def prompt() -> tuple[str, dict]:
    return random.choice(PROMPTS), {}


def reward(images: torch.Tensor, *_: object) -> tuple[torch.Tensor, dict]:
    """Return log p(y | x) of a class drawn for every image; trl's images are in [0, 1]."""
    y = torch.randint(CLASSES, (len(images), 1))
    return Brightness().log_prob(2 * images - 1).gather(1, y).squeeze(1), {}


def alignprop_trainer(
    pipeline: DefaultDDPOStableDiffusionPipeline, batch: int, steps: int, folder: str, **options: Any
) -> AlignPropTrainer:
    """Return a trainer through all steps of the chain; `options` are its reward, prompt, guidance and rate."""
    config = AlignPropConfig(
        sample_num_steps=steps, sample_guidance_scale=options["guidance"], sample_eta=1.0, train_batch_size=batch,
        train_gradient_accumulation_steps=1, truncated_backprop_rand=False, truncated_backprop_timestep=0,
        train_learning_rate=options["rate"], mixed_precision="no", log_with=None, save_freq=10**6,
        project_kwargs={"logging_dir": folder},
    )  # fmt: skip
    return AlignPropTrainer(config, options["reward"], options["prompt"], pipeline)


def alignprop(pipeline: DefaultDDPOStableDiffusionPipeline, batch: int, steps: int, folder: str) -> Callable[[], None]:
    """Return a function that makes one update through all steps of the chain."""
    options = {"reward": reward, "prompt": prompt, "guidance": GUIDANCE, "rate": 1e-5}
    trainer = alignprop_trainer(pipeline, batch, steps, folder, **options)
    return lambda: trainer.step(0, 0)


def ddpo(pipeline: DefaultDDPOStableDiffusionPipeline, batch: int, steps: int, folder: str) -> Callable[[], None]:
    """Return a function that makes a rollout and one epoch of training on it."""
    config = DDPOConfig(
        sample_num_steps=steps, sample_guidance_scale=GUIDANCE, sample_eta=1.0, sample_batch_size=batch,
        sample_num_batches_per_epoch=1, train_batch_size=batch, train_gradient_accumulation_steps=1, train_cfg=True,
        train_learning_rate=1e-5, mixed_precision="no", log_with=None, save_freq=10**6,
        project_kwargs={"logging_dir": folder},
    )  # fmt: skip
    trainer = DDPOTrainer(config, reward, prompt, pipeline)
    return lambda: trainer.step(0, 0)


def tune(folder: str, batch: int, steps: int, prompts: Path, updates: int, out: Path) -> None:
    """Tune a LoRA by AlignProp to make images bright, and save it as diffusers does."""
    texts = prompts.read_text(encoding="utf-8").splitlines()
    pipeline = DefaultDDPOStableDiffusionPipeline(folder, use_lora=True)
    with TemporaryDirectory() as logs:
        trainer = alignprop_trainer(
            pipeline, batch, steps, logs, guidance=HARDLY, rate=1e-3,
            reward=lambda images, *_: (images.mean((1, 2, 3)), {}), prompt=lambda: (random.choice(texts), {}),
        )  # fmt: skip
        for update in range(updates):
            trainer.step(update, 0)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.sd_pipeline.unet))
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=layers)


def main() -> None:
    warnings.simplefilter("ignore")
    folder, trainer, batch, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.manual_seed(0)
    random.seed(0)
    PartialState()  # trl logs before it has one
    if trainer == "lora":
        return tune(folder, batch, steps, Path(sys.argv[5]), int(sys.argv[6]), Path(sys.argv[7]))
    pipeline = DefaultDDPOStableDiffusionPipeline(folder, use_lora=True)
    with TemporaryDirectory() as logs:
        serve({"alignprop": alignprop, "ddpo": ddpo}[trainer](pipeline, batch, steps, logs))


if __name__ == "__main__":
    main()
