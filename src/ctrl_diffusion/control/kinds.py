"""Load a saved control of any kind: one file and one row in `KINDS` make a new one."""

from pathlib import Path

from ..chain.denoise import Denoiser
from ..system.files import undamaged
from .control import Control, NewerFormatError, read_about
from .lora import LoRAControl

KINDS: dict[str, type[Control]] = {"lora": LoRAControl}


def load_control(folder: str | Path, denoiser: Denoiser, advice: str = "Train it again.") -> Control:
    """Attach a saved control, of the kind that `control.json` says, to the prior it was trained on.

    Raises:
        ValueError: it is damaged, of an unknown kind, of another prior, or saved by a newer version; `advice` is how
            the error ends, but for the last.
    """
    with undamaged(Path(folder), advice, but=(NewerFormatError,)):
        kind, _ = read_about(folder)
        if kind not in KINDS:
            raise ValueError(f"unknown kind of control {kind!r}, not {' or '.join(KINDS)}")
        return KINDS[kind].load(folder, denoiser)
