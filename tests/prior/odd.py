"""Pipeline folders with something wrong or odd in them, made of sound ones."""

import json
import shutil

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    AutoencoderTiny,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DModel,
    VQModel,
    ZImageTransformer2DModel,
)
from pipelines import text_unet
from safetensors.torch import load_file, save_file

from tests.prior.priors import edit

UNET = "diffusion_pytorch_model"


def weights_of(part):
    (path,) = part.glob("*.safetensors")
    return path


def rewrite(part, change):
    """Change the tensors of a part, a dict by name."""
    path = weights_of(part)
    save_file(change(load_file(path)), path)


def renamed(name):
    """A function of tensors that renames them all."""
    return lambda tensors: {name(key): value for key, value in tensors.items()}


def without(tensors, count=1):
    return dict(sorted(tensors.items())[count:])


def with_lora(part, prefix=""):
    """A LoRA merged, and saved with its wrappers."""

    def change(tensors):
        key = next(key for key in sorted(tensors) if key.endswith(("to_q.weight", "q_proj.weight")))
        layer = key.removesuffix(".weight")
        tensors = {k.replace(layer, f"{layer}.base_layer") if k.startswith(layer) else k: v for k, v in tensors.items()}
        tensors[f"{layer}.lora_A.default.weight"] = torch.zeros(2, 8)
        return {prefix + key: value for key, value in tensors.items()}

    rewrite(part, change)


def as_variant(part, *variants):
    path = weights_of(part)
    for variant in variants:
        shutil.copy(path, path.with_suffix(f".{variant}.safetensors"))
    path.unlink()


def sharded(part, variant=None, forgotten=False, lost=False):
    """Two files and their index; one may hold a weight less than the index says, or be absent."""
    path = weights_of(part)
    tensors, middle = load_file(path), "." + variant if variant else ""
    keys = sorted(tensors)
    files = {f"{path.stem}{middle}-0000{i + 1}-of-00002.safetensors": keys[i::2] for i in range(2)}
    for i, (file, names) in enumerate(files.items()):
        kept = names[1:] if forgotten and i else names
        save_file({key: tensors[key] for key in kept}, path.parent / file)
    if lost:
        (path.parent / file).unlink()
    index = {"metadata": {}, "weight_map": {key: file for file, names in files.items() for key in names}}
    name = f"{path.name}.index{middle}.json"
    (path.parent / name).write_text(json.dumps(index))
    path.unlink()


def as_file(part, name):
    """The same weights under another file name alone; they are not read."""
    weights_of(part).rename(part / name)


def put(folder, name, module):
    """Save another part in place of one, and name its class in the index."""
    shutil.rmtree(folder / name)
    module.save_pretrained(folder / name)
    library = type(module).__module__.partition(".")[0]
    edit(folder / "model_index.json", **{name: [library, type(module).__name__]})


def pixel_unet(**options):
    return UNet2DModel(
        **{
            "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **options,
        }
    ).eval()  # fmt: skip


def tiny_vae(**options):
    """Four times smaller a side."""
    width = (8, 8, 8)
    return AutoencoderTiny(
        encoder_block_out_channels=width, decoder_block_out_channels=width, num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1), **options,
    ).eval()  # fmt: skip


def index(**values):
    return lambda folder: edit(folder / "model_index.json", **values)


def scheduler_file(folder):
    return folder / "scheduler" / "scheduler_config.json"


def scheduler(kind=None, **values):
    def change(folder):
        if kind:
            edit(folder / "model_index.json", scheduler=["diffusers", kind])
        edit(scheduler_file(folder), **values)

    return change


def config(part, **values):
    return lambda folder: edit(folder / part / "config.json", **values)


def unet(**options):
    return lambda folder: put(folder, "unet", pixel_unet(**options))


def text(**options):
    return lambda folder: put(folder, "unet", text_unet(**options))


def on(part, change, *arguments, **options):
    """A change of a part's folder."""
    return lambda folder: change(folder / part, *arguments, **options)


def tensors(part, change):
    return lambda folder: rewrite(folder / part, change)


def with_added(part, *names):
    return tensors(part, lambda old: {**old, **{name: torch.zeros(2) for name in names}})


def reshaped(stored):
    key = sorted(stored)[-1]
    return {**stored, key: torch.zeros(3, 3)}


def broken(stored, value=float("nan")):
    return {**stored, "conv_in.bias": stored["conv_in.bias"].index_fill(0, torch.tensor([1]), value)}


def damaged_header(part):
    path = weights_of(part)
    path.write_bytes(path.read_bytes()[:5] + b"\xff" * 40)


def sd3(**options):
    return lambda folder: put(
        folder,
        "transformer",
        SD3Transformer2DModel(
            sample_size=8, patch_size=2, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=8,
            **{"in_channels": 4, "out_channels": 4, **options},
        ),
    )  # fmt: skip


def flux(**options):
    return lambda folder: put(
        folder,
        "transformer",
        FluxTransformer2DModel(
            patch_size=1, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
            **{"in_channels": 16, "guidance_embeds": True, **options},
        ),
    )  # fmt: skip


def transformer(kind, **options):
    return lambda folder: put(folder, "transformer", kind(**options))


def pixart(**options):
    return transformer(
        PixArtTransformer2DModel, sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        **{"in_channels": 4, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 16, **options},
    )  # fmt: skip


def aura_flow(**options):
    return transformer(
        AuraFlowTransformer2DModel, sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=4,
        num_attention_heads=2, caption_projection_dim=8, pos_embed_max_size=144,
        **{"in_channels": 4, "out_channels": 4, "joint_attention_dim": 16, **options},
    )  # fmt: skip


def z_image(**options):
    return transformer(
        ZImageTransformer2DModel, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, axes_dims=[4, 2, 2],
        **{"in_channels": 4, "cap_feat_dim": 16, "axes_lens": [514, 8, 8], **options},
    )  # fmt: skip


# what is wrong → the family, the change, and what the one line must say: the part, what was got, the way out
LACKS = {
    "LoRA merged, not unloaded": (
        "DDPM",
        on("unet", with_lora),
        r"unet lacks \d+ of \d+ weights .*first: .*LoRA.*unload",
    ),
    "LoRA in a text encoder": ("SD 1", on("text_encoder", with_lora), "text_encoder lacks .*LoRA"),
    "LoRA in a whole pipeline's UNet": ("SD 1", on("unet", with_lora), "unet lacks .*LoRA"),
    "old LoRA beside plain weights": (
        "SD 1",
        with_added("unet", "mid_block.to_q.lora.down.weight"),
        "would not be used .*LoRA",
    ),
    "LyCORIS beside plain weights": ("SD 1", with_added("text_encoder", "x.hada_w1_a"), "text_encoder: .*LoRA"),
    "PEFT's wrapper": (
        "SD 1",
        on("text_encoder", with_lora, "base_model.model."),
        "text_encoder lacks .*merge_and_unload",
    ),
    "PEFT's wrapper, UNet": (
        "DDPM",
        tensors("unet", renamed("base_model.model.{}".format)),
        "unet lacks .*PEFT's wrapper",
    ),
    "EMA": ("DDPM", tensors("unet", renamed("ema_model.{}".format)), "unet lacks .*EMA"),
    "shadow parameters": ("SD 1", tensors("text_encoder", renamed("shadow_params.{}".format)), "lacks .*EMA"),
    "FSDP": ("DDPM", tensors("unet", renamed("_fsdp_wrapped_module.{}".format)), "unet lacks .*wrapper of torch"),
    "module of a trainer": ("DDPM", tensors("unet", renamed("net.{}".format)), "lacks .*names begin with 'net.'"),
    "single-file names": (
        "SD 1",
        tensors("unet", renamed("model.diffusion_model.{}".format)),
        "unet lacks .*from_single_file",
    ),
    "IP-Adapter": ("SD 1", with_added("unet", "down.attn2.processor.to_k_ip.weight"), "unet: .*unload_ip_adapter"),
    "quantised without a word": ("SD 1", with_added("unet", "conv_in.weight.absmax"), "quantised"),
    "scaled fp8": ("SD 3", with_added("transformer", "proj_out.scale_weight"), "transformer: .*quantised"),
    "pruned": (
        "DDPM",
        tensors("unet", renamed(lambda key: key.replace("conv_in.weight", "conv_in.weight_orig"))),
        "mask",
    ),
    "an incomplete file": ("DDPM", tensors("unet", without), "unet lacks 1 of .*incomplete"),
    "an incomplete VAE": ("SD 1", tensors("vae", without), "vae lacks 1 of .*incomplete"),
    "an incomplete text encoder": ("Flux", tensors("text_encoder_2", without), "text_encoder_2 lacks .*incomplete"),
    "a buffer": (
        "SD 3",
        tensors("transformer", lambda t: {k: v for k, v in t.items() if k != "pos_embed.pos_embed"}),
        "transformer lacks 1 of .*pos_embed",
    ),
    "another class of text encoder": (
        "SD 3",
        lambda folder: shutil.copytree(
            folder.parent / "SD 1" / "text_encoder", folder / "text_encoder", dirs_exist_ok=True
        ),
        "text_encoder lacks .*weights of a CLIPTextModel, which model_index.json calls a CLIPTextModelWithProjection",
    ),
    "another shape": ("DDPM", tensors("unet", reshaped), "unet: .*expected shape"),
    "another shape of a text encoder": (
        "SD 1",
        tensors("text_encoder", reshaped),
        "text_encoder: 1 weights have another shape",
    ),
    "DDP, and another shape": (
        "DDPM",
        tensors("unet", lambda old: renamed("module.{}".format)(reshaped(old))),
        "unet: Error.* size mismatch for up_blocks",
    ),
    "DDP, and incomplete": (
        "DDPM",
        tensors("unet", lambda old: renamed("module.{}".format)(without(old, 3))),
        "unet lacks 3 of .*incomplete",
    ),
    "an index that promises": (
        "DDPM",
        on("unet", sharded, forgotten=True),
        "unet lacks 1 weights that .*index.json names",
    ),
    "an index that promises, text": (
        "SD 1",
        on("text_encoder", sharded, forgotten=True),
        "text_encoder lacks 1 weights that",
    ),
    "a shard that is lost": (
        "SD 1",
        on("text_encoder", sharded, lost=True),
        "text_encoder lacks model-00002.*Download",
    ),
    "an index that is damaged": (
        "DDPM",
        lambda folder: (folder / "unet" / f"{UNET}.safetensors.index.json").write_text("{"),
        "unet: .*index.json is damaged",
    ),
    "not a number": (
        "SD 1",
        tensors("unet", broken),
        "unet: 1 weights hold numbers that are not finite .*conv_in.bias",
    ),
    "infinite": ("DDPM", tensors("unet", lambda old: broken(old, float("inf"))), "unet: 1 weights hold numbers"),
    "a damaged header": ("DDPM", on("unet", damaged_header), "unet: .*safetensors is damaged"),
}
FILES = {
    "two variants": (
        "DDPM",
        on("unet", as_variant, "fp16", "non_ema"),
        "unet has .*variants fp16 and non_ema .*rename",
    ),
    "two variants of a text encoder": (
        "SD 1",
        on("text_encoder", as_variant, "bf16", "fp16"),
        "text_encoder has .*bf16 and fp16",
    ),
    "a pickle": ("DDPM", on("unet", as_file, f"{UNET}.bin"), "unet has weights as pickles .*use_safetensors=False"),
    "a pickle of a text encoder": (
        "SD 1",
        on("text_encoder", as_file, "pytorch_model.bin"),
        "text_encoder has .*pickles",
    ),
    "a .ckpt": ("SD 1", on("vae", as_file, "vae.ckpt"), "vae has weights as pickles"),
    "another name": (
        "DDPM",
        on("unet", as_file, "model.safetensors"),
        f"unet has no {UNET}.safetensors, but model.safetensors",
    ),
    "gguf": ("Flux", on("transformer", as_file, "flux-q4.gguf"), "transformer has no .*but flux-q4.gguf"),
    "flax": ("SD 1", on("unet", as_file, "diffusion_flax_model.msgpack"), "unet has no .*msgpack"),
    "no weights": ("DDPM", lambda folder: weights_of(folder / "unet").unlink(), "unet has no weights"),
    "no config": (
        "SD 1",
        lambda folder: (folder / "text_encoder" / "config.json").unlink(),
        "text_encoder has no config.json",
    ),
    "bitsandbytes": (
        "SD 1",
        config("unet", quantization_config={"quant_method": "bitsandbytes"}),
        "unet is quantised .bitsandbytes",
    ),
    "quanto": (
        "Flux",
        config("transformer", quantization_config={"quant_method": "quanto"}),
        "transformer is quantised .quanto",
    ),
    "torchao": (
        "SD 3",
        config("text_encoder", quantization_config={"quant_method": "torchao"}),
        "text_encoder is quantised",
    ),
    "gptq": (
        "Flux",
        config("text_encoder_2", quantization_config={"quant_method": "gptq"}),
        "text_encoder_2 is quantised .gptq",
    ),
    "optimum": ("DDPM", lambda folder: (folder / "unet" / "quanto_qmap.json").write_text("{}"), "unet is quantised"),
    "a custom class": ("DDPM", index(unet=["my_unet", "MyUNet"]), "unet is of a class of its own .my_unet.MyUNet"),
    "a custom autoencoder": ("DiT", index(vae=["my_vae", "MyVAE"]), "vae is of a class of its own"),
    "a custom scheduler": ("DDPM", index(scheduler=["scheduling_my", "Mine"]), "scheduler is of a class of its own"),
    "PEFT as a class": ("SD 1", index(text_encoder=["peft", "PeftModel"]), "text_encoder is wrapped by PEFT"),
    "onnx": ("SD 1", index(unet=["onnxruntime", "Session"]), "unet is of a class of its own"),
    "an unknown class": ("SD 1", index(unet=["diffusers", "UNetOfTomorrow"]), "unet is a UNetOfTomorrow.*Upgrade"),
    "an index of another kind": ("DDPM", index(unet="UNet2DModel"), "unet is given as 'UNet2DModel'"),
    "an inpainting pipeline": (
        "SD 1",
        index(_class_name="StableDiffusionInpaintPipeline"),
        "holds a StableDiffusionInpaintPipeline; supported: DDPMPipeline, .*, ZImagePipeline",
    ),
    "a custom pipeline": ("DDPM", index(_class_name=["my_pipeline", "Mine"]), "its own class, my_pipeline.Mine"),
    "our own export": (
        "DDPM",
        index(_class_name=["pipeline", "ControlledPipeline"], base="DDPMPipeline"),
        "written by ctrl export. Name the DDPMPipeline",
    ),
    "no tokenizer": (
        "SD 1",
        lambda folder: shutil.rmtree(folder / "tokenizer"),
        "tokenizer has no vocabulary: there is no vocab.json",
    ),
}
INPUTS = {
    "4 in, 3 out": ("DDPM", unet(in_channels=4, out_channels=3), "unet predicts 3 channels for 4"),
    "3 in, 1 out": ("DDPM", unet(in_channels=3, out_channels=1), "unet predicts 1 channels for 3"),
    "4 in, 1 out": ("DDPM", unet(in_channels=4, out_channels=1), "unet predicts 1 channels for 4"),
    "3 in, 4 out": ("DDPM", unet(in_channels=3, out_channels=4), "unet predicts 4 channels for 3"),
    "inpainting": ("SD 1", text(in_channels=9), "unet is given 9 channels, and x has 4"),
    "a depth map": ("SD 2", text(in_channels=5), "unet is given 5 channels"),
    "another number of latents": ("SD 1", text(out_channels=3), "unet predicts 3 channels for 4"),
    "SD 3 out": ("SD 3", sd3(out_channels=3), "transformer predicts 3 channels for 4"),
    "SD 3 in": ("SD 3", sd3(in_channels=8), "transformer is given 8 channels"),
    "Flux Fill": ("Flux", flux(in_channels=32, out_channels=16), "transformer is given 8 channels, and x has 4"),
    "PixArt in": (
        "PixArt-Sigma",
        pixart(in_channels=8, out_channels=4),
        "transformer is given 8 channels, and x has 4",
    ),
    "PixArt's text of another width": ("PixArt-Sigma", pixart(caption_channels=24), "its network cannot be called"),
    "AuraFlow out": ("AuraFlow", aura_flow(out_channels=3), "transformer predicts 3 channels for 4"),
    "AuraFlow's text of another width": ("AuraFlow", aura_flow(joint_attention_dim=24), "its network cannot be called"),
    "Z-Image in": ("Z-Image", z_image(in_channels=8), "transformer is given 8 channels, and x has 4"),
    "Z-Image's text of another width": ("Z-Image", z_image(cap_feat_dim=24), "its network cannot be called"),
    "an image beside the text": ("Z-Image", z_image(siglip_feat_dim=8), "is given an image beside the text .siglip"),
    "no place for the text": ("Z-Image", z_image(axes_lens=[64, 8, 8]), "has 64 positions for the 512 tokens"),
    "labels as a timestep": ("DDPM", unet(class_embed_type="timestep"), "unet has class_embed_type 'timestep'"),
    "labels as an embedding": ("DDPM", unet(class_embed_type="identity"), "unet has class_embed_type 'identity'"),
    "classes and text": ("SD 1", text(num_class_embeds=3), "unet has num_class_embeds 3"),
    "a noise level": ("SD 1", text(class_embed_type="timestep"), "unet has class_embed_type 'timestep'"),
    "a projection": (
        "SD 1",
        text(class_embed_type="projection", projection_class_embeddings_input_dim=8),
        "'projection'",
    ),
    "image embeddings": ("SD 1", text(encoder_hid_dim_type="image_proj", encoder_hid_dim=16), "encoder_hid_dim_type"),
    "image hints": ("SD 1", text(addition_embed_type="image", encoder_hid_dim=16), "addition_embed_type 'image'"),
    "SDXL's sizes without SDXL": (
        "SD 1",
        text(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64),
        "its network cannot be called with what this pipeline gives it",
    ),
    "guidance": ("SD 1", text(time_cond_proj_dim=8), "unet is distilled for few steps and is given the guidance"),
    "text of another width": ("SD 1", text(cross_attention_dim=24), "its network cannot be called"),
    "text on pixels": (
        "DDPM",
        lambda folder: put(folder, "unet", text_unet()),
        "unet is a UNet2DConditionModel.*UNet2DModel",
    ),
    "pixels on text": ("SD 1", unet(), "unet is a UNet2DModel.*UNet2DConditionModel"),
    "σ": ("DDPM", unet(time_embedding_type="fourier"), "unet is given σ .fourier"),
    "a table of timesteps": (
        "DDPM",
        unet(time_embedding_type="learned", num_train_timesteps=1000),
        "unet has a learned table of timesteps",
    ),
    "a side that does not halve": ("DDPM", unet(sample_size=7), "its network cannot be called"),
    "a size that is none": ("DDPM", config("unet", sample_size="8"), "sample_size must be a height and a width.*'8'"),
    "three sides": ("SD 1", config("unet", sample_size=[8, 8, 8]), "sample_size must be a height and a width"),
    "a class too many": (
        "DiT",
        index(id2label={"0": "a", "5": "b"}),
        "names 'b' as class 5; its network has 5 classes",
    ),
    "names that are none": ("DiT", index(id2label={"one": "a"}), "id2label must map the numbers"),
    "shift as a word": ("SD 3", scheduler(shift="x"), "scheduler"),
    "no size": ("DDPM", unet(sample_size=None), "does not say sample_size.*--size"),
    "no size of latents": ("SD 1", config("unet", sample_size=None), "does not say sample_size.*--size"),
    "VQ": (
        "SD 1",
        lambda folder: put(folder, "vae", VQModel(norm_num_groups=4, block_out_channels=(8,))),
        "vae is a VQModel, and this pipeline needs: AutoencoderKL",
    ),
    "latents of another scale": (
        "SD 1",
        config("vae", scaling_factor=None),
        "vae's config.json does not say scaling_factor",
    ),
    "images of other channels": (
        "SD 1",
        lambda folder: put(
            folder,
            "vae",
            AutoencoderKL(
                out_channels=1,
                latent_channels=4,
                block_out_channels=(8, 8),
                norm_num_groups=4,
                sample_size=32,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
            ),
        ),
        "do not belong together",
    ),
}
SCHEDULERS = {
    "LCM": ("SD 1", scheduler("LCMScheduler"), "LCMScheduler belongs to a model distilled for few steps"),
    "TCD": ("DDPM", scheduler("TCDScheduler"), "TCDScheduler belongs to a model distilled"),
    "thresholding": ("DDPM", scheduler(thresholding=True), "thresholding"),
    "one beta": ("DDPM", scheduler(trained_betas=0.02), "no discrete noise schedule to read"),
    "a number": (
        "DDPM",
        lambda folder: scheduler_file(folder).write_text("2147483648"),
        "its scheduler: scheduler_config.json must hold an object, .* got '2147483648'",
    ),
    "reversed time": ("SD 3", scheduler(invert_sigmas=True), "invert_sigmas"),
    "reversed time of text to data": ("Z-Image", scheduler(invert_sigmas=True), "invert_sigmas"),
    "another clock": ("Flux", scheduler(num_train_timesteps=500), "counts 500 timesteps"),
    "log σ": ("SDXL", scheduler(timestep_type="continuous", prediction_type="v_prediction"), "is given log σ"),
    "a flow": ("DDPM", scheduler("DPMSolverMultistepScheduler", use_flow_sigmas=True), "use_flow_sigmas: it is a flow"),
    "flow of LCM": ("SD 3", scheduler("FlowMatchLCMScheduler"), "it is a flow, .* not FlowMatchLCMScheduler"),
}
ODD = {
    f"{kind}: {name}": odd
    for kind, table in {"lacks": LACKS, "files": FILES, "inputs": INPUTS, "scheduler": SCHEDULERS}.items()
    for name, odd in table.items()
}
