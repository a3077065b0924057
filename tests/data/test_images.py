import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin

from ctrl_diffusion.data import images
from ctrl_diffusion.data.images import Images, Levels, as_x, joined_x, open_image
from ctrl_diffusion.data.labelled import LabelledImages
from ctrl_diffusion.data.read import read_images
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


N = 6


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(pixels):
    """A plain grey TIFF of the bits, the sign and the byte order of an array (H, W)."""
    order = ">" if pixels.dtype.byteorder == ">" else "<"
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    height, width = pixels.shape
    data, bits = pixels.tobytes(), 8 * pixels.dtype.itemsize
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data), 339: kind}
    fields = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HI", 42, 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + fields + bytes(4)


def chunk(kind, data):
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def noise(*shape):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


@pytest.fixture
def read(tmp_path):
    """Write files, each row's own, with a table of two classes, and read them."""

    def call(files, shape=(1, 8, 8), folder="data", **options):
        (tmp_path / folder).mkdir(exist_ok=True)
        for i, content in enumerate(files):
            (tmp_path / folder / f"{i}.bin").write_bytes(content)
        rows = "".join(f"{i}.bin,{i % 2}\n" for i in range(len(files)))
        (tmp_path / folder / "metadata.csv").write_text("file_name,y\n" + rows)
        return read_images(tmp_path / folder, {"y": None}, shape, **options)

    return call


def bytes_of(data):
    return ((data.x + 1) * 127.5).round().int()


RAISED = (
    TypeError("int() argument must be a string"),
    RuntimeError("Failed to decode"),
    struct.error("unpack requires"),
    zlib.error("Error -3"),
    OverflowError("too large"),
    MemoryError(),
    RecursionError("maximum depth"),
    KeyError(282),
    IndexError("list index"),
    ZeroDivisionError("division by zero"),
    AttributeError("no attribute"),
    EOFError("no more"),
    AssertionError(),
    NotImplementedError("DXT7"),
    UnicodeDecodeError("ascii", b"\xff", 0, 1, "bad"),
    Image.DecompressionBombError("x"),
)


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["open", "load"])
def test_whatever_a_decoder_raises_is_that_rows_fault(read, monkeypatch, where, error):
    """Also where the header alone is read, for the shape."""
    target, name = (Image, "open") if where == "open" else (ImageFile.ImageFile, "load")
    usual = getattr(target, name)

    def decode(image, *arguments, **options):
        shown = image if where == "open" else getattr(image, "filename", "")
        if str(shown).endswith("4.bin"):
            raise error
        return usual(image, *arguments, **options)

    monkeypatch.setattr(target, name, decode)
    files = [encoded(noise(8, 8))] * N
    for shape in ((1, 8, 8), None):
        with pytest.raises(ValueError, match=r"metadata\.csv row 5: cannot read '4\.bin' \(.+\)\. Mend it") as refused:
            read(files, shape)
        assert "\n" not in str(refused.value)
        with pytest.warns(
            UserWarning, match=r"1 of 6 rows cannot be used \(1 × unreadable images; the first: .* row 5"
        ):
            assert len(read(files, shape, skip_bad=True)) == N - 1


def exif(*entries):
    """An EXIF block in a JPEG of entries (tag, kind, count, value)."""
    fields = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4)


TURNED = (0x0112, 3, 1, b"\x06\0\0\0")
DAMAGED = {
    "EXIF that cannot be written anew": encoded(noise(9, 8, 3), "JPEG", exif=exif(TURNED, (0x011C, 2, 3, b"\xff" * 4))),
    "half an AVIF": encoded(noise(32, 32, 3), "AVIF")[:300],
    "no picture": b"hello",
    "nothing": b"",
    "no width": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 8, 8, 0, 0, 0, 0)),
    "too many pixels": b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 0, 0, 0, 0)),
    "more text than memory is spent on": encoded(noise(8, 8))[:33]
    + chunk(b"tEXt", b"a\0" + b"x" * 70_000_000)
    + encoded(noise(8, 8))[33:],
    **{
        f"{kind} cut off": encoded(noise(32, 32, 3), kind)[:-200]
        for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
    },
    "floats": tiff(np.zeros((8, 8), np.float32)),
    "signed bytes": tiff(np.full((8, 8), -3, np.int8)),
    "beyond 31 bits": tiff(np.full((8, 8), 3_000_000_000, np.uint32)),
    "64 bits": tiff(np.zeros((8, 8), np.int64)),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_picture_is_that_rows_fault(read, what):
    files = [encoded(noise(8, 8))] * N
    files[4] = DAMAGED[what]
    with pytest.raises(
        ValueError, match=r"row 5: cannot read '4\.bin' \(.+\)\. Mend it or remove the row\."
    ) as refused:
        read(files)
    assert "\n" not in str(refused.value)
    with pytest.warns(UserWarning, match="1 × unreadable images"):
        assert len(read(files, skip_bad=True)) == N - 1


def ramp(low, high, dtype):
    """N images (8, 8), which together reach from low to high."""
    return np.linspace(low, high, 64 * N).round().astype(dtype).reshape(N, 8, 8)


DEEP = [
    (0, 65535, "u2", (0, 65535)),
    (0, 40000, ">u2", (0, 65535)),
    (0, 30000, "u2", (0, 65535)),
    (0, 4095, "u2", (0, 4095)),
    (20, 3000, ">u2", (0, 4095)),
    (0, 1000, "u2", (0, 1023)),
    (0, 9000, "u2", (0, 16383)),
    (0, 200, "u2", (0, 255)),
    (-1024, 3071, "i2", (-1024, 3071)),
    (0, 4000, "i2", (0, 4095)),
    (-7, -7, "i2", (-7, -7)),
    (0, 200_000, "i4", (0, 200_000)),
    (-5, 2**31 - 1, ">i4", (-5, 2**31 - 1)),
    (0, 60_000, "u4", (0, 65535)),
]


@pytest.mark.parametrize(("low", "high", "dtype", "levels"), DEEP, ids=str)
def test_images_of_more_than_8_bits_are_scaled_by_one_rule_over_the_set(read, recwarn, low, high, dtype, levels):
    """By the fewest usual bits that hold every number of the set, or else its extremes; what is not 16 bits is told."""
    values = ramp(low, high, dtype)
    data = read([tiff(image) for image in values])
    black, white = levels
    expected = (values.astype(np.int64) - black) * 255 // max(1, white - black)
    assert bytes_of(data).squeeze(1).tolist() == expected.tolist()
    assert data.levels == levels
    said = f"6 of 6 images have more than 8 bits ({black} … {white} became black … white in all of them)"
    assert said in data.about
    assert [said in str(warning.message) for warning in recwarn] == ([] if levels == (0, 65535) else [True])


def test_sixteen_bits_are_what_they_always_were(read):
    values = ramp(0, 65535, np.uint16)
    assert (
        bytes_of(read([encoded(Image.fromarray(image)) for image in values])).squeeze(1).tolist()
        == (values // 257).tolist()
    )


def colours(values, kind):
    """A PNG of 16 bits a channel, grey and alpha (2), RGB (3) or RGBA (4), which Pillow does not write."""
    rows = np.repeat(values[..., None], kind, axis=-1).astype(">u2")
    header = struct.pack(">IIBBBBB", *values.shape[::-1], 16, {2: 4, 3: 2, 4: 6}[kind], 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return encoded(noise(8, 8))[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", [2, 3, 4])
def test_colours_of_16_bits_are_told_and_refused_where_they_would_be_dark(read, kind):
    """Their decoder keeps the upper 8 bits, which 12 of 16 hardly reach."""
    grey = encoded(noise(8, 8))
    bright, dark = (colours(np.full((8, 8), value), kind) for value in (65535, 4095))
    with pytest.warns(UserWarning, match="2 of 6 images have colours of 16 bits, the first that of row 3: the upper 8"):
        assert bytes_of(read([grey, grey, bright, bright, grey, grey]))[2].unique().tolist() == [255]
    with pytest.raises(ValueError, match="upper 8 of them are read, at most 15 of 255. Scale them to 8 bits yourself"):
        read([grey, grey, dark, grey, grey, grey], folder="dark")


def test_images_of_8_bits_beside_deeper_ones_stay_as_they_are(read):
    files = [encoded(noise(8, 8))] * 5 + [tiff(np.full((8, 8), 4000, np.uint16))]
    with pytest.warns(UserWarning, match=r"1 of 6 images have more than 8 bits \(0 … 4095 became"):
        x = bytes_of(read(files))
    assert x[0, 0].tolist() == np.asarray(noise(8, 8)).tolist()
    assert x[5].unique().tolist() == [4000 * 255 // 4095]


def test_other_images_are_scaled_as_the_first_and_what_lies_beyond_is_told(read):
    """As a judge's data are as p̂'s."""
    first = read([tiff(image) for image in ramp(-1024, 3071, np.int16)])
    with pytest.warns(
        UserWarning, match=r"\(-1024 … 3071 became black … white in all of them; 1 go beyond, first .* row 6"
    ):
        other = read([tiff(image) for image in ramp(0, 3100, np.int16)], folder="other", levels=first.levels)
    assert other.levels == first.levels
    assert bytes_of(other)[0, 0, 0, 0] == 1024 * 255 // 4095
    assert bytes_of(other).max() == 255


@pytest.mark.parametrize(
    ("lowest", "highest", "levels"), [(0, 255, (0, 255)), (0, 256, (0, 1023)), (0, 65536, (0, 65536)), (-1, 5, (-1, 5))]
)
def test_levels_of_extremes(lowest, highest, levels):
    assert Levels.of_extremes(lowest, highest) == levels


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt"])
def test_the_text_in_a_picture_does_not_matter(read, kind):
    """Programs keep a picture's history in it. What Pillow allows is as before, afterwards."""
    info, before = PngImagePlugin.PngInfo(), PngImagePlugin.MAX_TEXT_CHUNK
    {"tEXt": info.add_text, "zTXt": info.add_text, "iTXt": info.add_itxt}[kind](
        "workflow", "x" * 3_000_000, zip=kind != "tEXt"
    )
    data = read([encoded(noise(8, 8), pnginfo=info), encoded(noise(8, 8))], shape=None)
    assert torch.equal(data.x[0], data.x[1])
    assert PngImagePlugin.MAX_TEXT_CHUNK == before


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP", "AVIF", "MPO"])
def test_of_several_pages_the_first_is_read_and_that_is_told(read, kind):
    pages = [noise(8, 8, 3), noise(8, 8, 3).rotate(90), noise(8, 8, 3).rotate(180)]
    options = {"lossless": True} if kind == "WEBP" else {}
    files = [encoded(pages[0], kind, save_all=True, append_images=pages[1:], **options)] + [encoded(noise(8, 8, 3))] * 3
    with pytest.warns(
        UserWarning, match=r"1 of 4 files hold several images \(row 1 has 3\): the first of each was read"
    ) as record:
        data = read(files, (3, 8, 8))
    assert len(record) == 1
    if kind in ("TIFF", "PNG", "WEBP"):  # which keep every pixel
        assert torch.equal(data.x[0], data.x[1])


def test_a_damaged_tiff_is_no_line_of_its_decoder(read, capfd):
    """Libtiff writes to the terminal by itself."""
    whole = encoded(noise(32, 32, 3), "TIFF", compression="tiff_lzw")
    damaged = whole[:60] + bytes(200) + whole[260:]
    with pytest.raises(ValueError, match="row 1: cannot read '0.bin'"):
        read([damaged] * 2)
    os.write(2, b"heard again")
    assert capfd.readouterr() == ("", "heard again")


MODES = (
    "1",
    "L",
    "P",
    "PA",
    "LA",
    "La",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I;16",
    "I;16B",
    "I;16L",
    "I;16N",
    "I",
)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_is_read(monkeypatch, mode):
    """As it would look: a middle grey, but for what has two tones."""
    if mode.startswith("I"):
        image = Image.fromarray(np.full((8, 8), 128, np.uint16)).convert("I")
        image = (
            image
            if mode == "I"
            else Image.frombytes(mode, (8, 8), np.full(64, 128, ">u2" if mode == "I;16B" else "<u2").tobytes())
        )
    else:
        image = Image.new("L", (8, 8), 128)
        for step in {
            "La": ("LA", "La"),
            "PA": ("LA", "PA"),
            "LAB": ("RGB", "LAB"),
            "HSV": ("RGB", "HSV"),
            "RGBa": ("RGBA", "RGBa"),
            "CMYK": ("RGB", "CMYK"),
            "YCbCr": ("RGB", "YCbCr"),
            "RGBX": ("RGB", "RGBX"),
        }.get(mode, (mode,)):
            image = image.convert(step)
    image.tile = []
    monkeypatch.setattr(Image, "open", lambda _: image)
    picture = open_image(b"").image
    assert picture.mode in ("L", "RGB", "RGBA", "I")
    if mode != "1":
        # a level, which the conversions round to
        assert (
            np.abs(np.asarray(picture if picture.mode == "I" else picture.convert("RGB")).astype(int) - 128).max() <= 1
        )
