"""Tune LoRAs by their reward alone and certify them at some lengths: bench/results/certify.json (half an hour).

python bench/certify.py [digits [RUN]]            (a run of `ctrl demo`; left out, it trains one first)
python bench/certify.py alignprop [EXAMPLE]       (a folder of examples/text_digits.py; left out, it is made first)

`alignprop` tunes with trl's AlignProp, in the environment of bench/speed.py, for bright pictures. `digits` is our own:
The update is that of DRaFT-K (Clark et al. 2024), AlignProp's (Prabhudesai et al. 2024) with a fixed truncation: sample
a chain, differentiate the reward through its last K steps, and ascend. There is no KL. The base, the chain and p̂ are
the run's, the reward is log p̂(ink = 4 | x), the LoRA is PEFT's on the queries, keys and values. Each LoRA is saved as
diffusers does and read by `ctrl certify`, the run beside it.
"""

import csv
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Any

import torch
from evidence import ROOT, read, write
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image, ImageStat
from rich.progress import track
from speed import peer

from ctrl_diffusion.chain.rollout import read_out
from ctrl_diffusion.chain.transition import transition
from ctrl_diffusion.commands.jobs.certify import Request, certify_job
from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.prior.prior import open_prior
from ctrl_diffusion.run.run import Run
from ctrl_diffusion.system.files import write_tensors
from ctrl_diffusion.system.progress import JobOptions

VALUE, RANK, RATE, BATCH, K = "4", 4, 1e-3, 32, 2
LENGTHS = (30, 50, 70, 100)  # updates at which it is saved
PATHS = 800  # over the ten digits
PERCENT, GUIDANCE = 0.2, 1.001  # γ of a percent of brightness; that of bench/peer.py
PEER_BATCH, PEER_STEPS, PEER_LENGTHS = 8, 20, (10, 20, 40)  # the last are updates


def tune(run: Run, folder: Path) -> list[Path]:
    """Tune a LoRA of a run's base on its p̂ of one value, and save it at each length."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    denoiser, name, y = open_prior(run.config.prior).denoiser, run.names[0], run.values.index(VALUE)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v"])
    network = inject_adapter_in_model(config, denoiser.network)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    files, steps = [], list(pairwise(run.times))
    for update in track(range(max(LENGTHS) + 1), description="tuning by the reward"):
        if update in LENGTHS:
            files.append(folder / f"{update}.safetensors")
            state = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(network).items()}
            write_tensors(files[-1], state, {})
        c = torch.randint(run.prior.classes, (BATCH,), generator=generator)
        x = torch.randn(BATCH, *denoiser.shape, generator=generator)
        for i, (t, s) in enumerate(steps):
            with torch.set_grad_enabled(i >= len(steps) - K):
                x = transition(denoiser, x, t, s, c=c).rsample(torch.randn(x.shape, generator=generator))
        x_0 = read_out(run.prior.denoiser, x, run.times[-1], c=c)  # by the base, as `ctrl certify` does
        reward = run.reward_at(1.0)(x_0, {name: torch.full((BATCH,), y)}, {"c": c}).mean()
        optimiser.zero_grad()
        (-reward).backward()
        optimiser.step()
    return files


def brightness(image: Image.Image) -> float:
    """Return the mean of all pixels in percent of white."""
    return ImageStat.Stat(image.convert("L")).mean[0] / 2.55


def measure_alignprop(example: Path, scratch: Path) -> list[dict[str, Any]]:
    """Tune a LoRA on the example's pipeline by AlignProp; return its figures against `brightness` at each length."""
    prompts, rows = scratch / "prompts.txt", []
    with (example / "photos" / "metadata.csv").open(encoding="utf-8") as file:
        prompts.write_text("\n".join(sorted({row["prompt"] for row in csv.DictReader(file)})), encoding="utf-8")
    # transformers 4 reads the tokenizer that version 5 wrote by its fast class alone
    base = Path(copytree(example / "pipeline", scratch / "pipeline"))
    index = base / "model_index.json"
    index.write_text(index.read_text(encoding="utf-8").replace('"CLIPTokenizer"', '"CLIPTokenizerFast"'), "utf-8")
    for updates in track(PEER_LENGTHS, description="AlignProp"):
        out = scratch / f"{updates}-updates"
        python, script, *_ = peer(example, "lora", PEER_BATCH, PEER_STEPS)
        arguments = [base, "lora", PEER_BATCH, PEER_STEPS, prompts, updates, out]
        subprocess.run([python, script, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
        request = Request(
            str(example / "pipeline"), out / "pytorch_lora_weights.safetensors", prompt_file=prompts,
            guidance=GUIDANCE, steps=PEER_STEPS, rule="certify:brightness", gamma=PERCENT, n=PATHS,
        )  # fmt: skip
        figures = certify_job(request, scratch / str(updates), JobOptions(trust=True))
        rows.append({"updates": updates, "prior_score": figures["prior_score"], **about(figures)})
    return rows


def row_of(update: int, figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one LoRA, and of the run at its KL."""
    beside = figures["run"]["rows"][0]  # at the LoRA's KL
    return {"updates": update, "lora": about(figures), "run": {"strength": beside["strength"], **about(beside)}}


def about(figures: dict[str, Any]) -> dict[str, Any]:
    """Return KL, mean score, J, log Z and gap, with errors."""
    names = ("objective_nats", "objective_stderr", "log_z_nats", "gap_nats", "gap_stderr", "certified_pairs")
    own = {name: figures[name] for name in ("kl_nats", "kl_stderr", "score", "score_stderr", "best_score")}
    return own | {name: figures["certificate"][name] for name in names}


def measure_digits(folder: Path, scratch: Path) -> dict[str, Any]:
    """Tune a LoRA on the digits and return its figures at each length, those of a run of ours at its KL beside them."""
    rows, files = [], tune(Run.load(folder), scratch)
    for update, file in zip(LENGTHS, files, strict=True):
        request = Request("digits", file, run=folder, value=VALUE, n=PATHS)
        figures = certify_job(request, scratch / str(update), JobOptions())
        rows.append(row_of(update, figures))
    return {
        "value": VALUE, "steps": figures["chain"]["steps"], "through": K, "rank": RANK, "rate": RATE,
        "batch": BATCH, "prior_score": figures["prior_score"], "trained": about(figures["run"]["rows"][-1]),
        "rows": rows,
    }  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    part = sys.argv[1] if sys.argv[1:] else "digits"
    given = Path(sys.argv[2]) if sys.argv[2:] else None
    with TemporaryDirectory() as scratch:
        folder = given or Path(scratch) / "made"
        if part == "alignprop":
            if not given:
                subprocess.run([sys.executable, ROOT / "examples" / "text_digits.py", "--out", folder], check=True)
            figures = {"alignprop": measure_alignprop(folder, Path(scratch))}
        else:
            if not given:
                demo_job({}, folder)
            figures = measure_digits(folder, Path(scratch))
        write("certify", {**read("certify", {}), **figures})


if __name__ == "__main__":
    main()
