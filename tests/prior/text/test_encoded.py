"""Prompts are encoded when they are looked up, once, and kept in files, to the same bytes whoever fills the store."""

import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ctrl_diffusion.prior.text.encoded import DONE, SHARD, EncodedPrompts

TOKENS, WIDTH = 3, 5
PROMPTS = [f"prompt {i}" for i in range(2 * SHARD + 9)]  # the last shard is a short one
DRAWN = [SHARD + 1, 2, 2 * SHARD + 8, 0]


def encode(prompt, dtype=torch.float32, tokens=TOKENS):
    """Rows that only the prompt determines, of two types."""
    draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little"))
    pooled = torch.randn(1, WIDTH, generator=draw).to(torch.bfloat16)
    return {"pooled": pooled, "states": torch.randn(1, tokens, WIDTH, generator=draw).to(dtype)}


def store_in(folder, encoder=encode, prompts=PROMPTS):
    return EncodedPrompts(encoder, prompts, folder / "key", encoder(prompts[0]))


def assert_rows(rows, numbers, encoder=encode):
    for name, row in rows.items():
        expected = torch.cat([encoder(PROMPTS[number])[name] for number in numbers])
        assert row.dtype == expected.dtype
        assert torch.equal(row, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_prompt_is_encoded_once_and_read_to_the_bit(tmp_path, dtype):
    """In any order, by this store and by the next; only the shards of what was drawn are there, as safetensors."""
    calls = []

    def counted(prompt):
        calls.append(prompt)
        return encode(prompt, dtype)

    store = store_in(tmp_path, counted)
    calls.clear()
    for numbers in (DRAWN, DRAWN[::-1], [2, 3]):
        assert_rows(store.rows(numbers), numbers, lambda prompt: encode(prompt, dtype))
    assert sorted(calls) == sorted(PROMPTS[number] for number in {*DRAWN, 3})
    calls.clear()
    assert_rows(store_in(tmp_path, counted).rows(DRAWN), DRAWN, lambda prompt: encode(prompt, dtype))
    assert len(calls) == 1  # its example
    assert sorted(store.folder.iterdir()) == [store.path(shard) for shard in range(3)]
    with safe_open(store.path(2), "pt") as file:
        assert file.get_tensor(DONE).tolist() == [0] * 8 + [1]
        assert torch.equal(file.get_tensor("states")[8], encode(PROMPTS[-1], dtype)["states"][0])


def test_only_the_shards_of_drawn_prompts_exist(tmp_path):
    store = store_in(tmp_path)
    assert not store.folder.exists()
    store.rows([])
    assert not store.folder.exists()
    store.rows([SHARD + 3])
    assert list(store.folder.iterdir()) == [store.path(1)]


def test_a_store_of_many_shards_keeps_few_open(tmp_path, monkeypatch):
    monkeypatch.setattr("ctrl_diffusion.prior.text.encoded.OPEN", 2)
    store = store_in(tmp_path)
    for numbers in (DRAWN, DRAWN):
        assert_rows(store.rows(numbers), numbers)
    assert len(store._maps) == 2


# fills a store slowly, saying which prompt comes next
SLOW = """
import sys, time
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from test_encoded import encode, store_in
def slow(prompt):
    print(prompt, flush=True)
    time.sleep(0.05)
    return encode(prompt)
store_in(Path(sys.argv[1]), slow).rows(range(40))
"""


def test_a_killed_process_leaves_what_it_encoded(tmp_path):
    """What it said it had finished is not encoded again; what it was about is."""
    here, root = Path(__file__).parent, Path(__file__).parents[3]
    command = [sys.executable, "-c", SLOW, str(tmp_path), str(here), str(root / "src")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line == "prompt 5\n":
                process.kill()
                break
        rest = process.stdout.read().splitlines()
    begun = 5 + len(rest)  # it may have begun others before it died
    calls = []

    def counted(prompt):
        calls.append(prompt)
        return encode(prompt)

    store = store_in(tmp_path, counted)
    calls.clear()
    assert_rows(store.rows(range(40)), range(40))
    assert calls in ([PROMPTS[i] for i in range(first, 40)] for first in range(5, begun + 2))
    assert begun < 40


def test_several_may_fill_one_store(tmp_path):
    """At the same time, from the making of its folder on."""

    def fill(number):
        def slow(prompt):
            time.sleep(0.001)
            return encode(prompt)

        return store_in(tmp_path, slow).rows(range(number, SHARD + 20, 5))

    with ThreadPoolExecutor(4) as pool:
        for number, rows in enumerate(pool.map(fill, [0, 1, 2, 3, 0, 1])):
            assert_rows(rows, range(number % 4, SHARD + 20, 5))
    everything = store_in(tmp_path, lambda prompt: encode("prompt 0"))  # what is not read back is wrong
    numbers = [number for number in range(SHARD + 20) if number % 5 != 4]
    assert_rows(everything.rows(numbers), numbers)
    assert [path.suffix for path in everything.folder.iterdir()] == [".safetensors"] * 2


def test_a_shard_made_meanwhile_is_taken_as_it_is(tmp_path):
    first, second = store_in(tmp_path), store_in(tmp_path)
    first.rows([1])
    before = first.path(0).read_bytes()
    second._create(second.path(0), second._layout(0))  # as if it had not been there when it was looked for
    assert first.path(0).read_bytes() == before


def test_where_there_are_no_links_a_shard_is_renamed(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    store = store_in(tmp_path)
    assert_rows(store.rows(DRAWN), DRAWN)
    assert [path.suffix for path in store.folder.iterdir()] == [".safetensors"] * 3


def foreign(path):
    other = store_in(path.parents[1] / "other", prompts=PROMPTS[:7])
    other.rows([0])
    path.write_bytes(other.path(0).read_bytes())


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 100),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\7"),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        foreign,
    ],
    ids=["cut", "empty", "header", "flag", "longer", "foreign"],
)
def test_a_damaged_or_foreign_shard_is_one_line(tmp_path, change):
    store_in(tmp_path).rows([0])
    store = store_in(tmp_path)
    change(store.path(0))
    with pytest.raises(
        ValueError, match=r"000000\.safetensors is damaged, or not of these prompts\. Remove it"
    ) as caught:
        store.rows([1])
    assert "\n" not in str(caught.value)
    store.path(0).unlink()
    assert_rows(store.rows([1]), [1])


@pytest.mark.parametrize("made", [False, True], ids=["shard", "row"])
def test_a_full_disk_is_one_line(tmp_path, made):
    """Of the making of a shard, or of a row in one: a limit on the size of files stands for it."""
    resource = pytest.importorskip("resource")

    def wide(prompt):
        return encode(prompt, tokens=1000)

    store = store_in(tmp_path, wide)
    if made:
        store.rows([0])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot be written: File too large\. The prompts") as caught:
            store.rows([0, 100])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert not list(store.folder.glob(".*"))
    assert_rows(store.rows([0, 100]), [0, 100], wide)


def test_a_full_store_may_be_read_only(tmp_path):
    """Nothing is opened for writing where nothing is missing."""
    store_in(tmp_path).rows(DRAWN)
    store = store_in(tmp_path)
    store._fill = store._create = None
    assert_rows(store.rows(DRAWN), DRAWN)


def test_prompts_that_cannot_be_kept_are_refused(tmp_path):
    with pytest.raises(ValueError, match="encoded prompts of torch.int64 cannot be kept in files. Leave the cache out"):
        EncodedPrompts(encode, PROMPTS, tmp_path, {"ids": torch.zeros(1, 3, dtype=torch.long)})
    store = store_in(tmp_path, lambda prompt: encode(prompt, tokens=TOKENS + (prompt == "prompt 7")))
    store.rows([6])
    with pytest.raises(ValueError, match=r"prompt 7 \('prompt 7'\) is encoded as \(4, 5\) of torch.float32, others as"):
        store.rows([6, 7])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts anonymous memory apart")
def test_memory_does_not_grow_with_what_was_encoded(tmp_path):
    """64 rows of a megabyte go through; a quarter of that would be seen."""

    def anonymous():
        status = Path("/proc/self/status").read_text().split()
        return int(status[status.index("RssAnon:") + 1]) / 1024

    def large(prompt):
        return {"states": torch.ones(1, 2**18)}

    store = store_in(tmp_path, large)
    store.rows([0])
    before = anonymous()
    for number in range(64):
        assert store.rows([number])["states"].all()
    assert anonymous() - before < 16
