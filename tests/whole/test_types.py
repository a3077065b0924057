"""What a type checker needs is in the package, and every module that defines a public name is checked strictly."""

import re
from pathlib import Path

import ctrl_diffusion

ROOT = Path(__file__).parents[2]


def test_the_package_says_that_it_is_typed():
    assert (Path(ctrl_diffusion.__file__).parent / "py.typed").is_file()


def test_modules_that_define_public_names_are_checked_strictly():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "strict = true" in settings
    blocks = {
        errors: re.findall(r'"([\w.*]+)"', modules)
        for modules, errors in re.findall(r"module = (\[.*?\])\nignore_errors = (true|false)", settings, re.S)
    }
    for name in ctrl_diffusion.__all__:
        module = getattr(ctrl_diffusion, name).__module__
        patterns = [pattern.removesuffix("*") for pattern in blocks["true"]]
        ignored = any(module.startswith(each) if each.endswith(".") else module == each for each in patterns)
        assert not ignored or module in blocks["false"], module
