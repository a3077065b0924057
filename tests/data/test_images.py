import subprocess
import sys

import pytest
import torch

from ctrl_diffusion.data import images
from ctrl_diffusion.data.images import Images, as_x, joined_x
from ctrl_diffusion.data.labelled import LabelledImages
from ctrl_diffusion.reward.classifiers import ClassifierSettings, fit_panel
from ctrl_diffusion.reward.fit import Recipe, calibrate, fit_classifier, report_classifier


def test_images_on_disk_are_the_floats_they_would_be_in_memory(monkeypatch):
    pixels = torch.randint(256, (40, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inside = as_x(pixels)
    monkeypatch.setattr(images, "IN_MEMORY", 0)
    stored = images.blank(40, 8, 8, 3)
    stored.copy_(pixels)
    outside = as_x(stored)
    assert isinstance(inside, torch.Tensor)
    assert isinstance(outside, Images)
    assert (len(outside), outside.shape) == (40, inside.shape)
    assert inside.shape == (40, 3, 8, 8)
    assert inside[7, 2, 1, 5] == pixels[7, 1, 5, 2] / 127.5 - 1
    rows = torch.tensor([3, 39, 3])
    for index in (rows, slice(2, 5), 7):
        assert torch.equal(outside[index], inside[index])
    parts = [outside.take(torch.arange(0, 40, 2)), outside.take(torch.arange(1, 40, 2))]
    assert torch.equal(parts[1][rows[:1]], inside[7:8])
    assert torch.equal(joined_x(parts)[:], torch.cat([inside[::2], inside[1::2]]))


def test_classifiers_are_the_same_from_disk_and_from_memory():
    """All that is done with labelled images, on both kinds of x: to the bit."""
    pixels = torch.randint(256, (60, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    y = (pixels.float().mean((1, 2, 3)) > 127).long()
    reports = []
    for x in (as_x(pixels), Images(pixels)):
        data = LabelledImages(x, {"y": y}, {"y": ("0", "1")})
        first, second = data[torch.arange(40)], data[torch.arange(40, 60)]
        p = fit_classifier(first.x, first.labels["y"], 2, recipe=Recipe(2), seed=3)
        calibrate(p, second.x, second.labels["y"])
        reports.append(report_classifier(p, second.x, second.labels["y"]))
    assert reports[0] == reports[1]
    with pytest.raises(ValueError, match="not clearly better than chance"):
        fit_panel(data, "y", ruler=True, settings=ClassifierSettings(updates=2, head="categorical", grid=1, depth=1))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_more_images_than_memory_is_spent_on(tmp_path):
    """6,000 images of 3 × 64 × 64: 295 MB as floats, 74 MB as bytes in a file that is not the process's own memory."""
    script = f"""
import torch, numpy as np
from PIL import Image
from pathlib import Path
from ctrl_diffusion.data import images
from ctrl_diffusion.data.read import read_images
images.IN_MEMORY = 2**26  # a quarter, so that fewer will do
folder = Path({str(tmp_path)!r})
Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(folder / "a.bmp")
for i in range(6000):
    (folder / f"{{i}}.bmp").hardlink_to(folder / "a.bmp")
(folder / "metadata.csv").write_text("file_name,y\\n" + "".join(f"{{i}}.bmp,{{i % 2}}\\n" for i in range(6000)))
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
read_images(folder, {{"y": None}}, (3, 8, 8))  # imports, which stay
before = anonymous()
data = read_images(folder, {{"y": None}}, (3, 64, 64))
assert isinstance(data.x, images.Images)
for rows in torch.arange(6000).split(100):
    data.x[rows].sum()
print(anonymous() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # a batch of 100 as floats is 5 MB, a few copies while it is scaled, the table's rows; the bytes would be 74 more
    assert int(done.stdout) / 1000 < 55
