"""Load a saved control of any kind: one file and one row in `KINDS` make a new one."""

import json
from pathlib import Path

from ..chain.denoise import Denoiser
from ..system.files import undamaged
from .control import Control
from .lora import LoRAControl

KINDS: dict[str, type[Control]] = {"lora": LoRAControl}


def load_control(folder: str | Path, denoiser: Denoiser, advice: str = "Train it again.") -> Control:
    """Attach a saved control to the prior it was trained on; `control.json` says its kind, in files of 0.1 a LoRA.

    Raises:
        ValueError: it is damaged, of an unknown kind, or of another prior; `advice` is how the error ends.
    """
    with undamaged(Path(folder), advice):
        kind = json.loads((Path(folder) / "control.json").read_text(encoding="utf-8")).get("kind", "lora")
        if kind not in KINDS:
            raise ValueError(f"unknown kind of control {kind!r}, not {' or '.join(KINDS)}")
        return KINDS[kind].load(folder, denoiser)
