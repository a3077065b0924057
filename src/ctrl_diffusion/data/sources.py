"""Find the table of a source: a file, a folder of one of the usual layouts, a saved dataset, or the hub."""

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from .formats import load, read_dataset, read_text_table
from .tables import Table, image_column, path_inside

HUB = re.compile(r"[\w.-]+/[\w.-]+")  # what a name on the Hugging Face hub looks like
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of a folder, the first that is there
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
TRAIN, OTHERS = ("train", "training"), ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
SHARD = re.compile(r"(.*?)-?(\d+)-of-(\d+)")
LABEL = "label"  # what the sub-folders' names are a column of


def open_table(source: str | Path, image: str | None = None) -> Table:
    """Open a dataset by its path, or its name on the hub; refuse (ValueError) what is no table of images.

    `image` is the column that has the images, if it has an unusual name.
    """
    path, name = Path(source), str(source)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return open_saved(path, image)
    if path.is_dir():
        return open_folder(path, image)
    if path.is_file():
        if path.suffix.lower() not in TABLES:
            raise ValueError(f"{path} is no table: {', '.join(TABLES)} are read, and folders.")
        if path.suffix.lower() == ".parquet":
            return read_parquet([path], str(path), image)
        return read_text_table(path, image)
    check_source(source)
    subject = f"{name} is no folder or file here, and"
    dataset = load(lambda datasets: datasets.load_dataset(name, split="train"), subject)
    return read_dataset(dataset, name, None, image)


def check_source(source: str | Path) -> None:
    """Refuse (ValueError) what is no folder, no file and no name on the hub."""
    if not Path(source).exists() and not HUB.fullmatch(str(source)):
        raise ValueError(
            f"there is no folder or file {source}, and it is no OWNER/NAME of a dataset on the hub. If the data "
            "were moved, say where to: --data, or data: (judge_data: of a judge) in the config."
        )


def open_saved(path: Path, image: str | None) -> Table:
    """Open what `save_to_disk` wrote, of several splits that for training."""
    dataset, notes = load(lambda datasets: datasets.load_from_disk(str(path)), path), []
    if isinstance(dataset, dict):  # of splits
        split = next((name for name in dataset if name in TRAIN), None)
        if split is None and len(dataset) > 1:
            splits = ", ".join(dataset)
            raise ValueError(f"{path} has the splits {splits} and none called train. Save the one to be used.")
        notes = [f"{split} of the splits {', '.join(dataset)}"] if len(dataset) > 1 else []
        dataset = dataset[split or next(iter(dataset))]
    return with_notes(read_dataset(dataset, str(path), path, image), *notes)


def open_folder(path: Path, image: str | None) -> Table:
    """Open a folder: by its metadata, else its Parquet files, else its split for training, else its sub-folders."""
    found = [path / name for name in METADATA if (path / name).is_file()]
    if found:
        others = [file.name for file in found[1:]]
        note = [f"{found[0].name} was taken, not {' or '.join(others)}"] if others else []
        is_parquet = found[0].suffix == ".parquet"
        table = read_parquet(found[:1], str(found[0]), image) if is_parquet else read_text_table(found[0], image)
        return with_notes(table, *note)
    for folder in (path, path / "data"):
        if shards := sorted(folder.glob("*.parquet")):
            return read_shards(folder, shards, image)
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith((".", "__")))
    names = [folder.name.lower() for folder in folders]
    if names and set(names) <= {*TRAIN, *OTHERS}:
        train = next((folder for folder in folders if folder.name.lower() in TRAIN), None)
        if train is None:
            splits = ", ".join(folder.name for folder in folders)
            raise ValueError(f"{path} has the splits {splits} and none called train. Name the one to be used.")
        note = [f"{train.name}/ of the splits {', '.join(folder.name for folder in folders)}"] if folders[1:] else []
        return with_notes(open_folder(train, image), *note)
    return read_subfolders(path, folders, image)


def with_notes(table: Table, *notes: str) -> Table:
    """Return a table with notes before its own."""
    return replace(table, notes=[*notes, *table.notes])


def read_parquet(files: Sequence[Path], name: str, image: str | None) -> Table:
    """Read Parquet files as one table, whose paths are relative to their folder."""
    cache = tempfile.TemporaryDirectory()  # on disk: images in a table may be more than memory holds
    paths = [str(file) for file in files]
    dataset = load(lambda datasets: datasets.Dataset.from_parquet(paths, cache_dir=cache.name), name)
    return replace(read_dataset(dataset, name, files[0].parent, image), cache=cache)


def read_shards(folder: Path, shards: list[Path], image: str | None) -> Table:
    """Read the Parquet files of a folder, in the order of their names, of several splits those for training."""
    splits = {shard: "".join(re.findall("^[a-z]*", shard.stem.lower())) for shard in shards}
    splits = {shard: split if split in (*TRAIN, *OTHERS) else "" for shard, split in splits.items()}
    chosen, notes = shards, []
    if len(set(splits.values())) > 1:
        chosen = [shard for shard in shards if splits[shard] in TRAIN]
        if not chosen:
            raise ValueError(f"{folder} has Parquet files of several splits and none called train. Name one file.")
        notes = [f"{chosen[0].name} and the like, not {next(s for s in shards if s not in chosen).name}"]
    check_shards(folder, chosen)
    return with_notes(read_parquet(chosen, f"{folder} ({len(chosen)} Parquet files)", image), *notes)


def check_shards(folder: Path, shards: Sequence[Path]) -> None:
    """Refuse Parquet files that are not all there by their numbers, or have other columns than the first."""
    from pyarrow.parquet import read_schema

    matches = [match for match in (SHARD.match(shard.stem) for shard in shards) if match]
    there = {(match[1], int(match[2])) for match in matches}
    for match in matches:
        if lost := [i for i in range(int(match[3])) if (match[1], i) not in there]:
            raise ValueError(f"{folder} lacks number {lost[0]} of the {int(match[3])} files of {match[1]}. Bring it.")
    first = load(lambda _: read_schema(shards[0]).names, shards[0])
    for shard in shards[1:]:
        if (names := load(lambda _, shard=shard: read_schema(shard).names, shard)) != first:
            raise ValueError(f"{shard} has the columns {', '.join(names)}, {shards[0].name} {', '.join(first)}.")


def refuse(error: OSError) -> None:
    """Raise an error that would otherwise be passed over."""
    raise error


def read_subfolders(path: Path, folders: Sequence[Path], image: str | None) -> Table:
    """Read the images in sub-folders, each named by the label of those in it, however deep."""
    Image.init()
    images = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files, labels, others = [], [], []
    for folder in folders:
        for parent, below, names in os.walk(folder, onerror=refuse):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in sorted(name for name in names if not name.startswith(".")):
                file = Path(parent, name).relative_to(path).as_posix()
                if Path(name).suffix.lower() in images:
                    files.append(file)
                    labels.append(folder.name)
                else:
                    others.append(file)
    if not files:
        tables = sorted(file.name for file in path.iterdir() if file.suffix.lower() in TABLES)
        there = (
            f"It has {', '.join(tables[:3])}: name the file itself, if that is the table"
            if tables
            else (
                "Write one with file_name and one column per label, or put the images into a sub-folder for each class"
            )
        )
        raise ValueError(f"{path} has no {', '.join(METADATA[:2])} or {METADATA[2]}. {there}.")
    image_column(str(path), columns := ["file_name", LABEL], image)
    notes = ["labels are the names of the sub-folders"]
    if others:
        notes.append(f"{len(others)} of their files are no images by their names (the first: {others[0]})")
    if beside := sum(file.is_file() and file.suffix.lower() in images | set(TABLES) for file in path.iterdir()):
        notes.append(f"{beside} files beside the sub-folders are not read")
    return Table(
        str(path), columns, {"file_name": files, LABEL: labels}.__getitem__,
        lambda i: (path_inside(path, files[i]), files[i]), len(files), notes=notes, other=LABEL,
    )  # fmt: skip
