# %% [markdown]
# # 7. From a run to ComfyUI and diffusers
#
# A control is of use where you work. In this lesson one is trained on a small Stable Diffusion, written as LoRA files
# for four programs, and loaded by diffusers without this package.
#
# ## A model and a control
#
# The model is trained on the spot, in a minute: a text-to-image pipeline of handwritten digits at 16 × 16, with CLIP's
# text encoder. After so short a training its drawings are rough.

# %%
# !python examples/text_digits.py --out text --autoencoder 60 --updates 400

# %% [markdown]
# Two prompts, and labels of ink from 1 to 4. The training is short too.

# %%
from pathlib import Path

with open("prompts.txt", "w", encoding="utf-8") as file:
    print("a handwritten zero", "a handwritten one", sep="\n", file=file)

# %%
# !ctrl train --prior text/pipeline --data text/photos --control ink --condition prompt --prompts prompts.txt \
# !    --out runs/text --quiet -o guidance=1.0 -o rank=16 -o steps=12 -o focus=none -o interval=none \
# !    -o learners=[contrast] -o contrast.updates=450 -o contrast.cache=600 -o classifier.updates=400 \
# !    -o classifier.grid=1 -o classifier.depth=1 -o evaluation.prior_samples=300 -o evaluation.paths=160 \
# !    -o evaluation.sweep_paths=16 -o evaluation.probes=2

# %% [markdown]
# ## Export
#
# One command writes a pipeline that diffusers loads, and in `programs/` a file for every value:

# %%
# !ctrl export runs/text exported --for all

# %%
for path in sorted(Path("exported/programs").rglob("*")):
    if path.is_file():
        print(f"{path.relative_to('exported').as_posix()}  {path.stat().st_size / 1000:.0f} kB")

# %% [markdown]
# - `lora/` is for ComfyUI, A1111, Forge and InvokeAI: put a file into the program's folder of LoRAs and use it at
#   strength 1. The page beside the files has three steps for each program.
# - `diffusers/` has the same matrices under the names that `load_lora_weights` reads.
# - A file holds the control at one value. A control on a scale is two files, of which one is a slider.
#
# ## In diffusers, with a LoRA file
#
# Nothing of this package is imported here:

# %% From the same noise: without a file, with that of ink 1, and with that of ink 4
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

pipe = StableDiffusionPipeline.from_pretrained("text/pipeline")
pipe.set_progress_bar_config(disable=True)


def draw():
    noise = torch.Generator().manual_seed(0)
    return pipe(["a handwritten zero"] * 8, num_inference_steps=20, guidance_scale=1.0, generator=noise).images


rows = [draw()]
for value in "14":
    pipe.load_lora_weights("exported/programs/diffusers", weight_name=f"ink-{value}.safetensors")
    rows.append(draw())
    pipe.unload_lora_weights()

sheet = Image.new("L", (8 * 66, 3 * 66), 128)
for i, row in enumerate(rows):
    for k, image in enumerate(row):
        sheet.paste(image.convert("L").resize((64, 64), Image.Resampling.NEAREST), (k * 66 + 1, i * 66 + 1))
sheet

# %% [markdown]
# ## In diffusers, with y as an argument
#
# The exported folder is a pipeline too, with every value in one control and a strength. Its code is in the folder,
# which is why diffusers asks for `trust_remote_code`:

# %% The exported pipeline: ink 1, 2, 3, 4
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
sheet = Image.new("L", (4 * 66, 66), 128)
for k, value in enumerate("1234"):
    noise = torch.Generator().manual_seed(0)
    image = pipe("a handwritten zero", controls={"ink": value}, generator=noise).images[0]
    sheet.paste(image.convert("L").resize((64, 64), Image.Resampling.NEAREST), (k * 66 + 1, 1))
sheet

# %% [markdown]
# ## Is it the same there?
#
# A program has its own grid of noise levels, so "good in training, no effect there" is a fair suspicion.
# `ctrl evaluate --as` measures the chain that the program runs:

# %%
# !ctrl evaluate runs/text -n 120 --prior-samples 200 --quiet --out ours.json
# !ctrl evaluate runs/text -n 120 --prior-samples 200 --quiet --as comfyui --sampler euler_a --steps 16 \
# !    --out comfyui.json

# %%
import json

shares = {}
for name in ("ours", "comfyui"):
    figures = json.loads(Path(f"{name}.json").read_text(encoding="utf-8"))
    shares[name] = figures["ctrl"]["accuracy"]
    print(f"{name:8} ink as asked {shares[name]:.2f} ± {figures['ctrl']['accuracy_stderr']:.2f}")

# %% [markdown]
# {shares["ours"]:.0%} of our own chain's drawings have the ink that was asked for, and {shares["comfyui"]:.0%} of
# ComfyUI's. What that does not cover, which models each program reads, and what an interval of noise levels needs:
# [take a control along](../how-to/export.md).
#
# That was the last lesson. [How to](../how-to/index.md) answers single questions, [why](../why/how-it-works.md)
# derives what you used.
