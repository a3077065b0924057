"""A file of prompts is read strictly, and what is left out or not read is said in one line."""

import re

import pytest

from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.text import encoders
from ctrl_diffusion.prior.text.prompt_file import beyond_windows, check_lines, read_prompt_file
from tests.prior.priors import SIZE


@pytest.mark.parametrize(
    ("data", "prompts", "lines", "about"),
    [
        (b"a cat\na dog\n", ["a cat", "a dog"], [1, 2], "2 prompts"),
        (b"a cat", ["a cat"], [1], "1 prompt"),
        (b"\xef\xbb\xbfa cat\r\n\r\n a dog \r\n", ["a cat", "a dog"], [1, 3], "2 prompts; 1 blank line left out"),
        (b"\n\na\n \na\na\nb", ["a", "b"], [3, 7], "2 prompts; 3 blank, 2 double lines left out"),
        (b"a\n\nb\n a", ["a", "b"], [1, 3], "2 prompts; 1 blank, 1 double line left out"),
        (b"a\nb\na\n\n\n", ["a", "b"], [1, 2], "2 prompts; 2 blank, 1 double line left out"),
        # é in one character and in two: equal, and kept as it is written first
        ("cafe\u0301\ncaf\u00e9\n".encode(), ["cafe\u0301"], [1], "1 prompt; 1 double line left out"),
        ("\n".join(map(str, range(1200))).encode(), list(map(str, range(1200))), list(range(1, 1201)), "1,200 prompts"),
    ],
)  # fmt: skip
def test_prompts_are_the_different_lines_that_are_not_blank(tmp_path, data, prompts, lines, about):
    (tmp_path / "prompts.txt").write_bytes(data)
    file = read_prompt_file(tmp_path / "prompts.txt")
    assert (file.prompts, list(file.lines), file.about) == (prompts, lines, f"prompts.txt: {about}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "prompts.txt has no prompts. Write one a line."),
        (b"\xef\xbb\xbf\n \n", "prompts.txt has no prompts. Write one a line."),
        (b"a\nb\ncaf\xe9\n", "line 3 is not UTF-8 (invalid continuation byte). Save it as UTF-8."),
        (b"a\r\n\r\nb \xff c", "line 3 is not UTF-8 (invalid start byte). Save it as UTF-8."),
        ("a cat\n".encode("utf-16"), "line 1 is not UTF-8 (invalid start byte). Save it as UTF-8."),
        (None, "prompts.txt is no file of prompts, one a line: No such file or directory."),
    ],
)
def test_what_is_no_file_of_prompts_is_one_line(tmp_path, data, message):
    if data is not None:
        (tmp_path / "prompts.txt").write_bytes(data)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 — the whole end is compared
        read_prompt_file(tmp_path / "prompts.txt")
    assert str(caught.value).endswith(message)
    assert "\n" not in str(caught.value)


# one token a letter, one each for begin and end: CLIP reads 14 of its 16, and T5, which begins a
# word by one of its own, 510 of 512
@pytest.mark.parametrize(
    ("name", "letters", "said"),
    [
        ("SD 1", [14, 1, 14], []),
        ("SD 1", [14, 15, 40], ["2 prompts are longer than the text encoder's 16 tokens; what is beyond is not read"]),
        ("SDXL", [15], ["1 prompt is longer than the text encoder's 16 tokens; what is beyond is not read"]),
        ("Flux", [14, 15, 3, 510], [
            "2 prompts are longer than the 16 tokens of text_encoder; what is beyond is not read there"
        ]),
        ("PixArt-Sigma", [298, 299], [
            "1 prompt is longer than the text encoder's 300 tokens; what is beyond is not read"
        ]),
        ("AuraFlow", [254, 255], ["1 prompt is longer than the text encoder's 256 tokens; what is beyond is not read"]),
        ("Z-Image", [493, 494], ["1 prompt is longer than the text encoder's 493 tokens; what is beyond is not read"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 3, 1024])
def test_prompts_beyond_a_window_are_counted(folders, monkeypatch, name, letters, said, batch):
    monkeypatch.setattr(encoders, "BATCH", batch)
    family = Prior.from_pretrained(folders[name][0], SIZE.get(name)).text
    prompts = ["a" * count for count in letters]
    reads = {"PixArt-Sigma": 298, "AuraFlow": 254, "Z-Image": 493}.get(name, 14)
    first = next((i for i, count in enumerate(letters) if count > reads), 0)
    lines = [10 * i + 7 for i in range(len(prompts))]
    assert beyond_windows(family.encoders, prompts, lines) == [f"{line} (first: line {lines[first]})" for line in said]
    assert beyond_windows(family.encoders, prompts) == [f"{line} (first: prompt {first + 1})" for line in said]


def test_each_window_has_its_line(folders):
    family = Prior.from_pretrained(folders["Flux"][0], SIZE["Flux"]).text
    clip, t5 = beyond_windows(family.encoders, ["two", "a" * 511], [1, 5])
    read = "what is beyond is not read there (first: line 5)"
    assert clip == f"1 prompt is longer than the 16 tokens of text_encoder; {read}"
    assert t5 == f"1 prompt is longer than the 512 tokens of text_encoder_2; {read}"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat\nasleep", "prompts: 'a cat\\nasleep' is no line without space around it."),
        (" a cat", "prompts: ' a cat' is no line without space around it."),
        ("", "prompts: '' is no line without space around it."),
        ("cafe\u0301", "prompts: 'cafe\u0301' occurs twice."),
    ],
)
def test_prompts_that_a_file_would_not_give_back_are_refused(prompt, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_lines([prompt, "a dog", "caf\u00e9"])


def test_prompts_that_a_file_gives_back_are_taken(tmp_path):
    prompts = ["caf\u00e9", "a dog", "two  spaces"]
    check_lines(prompts)
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    assert read_prompt_file(tmp_path / "prompts.txt").prompts == prompts
