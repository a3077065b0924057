"""A state is on disk whole or not at all, and a damaged one gives way to the one before it."""

import pytest
import torch

from ctrl_diffusion.system import checkpoint
from ctrl_diffusion.system.checkpoint import Checkpoints, pack, subset, unpack


def test_a_state_comes_back_to_the_bit(tmp_path):
    states = Checkpoints(tmp_path)
    assert states.newest() is None
    tensors = {"a": torch.randn(3, 2).T, "b": torch.tensor([True, False]), "c": torch.Generator().get_state()}
    about = {"J": 1 / 3, "nothing": None, "records": [{"loss": 1e-300}]}
    for number in range(4):
        states.write({**tensors, "number": torch.tensor(number)}, about)
    restored, values = states.newest()
    assert values == about
    assert {name: value.tolist() for name, value in restored.items()} == {
        **{name: value.tolist() for name, value in tensors.items()}, "number": 3
    }  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 4, "two states of two files"


@pytest.fixture
def states(tmp_path):
    """Two states, numbered 0 and 1."""
    states = Checkpoints(tmp_path)
    for number in range(2):
        states.write({"number": torch.tensor(number)}, {})
    return states


def test_a_damaged_state_is_removed_with_a_warning(states):
    older, newer = states.paths()
    newer.write_bytes(newer.read_bytes()[:-1] + b"x")
    with pytest.warns(UserWarning, match=r"is damaged \(its checksum differs\): training goes on from before it"):
        tensors, _ = states.newest()
    assert tensors["number"] == 0
    assert states.paths() == [older]
    assert not newer.exists()


def test_a_state_without_its_checksum_was_never_whole(states):
    _, newer = states.paths()
    newer.with_suffix(".json").unlink()
    assert states.newest()[0]["number"] == 0
    states.write({"number": torch.tensor(2)}, {})
    assert states.newest()[0]["number"] == 2


def test_a_state_that_cannot_be_read_is_kept(states, monkeypatch):
    def refuse(path):
        raise PermissionError("Permission denied")

    monkeypatch.setattr(checkpoint, "sha256", refuse)
    with pytest.raises(PermissionError):
        states.newest()
    assert len(states.paths()) == 2


def test_lists_and_groups_of_tensors_are_named():
    a, b = torch.zeros(1), torch.ones(1)
    tensors = pack("best", [a, b]) | {"bestow.0": a, "fit.weight.0": b}
    assert list(tensors) == ["best.0", "best.1", "bestow.0", "fit.weight.0"]
    assert unpack("best", tensors) == [a, b]
    assert unpack("worst", tensors) == []
    assert subset("fit", tensors) == {"weight.0": b}
