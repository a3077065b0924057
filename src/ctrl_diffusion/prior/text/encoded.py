"""Keep encoded prompts in files: each is encoded when it is first looked up, and read from a memory map.

A store is a folder of shards, real `.safetensors` files of `SHARD` consecutive prompts. A shard is allocated whole, and
sparse, at its first prompt, with a tensor `done` (uint8) that says which rows are there. A row is written and synced to
disk before its flag is set, so what a killed process leaves is whole. Several processes may fill one store: the bytes
of a row depend on its prompt alone, and equal writes do no harm.
"""

import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

Rows = dict[str, Tensor]
SHARD = 256  # prompts a file
OPEN = 64  # files mapped at a time
DONE = "done"
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Field(NamedTuple):
    """Describe one tensor of a shard."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # of a row

    @property
    def bytes(self) -> int:
        """The bytes of a row."""
        return self.dtype.itemsize * math.prod(self.shape)


class Layout(NamedTuple):
    """Say where everything in a shard is, in bytes from the beginning of its file."""

    header: bytes
    starts: dict[str, int]  # of each tensor, its rows one after the other
    done: int  # of the flags, one a row, up to the end
    size: int


class EncodedPrompts:
    """Look up encoded prompts by number.

    Args:
        encode: prompt → its rows (1, …), the same bytes whenever it is called.
        prompts: by number.
        folder: of this store alone; made with the first shard.
        example: rows (1, …) of any prompt.
    """

    def __init__(self, encode: Callable[[str], Rows], prompts: Sequence[str], folder: Path, example: Rows) -> None:
        self.encode, self.prompts, self.folder = encode, prompts, folder
        self.fields = {name: Field(row.dtype, tuple(row.shape[1:])) for name, row in example.items()}
        if unknown := [str(field.dtype) for field in self.fields.values() if field.dtype not in TYPES]:
            raise ValueError(f"encoded prompts of {unknown[0]} cannot be kept in files. Leave the cache out.")
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, numbers: Sequence[int]) -> Rows:
        """Return the rows (n, …) of n different prompts, on the CPU; encode and keep those that are not there yet.

        Raises ValueError, one line, if a shard is damaged, or cannot be read or written.
        """
        rows = {
            name: torch.empty(len(numbers), math.prod(field.shape), dtype=field.dtype)
            for name, field in self.fields.items()
        }
        places: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            places.setdefault(number // SHARD, []).append(place)
        for shard, positions in places.items():
            slots, layout = [numbers[place] % SHARD for place in positions], self._layout(shard)
            mapped = self._open(shard, layout)
            done = mapped[layout.done :]
            if missing := [slot for slot in slots if not done[slot]]:
                self._fill(shard, missing, layout)
            for name, field in self.fields.items():
                start = layout.starts[name]
                shard_rows = mapped[start : start + len(done) * field.bytes].reshape(len(done), -1)
                rows[name].view(torch.uint8).numpy()[positions] = shard_rows[slots]
        return {name: rows[name].reshape(len(numbers), *field.shape) for name, field in self.fields.items()}

    def path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"{shard:06d}.safetensors"

    def _layout(self, shard: int) -> Layout:
        """Lay a shard out; the wider types come first, so that each tensor is aligned."""
        count = min(SHARD, len(self) - shard * SHARD)
        entries: dict[str, dict] = {"__metadata__": {"encoded": self.folder.name, "first": str(shard * SHARD)}}
        begins, end = {}, 0
        for name, field in sorted(self.fields.items(), key=lambda item: -item[1].dtype.itemsize):
            begins[name], end = end, end + count * field.bytes
            shape, offsets = [count, *field.shape], [begins[name], end]
            entries[name] = {"dtype": TYPES[field.dtype], "shape": shape, "data_offsets": offsets}
        entries[DONE] = {"dtype": "U8", "shape": [count], "data_offsets": [end, end + count]}
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        done = len(header) + end
        return Layout(header, {name: len(header) + begin for name, begin in begins.items()}, done, done + count)

    def _open(self, shard: int, layout: Layout) -> np.ndarray:
        """Return the bytes of a shard, mapped, and made if it is not there; refuse one of another layout."""
        if shard in self._maps:
            self._maps.move_to_end(shard)
            return self._maps[shard]
        path = self.path(shard)
        if not path.exists():
            self._create(path, layout)
        with one_line(path, "cannot be read"):
            with path.open("rb") as file:
                header, size = file.read(len(layout.header)), os.fstat(file.fileno()).st_size
            # a map of a file that was cut short would end the process where it is read
            intact = header == layout.header and size == layout.size
            mapped = np.memmap(path, np.uint8, "r") if intact else None
        if mapped is None or mapped[layout.done :].max() > 1:
            raise ValueError(f"{path} is damaged, or not of these prompts. Remove it: they are encoded again.")
        self._maps[shard] = mapped
        if len(self._maps) > OPEN:
            self._maps.popitem(last=False)
        return mapped

    def _create(self, path: Path, layout: Layout) -> None:
        """Allocate a shard under a temporary name and give it its own, unless another process was faster."""
        temporary = path.with_name(f".{path.name}.{uuid4().hex}.part")
        with one_line(path, "cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("xb") as file:
                    file.write(layout.header)
                    file.truncate(layout.size)
                    # real blocks: to read a hole through a map may need one, which a full disk does not have
                    file.seek(layout.done)
                    file.write(bytes(layout.size - layout.done))
                    file.flush()
                    os.fsync(file.fileno())
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return
                except OSError:  # a file system without links; a shard that is lost between is filled again
                    os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def _fill(self, shard: int, slots: Sequence[int], layout: Layout) -> None:
        """Encode prompts of a shard and write them one by one: the row, and once it is on disk its flag."""
        path = self.path(shard)
        for slot in slots:
            number = shard * SHARD + slot
            rows = self.encode(self.prompts[number])
            self._check(number, rows)
            # written, not mapped: in a map a full disk would end the process
            with one_line(path, "cannot be written"), path.open("r+b") as file:
                for name, field in self.fields.items():
                    file.seek(layout.starts[name] + slot * field.bytes)
                    file.write(rows[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
                file.flush()
                os.fsync(file.fileno())
                file.seek(layout.done + slot)
                file.write(b"\1")

    def _check(self, number: int, rows: Rows) -> None:
        """Refuse rows that do not fit where those of the other prompts do."""
        for name, field in self.fields.items():
            row = Field(rows[name].dtype, tuple(rows[name].shape[1:]))
            if row != field:
                raise ValueError(
                    f"prompt {number} ({self.prompts[number][:40]!r}) is encoded as {row.shape} of {row.dtype}, others "
                    f"as {field.shape} of {field.dtype} ({name}): such prompts cannot be kept. Leave the cache out."
                )


@contextmanager
def one_line(path: Path, what: str) -> Iterator[None]:
    """Turn an error of the file system into one ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} {what}: {error.strerror or error}. The prompts encoded so far are kept.") from error
