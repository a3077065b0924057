"""Tiny pipelines of every family with random weights, made on the spot."""

import inspect
import json
import string
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import torch
import transformers
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 16  # of the text encoders


def without_merges(kind, names, **options):
    """A tokenizer of byte pairs that merges none; transformers 4 wants files."""
    vocab = {name: i for i, name in enumerate(names)}
    if "vocab" in inspect.signature(kind).parameters:
        return kind(vocab=vocab, merges=[], **options)
    with TemporaryDirectory() as folder:
        files = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        for path, text in zip(files, (json.dumps(vocab), "#version: 0.2\n"), strict=True):
            path.write_text(text, encoding="utf-8")
        return kind(*map(str, files), **options)


def clip_tokenizer():
    """One token a letter."""
    letters = string.ascii_lowercase
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return without_merges(CLIPTokenizer, names, model_max_length=16)


def clip(kind=CLIPTextModel):
    return kind(
        CLIPTextConfig(
            vocab_size=54, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, projection_dim=WIDTH, bos_token_id=52, eos_token_id=53, pad_token_id=53,
        )
    ).eval()  # fmt: skip


def t5_tokenizer():
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((a, -3.0) for a in string.ascii_lowercase)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0)


def t5():
    return T5EncoderModel(T5Config(vocab_size=32, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


def umt5():
    return UMT5EncoderModel(UMT5Config(vocab_size=32, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer():
    """One token a letter, and a chat's template."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ċ", "Ġ", *string.ascii_lowercase]
    tokenizer = without_merges(Qwen2Tokenizer, names, chat_template=TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def qwen():
    config = Qwen3Config(
        vocab_size=32, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    return Qwen3Model(config).eval()


def vae(channels=4, shift=None):
    """Four times smaller a side."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, shift_factor=shift,
        scaling_factor=0.3, sample_size=32,
    ).eval()  # fmt: skip


def text_unet(**options):
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, **{"in_channels": 4, "out_channels": 4, "cross_attention_dim": WIDTH, **options},
    ).eval()  # fmt: skip


def stable_diffusion(scheduler=None):
    """As shipped: with a scheduler that takes several steps' predictions together."""
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=clip(), tokenizer=clip_tokenizer(), unet=text_unet(),
        scheduler=scheduler or PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_2():
    """v-prediction, to a signal-to-noise ratio of zero."""
    return stable_diffusion(
        DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False)
    )


def stable_diffusion_xl():
    unet = text_unet(
        cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(), text_encoder_2=clip(CLIPTextModelWithProjection), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=unet, scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )  # fmt: skip


def stable_diffusion_3():
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae(shift=0.1), text_encoder=clip(CLIPTextModelWithProjection),
        text_encoder_2=clip(CLIPTextModelWithProjection), text_encoder_3=None, tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), tokenizer_3=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def flux():
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    return FluxPipeline(
        transformer=transformer, vae=vae(shift=0.1), text_encoder=clip(), tokenizer=clip_tokenizer(),
        text_encoder_2=t5(), tokenizer_2=t5_tokenizer(), scheduler=scheduler,
    )  # fmt: skip


def pixart(kind=PixArtSigmaPipeline, heads=2, side=8):
    """With channels of a learned variance, as both are."""
    transformer = PixArtTransformer2DModel(
        sample_size=side, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=heads,
        cross_attention_dim=8 * heads, caption_channels=WIDTH, interpolation_scale=1,
    ).eval()  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    return kind(transformer=transformer, vae=vae(), text_encoder=t5(), tokenizer=t5_tokenizer(), scheduler=scheduler)


def pixart_alpha():
    """Of the largest size: told height, width and their ratio, each in a third of its embedding."""
    return pixart(PixArtAlphaPipeline, heads=3, side=128)


def aura_flow():
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=8, pos_embed_max_size=36,
    ).eval()  # fmt: skip
    return AuraFlowPipeline(
        transformer=transformer, vae=vae(), text_encoder=umt5(), tokenizer=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )  # fmt: skip


def z_image():
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 2, 2], axes_lens=[514, 8, 8],
    ).eval()  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.zeros_(token)  # which diffusers 0.37 leaves as memory was
    return ZImagePipeline(
        transformer=transformer, vae=vae(shift=0.1), text_encoder=qwen(), tokenizer=qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )  # fmt: skip


def ddpm():
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return DDPMPipeline(unet=unet.eval(), scheduler=DDPMScheduler(clip_sample=False))


def dit():
    """On latents, with channels of a learned variance."""
    transformer = DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, num_embeds_ada_norm=5,
    ).eval()  # fmt: skip
    return DiTPipeline(transformer=transformer, vae=vae(), scheduler=DDIMScheduler(clip_sample=False))


BUILDERS = {
    "DDPM": ddpm, "DiT": dit, "SD 1": stable_diffusion, "SD 2": stable_diffusion_2, "SDXL": stable_diffusion_xl,
    "SD 3": stable_diffusion_3, "Flux": flux, "PixArt-alpha": pixart_alpha, "PixArt-Sigma": pixart,
    "AuraFlow": aura_flow, "Z-Image": z_image,
}  # fmt: skip
LARGE = ("Flux", "PixArt-alpha", "AuraFlow", "Z-Image")  # without a size they make images of 512 × 512 or more


def saved(name, folder):
    """A pipeline folder of a family, its output layers not zero, and the pipeline."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = BUILDERS[name]()
        network = pipeline.components.get("unet") or pipeline.components["transformer"]
        for parameter in network.parameters():
            if not parameter.any():  # some begin at zero and would hide everything before them
                torch.nn.init.normal_(parameter, std=0.05)
    pipeline.save_pretrained(folder)
    return pipeline
