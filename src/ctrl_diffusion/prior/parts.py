"""Load a part of a pipeline whose every weight came from its files, or say in one line why not."""

import importlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from .source import PICKLES

LIBRARIES = ("diffusers", "transformers")
# what names of weights say of how a file was written, though all that the model needs may be there too
ALTERED = {
    r"^base_model\.model\.": "saved from inside of PEFT's wrapper; save merge_and_unload() instead",
    r"base_layer\.|lora_|\.lora\.|\.hada_|\.lokr_|\.oft_|modules_to_save\.": "a LoRA that was not merged and unloaded "
    "before saving; load it again and call fuse_lora() and unload_lora_weights(), or merge_and_unload(), first",
    r"\.(absmax|quant_map|SCB|_data|_scale|qweight|qzeros|(input|weight)_scale(_inv)?|scale_(input|weight))$|quant_state":
    "quantised weights; take the original, or save what dequantize() returns",
    r"\.processor\.": "an IP-Adapter or other attention processors; unload_ip_adapter() before saving",
    r"parametrizations\.|\.weight_(orig|mask|g|v)$": "weights under a mask or parametrization of torch; remove it "
    "before saving",
}  # fmt: skip
# the same of files that lack what the model needs
FOREIGN = {
    r"_fsdp_wrapped_module|_flat_param|_checkpoint_wrapped_module": "saved from inside of a wrapper of torch; save the "
    "module in it",
    r"(^|[._])(ema|shadow|averaged)([._]|$)|^model_ema": "an average (EMA) under its own names; copy it to the model "
    "before saving",
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model|(input|output|double|single|joint)_blocks)\.":
    "the names of a single-file checkpoint; write a folder with from_single_file(FILE).save_pretrained(FOLDER)",
}  # fmt: skip


class Weights(NamedTuple):
    """Name the weights that a folder holds of a model."""

    files: tuple[Path, ...]
    names: frozenset[str]  # in the files
    variant: str | None  # None of plain files

    @property
    def wrapped(self) -> bool:
        """Whether names have prefixes of torch.compile or DistributedDataParallel."""
        return any(unwrapped(name) != name for name in self.names)


def unwrapped(name: str) -> str:
    """Return a weight's name without the prefixes of torch.compile and DistributedDataParallel."""
    return re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", ""))


def one_line(error: Exception, most: int = 300) -> str:
    """Return the text of a library's error without line breaks, cut short."""
    return " ".join(str(error).split())[:most] or type(error).__name__


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever a library raises inside into one ValueError that begins with `what`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # an odd file makes a library raise anything, ImportError and AssertionError included
        # what follows advises to draw the weights at random
        raise ValueError(f"{what}: {one_line(error).partition(' If you want to instead')[0]}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and advice of diffusers and transformers inside."""
    from transformers import logging  # a second of import that pixel models do without

    libraries = diffusers.utils.logging, logging
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of fields in old configs, which keep their meaning
            yield
    finally:
        for library, (level, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()


def class_of(name: str, part: Any) -> type:
    """Return the class that a pipeline's index names for a part; refuse one that is not of the libraries."""
    if not isinstance(part, (list, tuple)) or len(part) != 2 or not all(isinstance(word, str) for word in part):
        raise ValueError(f"its {name} is given as {part!r} in model_index.json, not as [library, class]")
    library, kind = part
    if library.partition(".")[0] == "peft":
        raise ValueError(f"its {name} is wrapped by PEFT ({kind}). Save a pipeline with merge_and_unload() of it")
    if library not in LIBRARIES:
        raise ValueError(
            f"its {name} is of a class of its own ({library}.{kind}), whose code is not run. Use one with classes of "
            f"{' or '.join(LIBRARIES)}"
        )
    module = importlib.import_module(library)
    found = getattr(module, kind, None)
    if not isinstance(found, type):
        raise ValueError(f"its {name} is a {kind}, which {library} {module.__version__} does not have. Upgrade it")
    return found


def part_folder(folder: Path, name: str) -> Path:
    """Return the folder of a part: in early pipelines its files are beside the index."""
    return folder / name if (folder / name).is_dir() else folder


def base_name(kind: type) -> str:
    """Return how the files of a model's weights begin."""
    return "diffusion_pytorch_model" if issubclass(kind, diffusers.ModelMixin) else "model"


def find_weights(folder: Path, name: str, base: str) -> Weights:
    """Find the weights of a part in its folder: the plain ones, else those of the only variant; refuse any other."""
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    pattern = re.compile(rf"{base}(?:\.([\w-]+))?\.safetensors(?:\.index(?:\.([\w-]+))?\.json)?")
    matches = [(match[1] or match[2], file) for file in files if (match := pattern.fullmatch(file))]
    found = {variant: file for variant, file in matches if not re.search(r"-\d+-of-\d+$", variant or "")}
    if not found:
        raise ValueError(f"its {name} {no_weights(files, base)}")
    if None not in found and len(found) > 1:
        first, *_ = found.values()
        raise ValueError(
            f"its {name} has weights of the variants {' and '.join(map(str, found))} and no plain ones. Choose one: "
            f"rename {first}, say, to {first.replace(f'.{next(iter(found))}', '', 1)}"
        )
    variant = None if None in found else next(iter(found))
    return Weights(*read_names(folder / found[variant], name), variant)


def no_weights(files: Iterable[str], base: str) -> str:
    """Say what a folder without weights that could be read has in their place, and what to do."""
    others = [file for file in files if not file.endswith((".json", ".md", ".txt", ".py"))]
    if pickles := [file for file in others if file.endswith(PICKLES)]:
        return (
            f"has weights as pickles alone ({pickles[0]}), which can run any code and are not read. Convert them where "
            "they are trusted: from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW)"
        )
    if others:
        return f"has no {base}.safetensors, but {others[0]}. Save it with save_pretrained()"
    return f"has no weights: there is no {base}.safetensors in its folder. Download it again"


def read_names(path: Path, name: str) -> tuple[tuple[Path, ...], frozenset[str]]:
    """Read the names of the weights in a file, or in the files of an index; refuse an index they do not agree with."""
    if path.suffix != ".json":
        with refusing(f"its {name}: {path.name} is damaged"), safe_open(path, "pt") as file:
            return (path,), frozenset(file.keys())
    with refusing(f"its {name}: {path.name} is damaged"):
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        named = {file: {key for key, shard in shards.items() if shard == file} for file in sorted(set(shards.values()))}
    names: set[str] = set()
    for file, keys in named.items():
        if not (path.parent / file).is_file():
            raise ValueError(f"its {name} lacks {file}, which {path.name} names. Download it again")
        stored = read_names(path.parent / file, name)[1]
        if absent := sorted(keys - stored):
            raise ValueError(
                f"its {name} lacks {len(absent)} weights that {path.name} names (the first: {absent[0]}): {file} does "
                "not hold them. Download both again"
            )
        names |= stored
    return tuple(path.parent / file for file in named), frozenset(names)


def read_object(path: Path, name: str) -> dict[str, Any]:
    """Read a part's config; refuse what is no object, which diffusers would take for a name on the hub."""
    with refusing(f"its {name} has no {path.name} that can be read"):
        values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"its {name}: {path.name} must hold an object, {{…}}, got {str(values)[:40]!r}")
    return values


def check_config(folder: Path, name: str) -> dict[str, Any]:
    """Read the config of a part; refuse one that is quantised."""
    config = read_object(folder / "config.json", name)
    quantised = config.get("quantization_config")
    maps = [file.name for file in folder.glob("*quant*map*.json")]
    if quantised or maps:
        how = maps[0] if maps else quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"its {name} is quantised ({how}), and a control needs weights that it can change a little. Take the "
            "original, or save what dequantize() returns"
        )
    return config


def load_part(folder: Path, name: str, part: Any) -> tuple[Any, str | None]:
    """Load a part in float32 on the CPU, by its class in the pipeline's index; return it and the variant taken.

    Raises ValueError, one line, unless every parameter and buffer came from its files. Prefixes of torch.compile and
    DistributedDataParallel are taken off the names, with a warning.
    """
    kind = class_of(name, part)
    folder = part_folder(folder, name)
    if not issubclass(kind, nn.Module):
        files = [file for file in getattr(kind, "vocab_files_names", {}).values() if isinstance(file, str)]
        if files and not any((folder / file).is_file() for file in files):  # else transformers makes an empty one
            raise ValueError(f"its {name} has no vocabulary: there is no {' or '.join(files)} in its folder")
        if hasattr(kind, "config_name"):  # of a scheduler
            read_object(folder / kind.config_name, name)
        with refusing(f"its {name} cannot be read"):
            return kind.from_pretrained(folder, local_files_only=True), None
    config = check_config(folder, name)
    weights = find_weights(folder, name, base_name(kind))
    # explicit, since transformers would keep the half precision of a file
    options: dict[str, Any] = {"torch_dtype": torch.float32}
    if not issubclass(kind, diffusers.ModelMixin):
        options = {"dtype": torch.float32, "ignore_mismatched_sizes": True}
        if weights.wrapped:
            options["key_mapping"] = {r"_orig_mod\.": "", r"^(module\.)+": ""}
    options |= {"variant": weights.variant, "use_safetensors": True, "output_loading_info": True}
    options["local_files_only"] = True  # an odd file must not make a library look for it on the hub
    with refusing(f"its {name}"):
        model, info = kind.from_pretrained(folder, **options)
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if weights.wrapped:
        warnings.warn(
            f"{folder}: weights were saved from torch.compile or DDP; their prefixes are undone.", stacklevel=2
        )
        if issubclass(kind, diffusers.ModelMixin):
            missing, unexpected = assign(model, name, weights)
    missing |= {key for key, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.is_meta}
    check_complete(model, name, config, missing, unexpected, info.get("mismatched_keys") or ())
    return model, weights.variant


def is_plain(folder: Path, name: str, part: Any) -> bool:
    """Return whether any program can read a part's files by their usual names."""
    kind = class_of(name, part)
    if not issubclass(kind, nn.Module):
        return True
    weights = find_weights(part_folder(folder, name), name, base_name(kind))
    return weights.variant is None and not weights.wrapped


def assign(model: nn.Module, name: str, weights: Weights) -> tuple[set[str], set[str]]:
    """Put weights whose names have prefixes into a model; return the names it lacks and those it does not have."""
    stored = chain.from_iterable(load_file(file).items() for file in weights.files)
    tensors = {unwrapped(key): value.float() if value.is_floating_point() else value for key, value in stored}
    with refusing(f"its {name}"):
        result = model.load_state_dict(tensors, strict=False, assign=True)
    return set(result.missing_keys), set(result.unexpected_keys)


def check_complete(
    model: nn.Module, name: str, config: dict[str, Any], missing: Iterable[str], unexpected: Iterable[str],
    mismatched: Iterable[Any],
) -> None:  # fmt: skip
    """Refuse a model that lacks weights, or whose file was altered; warn of weights that are not used."""
    missing, unexpected, mismatched = sorted(missing), sorted(unexpected), sorted(mismatched)
    if mismatched:
        first = mismatched[0]  # of transformers 4 its name alone
        key, *shapes = (first,) if isinstance(first, str) else first
        which = "{}, {} in the file, {} by the config".format(key, *map(tuple, shapes)) if shapes else key
        raise ValueError(
            f"its {name}: {len(mismatched)} weights have another shape than its config.json says (the first: {which}). "
            "Download both again"
        )
    cause = next((words for sign, words in ALTERED.items() if any(re.search(sign, key) for key in unexpected)), "")
    if broken := [key for key, value in model.named_parameters() if not (value.is_meta or value.sum().isfinite())]:
        raise ValueError(
            f"its {name}: {len(broken)} weights hold numbers that are not finite (the first: {broken[0]}). Take a "
            "checkpoint from before its training diverged, or one of full precision"
        )
    if missing:
        total = len(model.state_dict())
        raise ValueError(
            f"its {name} lacks {len(missing)} of {total} weights (the first: {missing[0]}). It looks like "
            + (cause or guess(model, config, missing, unexpected))
        )
    if cause:
        raise ValueError(
            f"its {name}: {len(unexpected)} weights of the file would not be used (the first: {unexpected[0]}). It "
            f"looks like {cause}"
        )
    if unexpected:
        warnings.warn(
            f"its {name}: {len(unexpected)} weights of the file are not used (the first: {unexpected[0]}).",
            stacklevel=2,
        )


def guess(model: nn.Module, config: dict[str, Any], missing: list[str], unexpected: list[str]) -> str:
    """Say what a file looks like that lacks weights and holds others."""
    if words := next((words for sign, words in FOREIGN.items() if any(re.search(sign, key) for key in unexpected)), ""):
        return words
    if (first := next((key for key in unexpected if key.endswith(f".{missing[0]}")), None)) is not None:
        prefix = first.removesuffix(missing[0])
        return f"saved from inside of another module: names begin with {prefix!r}; save the module in it"
    kinds = config.get("architectures") or [config.get("_class_name")]
    if type(model).__name__ not in kinds:
        return f"weights of a {kinds[0]}, which model_index.json calls a {type(model).__name__}"
    return "an incomplete file; download it, or save it, again"
