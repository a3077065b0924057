"""A file is written whole or not at all, and one line says what is damaged."""

import pytest
import torch
from safetensors import SafetensorError

from ctrl_diffusion.system.files import (
    atomic,
    read_tensors,
    rounded,
    some_of,
    undamaged,
    write_json,
    write_tensors,
    write_text,
)
from ctrl_diffusion.system.strict import Strict


class Numbers(Strict):
    values: list[int]


def test_a_line_names_the_first_of_many():
    assert some_of(["a", "b"], 2) == "a, b"
    assert some_of(["a", "b", "c"], 2) == "a, b and 1 more"
    assert some_of(["a", "b", "c", "d"], 2, "; ") == "a; b; and 2 more"
    with pytest.raises(ValueError, match="values") as error:
        Numbers.from_values({"values": "9" * 10_000})
    assert len(str(error.value)) < 400


def write_half(path, error):
    with atomic(path) as temporary:
        temporary.write_text("half")
        raise error


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "notes.txt"
    with pytest.raises(KeyboardInterrupt):
        write_half(path, KeyboardInterrupt())
    assert list(path.parent.iterdir()) == []
    write_text(path, "old")
    with pytest.raises(OSError, match="disk"):
        write_half(path, OSError("disk full"))
    assert path.read_text() == "old"
    write_text(path, "new")
    assert [file.read_text() for file in path.parent.iterdir()] == ["new"]


def test_tensors_come_back_to_the_bit(tmp_path):
    tensors = {"a": torch.randn(3, 2).T.requires_grad_(), "b": torch.tensor([True, False])}
    write_tensors(tmp_path / "a.safetensors", tensors, {"about": "1"})
    restored = read_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(restored[name], value) for name, value in tensors.items())
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "b.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"{")
    with pytest.raises(SafetensorError):
        read_tensors(tmp_path / "a.safetensors")


def test_equal_values_are_equal_bytes_and_nan_is_refused(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1 / 3, "rows": ((1, 2e-9), [None, True])})
    write_json(tmp_path / "b.json", {"x": 1 / 3 + 1e-12, "rows": ((1, 2e-9), [None, True])})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert rounded({"x": 1 / 3, "n": 1234567}) == {"x": 0.333333, "n": 1234567}
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", float("nan"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), ValueError("no\nJSON"), KeyError("classes")])
def test_what_cannot_be_read_is_damaged(tmp_path, error):
    message = r"folder is damaged: .*\. Fit it again\."
    with pytest.raises(ValueError, match=message) as caught, undamaged(tmp_path / "folder", "Fit it again."):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_what_may_not_be_read_is_not_damaged(tmp_path):
    class Refused(ValueError):
        pass

    with pytest.raises(PermissionError, match="denied"), undamaged(tmp_path, "Fit it again."):
        raise PermissionError("denied")
    with pytest.raises(Refused), undamaged(tmp_path, "Fit it again.", but=(Refused,)):
        raise Refused


def test_text_with_a_path_of_any_bytes_is_written(tmp_path):
    """As a command that the user typed; the file stays UTF-8."""
    write_text(tmp_path / "text", "ctrl train --out runs/\udcff γ")
    assert (tmp_path / "text").read_text(encoding="utf-8") == "ctrl train --out runs/\\udcff γ"
