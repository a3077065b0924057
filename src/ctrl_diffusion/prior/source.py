"""Tell a pipeline's folder from a name on the hub, without torch; say in one line what another path is."""

from contextlib import suppress
from pathlib import Path

DIGITS, LETTERS = (Path(__file__).parent / name for name in ("digits", "letters"))
EMBEDDED = {"digits": DIGITS, "letters": LETTERS}  # the priors that ship with the package, by name
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def is_here(source: str | Path) -> bool:
    """Return whether a pipeline is a folder here, not a name on the hub; refuse (ValueError) what is neither."""
    folder = Path(source)
    if not folder.exists() and is_hub_id(str(source)):
        return False
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no pipeline folder of diffusers: {no_pipeline(folder)}.")
    return True


def is_hub_id(name: str) -> bool:
    """Return whether a name could be OWNER/NAME on the hub."""
    if "/" not in name:
        return False
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    with suppress(HFValidationError):
        validate_repo_id(name)
        return True
    return False


def no_pipeline(path: Path) -> str:
    """Say what a path is that is no pipeline folder, and what to do."""
    files = [path] if path.is_file() else sorted(path.glob("*.*"))
    names = [file.name for file in files]
    if path.name == "model_index.json" and path.is_file():
        return "it is the index of one. Name the folder it is in"
    if lora := next((name for name in names if name.startswith(("adapter_", "pytorch_lora"))), None):
        return f"{lora} is of a LoRA. Load it into its pipeline, fuse_lora() and unload_lora_weights(), and save that"
    if "config.json" in names:
        return "it has a config.json, as one part of a pipeline has. Name the folder with the model_index.json above it"
    if single := next((name for name in names if name.endswith((".safetensors", ".gguf", *PICKLES))), None):
        convert = f'StableDiffusionPipeline, say, .from_single_file("{single}").save_pretrained(FOLDER)'
        return f"{single} is a checkpoint in a single file. Write a folder once, by {convert}"
    if "modular_model_index.json" in names:
        return "it is a modular pipeline. Save its parts as one of the pipelines above with save_pretrained()"
    return "it has no model_index.json"


def check_prior(name: str) -> None:
    """Refuse (ValueError) what is neither an embedded prior, nor a pipeline's folder, nor a name on the hub."""
    if name not in EMBEDDED:
        is_here(name)
