"""Name the text encoders of a pipeline: what they are known by, and how much of a prompt they read."""

import hashlib
import inspect
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BATCH = 1024  # prompts that are cut into tokens at a time
# of a config: where it was read and by whom, not what it computes
ORIGIN = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


class TextEncoder(NamedTuple):
    """Hold a text encoder with its tokenizer."""

    module: nn.Module
    tokenizer: Any  # of transformers
    window: int  # tokens it reads, those for begin and end included

    def lengths(self, prompts: Sequence[str]) -> Iterator[int]:
        """Yield how many tokens each prompt has, those for begin and end included; a batch is in memory at a time."""
        for start in range(0, len(prompts), BATCH):
            texts = list(prompts[start : start + BATCH])
            tokens = self.tokenizer(texts, truncation=False, return_attention_mask=False, verbose=False)
            yield from map(len, tokens["input_ids"])


def encoders_of(pipeline: Any, t5: str = "") -> dict[str, TextEncoder]:
    """Return the text encoders that a pipeline has, by name; the one named `t5` reads `max_sequence_length` tokens."""
    encoders = {}
    for suffix in ("", "_2", "_3"):
        name, tokenizer = f"text_encoder{suffix}", getattr(pipeline, f"tokenizer{suffix}", None)
        if (module := getattr(pipeline, name, None)) is None:
            continue
        longest = inspect.signature(pipeline.encode_prompt).parameters.get("max_sequence_length")
        window = longest.default if name == t5 else tokenizer.model_max_length
        encoders[name] = TextEncoder(module, tokenizer, window)
    return encoders


def fingerprint(encoders: dict[str, TextEncoder]) -> str:
    """Hash what the encoding of a prompt depends on: weights and buffers, settings, device, vocabularies, windows."""
    return digest_of(
        [name, encoder.window, weights_of(encoder.module), vocabulary_of(encoder.tokenizer)]
        for name, encoder in encoders.items()
    )


def digest_of(values: Any) -> str:
    """Hash a JSON value; what is iterated becomes a list."""
    return hashlib.sha256(json.dumps(list(values), sort_keys=True, default=str).encode()).hexdigest()


def weights_of(module: nn.Module) -> list[Any]:
    """Describe a module: class, settings, device, and of every tensor in it name, type, shape and hash."""
    config = getattr(module, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    tensors = module.state_dict()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing leaves other threads the interpreter
        hashes = list(pool.map(hash_tensor, tensors.values()))
    devices = sorted({value.device.type for value in tensors.values()})
    weights = [[n, str(t.dtype), list(t.shape), h] for (n, t), h in zip(tensors.items(), hashes, strict=True)]
    return [type(module).__name__, {k: settings[k] for k in settings if k not in ORIGIN}, devices, weights]


def hash_texts(texts: Iterable[str]) -> str:
    """Hash texts, each with its length, one at a time."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def hash_tensor(tensor: Tensor) -> str:
    """Hash the bytes of a tensor on any device."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def vocabulary_of(tokenizer: Any) -> list[Any]:
    """Describe a tokenizer: class, what it pads with and cuts where, the template of a chat, and its vocabulary."""
    about = [type(tokenizer).__name__, tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side]
    if template := getattr(tokenizer, "chat_template", None):
        about.append(template)
    if getattr(tokenizer, "is_fast", False):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # the latest call's, not the tokenizer's
        return [*about, {key: rules[key] for key in rules if key not in ("truncation", "padding")}]
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(map(Path, tokenizer.save_vocabulary(folder)))
        hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return [*about, sorted(tokenizer.get_added_vocab().items()), hashes]
