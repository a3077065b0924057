"""What corrupted files end in: a result, or an error in a line. bench/fuzz.py tries ten times as many."""

import fuzz
import pytest

CASES, PART = 200, 25


@pytest.fixture(scope="module")
def files():
    with fuzz.workspace() as root:
        yield root, fuzz.targets(root)


@pytest.mark.parametrize("first", range(0, CASES, PART))
def test_a_corrupted_file_ends_in_a_result_or_a_line(files, first):
    for seed in range(first, first + PART):
        target, code, text = fuzz.try_case(*files, seed)
        assert not fuzz.is_failure(code, text), f"seed {seed}, {target.file}: {code}\n{text}"
