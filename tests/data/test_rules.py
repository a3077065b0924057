import io
import sys

import numpy as np
import pytest
from PIL import Image

from ctrl_diffusion.data.read import label_by, read_images
from ctrl_diffusion.data.rules import jpeg_kilobytes, jpeg_size, load_rule


def noise(size):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8))


@pytest.fixture
def rules(tmp_path, monkeypatch):
    """A module of the user's beside which the command runs."""
    (tmp_path / "my_rules.py").write_text(
        "def bright(image):\n    return 'bright' if sum(image.convert('L').tobytes()) > 127 * 64 else 'dark'\n"
        "def fails(image):\n    return 1 / 0\n"
        "def nothing(image):\n    return None\n"
        "value = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_rules", None)


def test_the_papers_classes_are_cut_at_kilobytes():
    for size in (140, 240, 290, 330):
        image = noise(size)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        kilobytes = len(file.getvalue()) / 1000
        assert jpeg_kilobytes(image) == kilobytes
        assert jpeg_size(image) == (kilobytes <= 60) + (kilobytes <= 85) + (kilobytes <= 110)
    assert {jpeg_size(noise(size)) for size in (140, 240, 290, 330)} == {0, 1, 2, 3}


def test_labels_from_a_rule_of_the_users(rules):
    (rules / "photos").mkdir()
    for i in range(6):
        Image.new("L", (8, 8), 40 * i).save(rules / "photos" / f"{i}.png")
    (rules / "photos" / "metadata.csv").write_text("file_name\n" + "".join(f"{i}.png\n" for i in range(6)))
    data = read_images("photos", {"light": None}, (1, 8, 8), {"light": "my_rules:bright"})
    assert data.values["light"] == ("bright", "dark")
    assert data.labels["light"].tolist() == [1, 1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match=r"row 1: the rule failed on it: ZeroDivisionError: division by zero"):
        read_images("photos", {"light": None}, (1, 8, 8), {"light": "my_rules:fails"})
    with pytest.raises(ValueError, match="light is missing: the rule returned None"):
        label_by(load_rule("my_rules:nothing"), noise(8), "light")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_rules:missing", "my_rules has no function 'missing'"),
        ("my_rules:value", "my_rules has no function 'value'"),
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_rule_that_is_not_there(rules, name, message):
    with pytest.raises(ValueError, match=message):
        load_rule(name)
    assert sys.path[-1] != ""
