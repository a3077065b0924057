"""Rebuild the letters: `python bench/build_letters.py [STAGE …]`, all stages by default, each from what is there.

fonts    download and unpack packages of Debian (0.8 GB; needs apt-get and dpkg-deb)
glyphs   draw every face, leave out those that are no letters, split the rest by family
labels   fit and check the rulers, write the labelled sets, fit the judge of serif
train    train the prior on one thread, each round from the weights of the one before (an hour and a half)
quality  measure the prior beside real letters, and draw a page of samples

Files of work go to runs/letters; what ships is written into the package, and figures to bench/results.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import evidence
import numpy as np
import torch
from letters import drawn, fonts, measured, quality, reader, shipped, sift, train
from rich import print_json

from ctrl_diffusion.commands.app import quiet_dependencies
from ctrl_diffusion.data.letters import rulers, sets
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.source import LETTERS

CHECKED = 24  # upright faces of unseen families on which the rulers are checked
Stage = Callable[[Path], None]


def read_faces(work: Path) -> shipped.Faces:
    """Read the faces that the stage glyphs wrote."""
    rows = json.loads((work / "faces.json").read_text(encoding="utf-8"))
    family, part = (np.array([row[key] for row in rows]) for key in ("group", "part"))
    return shipped.Faces(np.load(work / "glyphs.npy"), rows, family, part)


def build_fonts(work: Path) -> None:
    """Download and unpack the packages."""
    fonts.unpack(fonts.download(work / "debs"), work / "unpacked")


def build_glyphs(work: Path) -> None:
    """Draw and sift the faces, and write them with what is known of them."""
    files = fonts.font_files(work / "unpacked")
    rows, glyphs, left_out = drawn.draw_faces(files)
    rows = drawn.relative(rows, work / "unpacked")
    stay, family, sifted_out = sift.sifted(rows, glyphs)
    left_out.update(sifted_out)
    part = sift.split(family, [rows[i]["family"] for i in stay])
    kept = [rows[i] | {"group": int(f), "part": str(p)} for i, f, p in zip(stay, family, part, strict=True)]
    glyphs = glyphs[stay]
    letters = reader.fit_reader(glyphs[part == "train"])
    torch.save(letters.state_dict(), work / "reader.pt")
    read = reader.shares_read(letters, glyphs) >= reader.READ
    left_out["has letters that a reader does not read"] = int((~read).sum())
    np.save(work / "glyphs.npy", glyphs[read])
    kept = [row for row, is_read in zip(kept, read, strict=True) if is_read]
    (work / "faces.json").write_text(json.dumps(kept), encoding="utf-8")
    write_fonts(kept, len(files), left_out)


def write_fonts(kept: list[dict[str, Any]], files: int, left_out: Counter) -> None:
    """Write which families there are, with their licences and parts, and what was left out."""
    faces = Counter((row["group"], row["family"], row["package"], row["licence"], row["part"]) for row in kept)
    columns = ("family", "name", "package", "licence", "part")
    table = [dict(zip(columns, key, strict=True)) | {"faces": count} for key, count in sorted(faces.items())]
    about = {
        "font_files": files,
        "faces": len(kept),
        "families": len({row["group"] for row in kept}),
        "faces_of_part": dict(sorted(Counter(row["part"] for row in kept).items())),
        "left_out": dict(left_out.most_common()),
    }
    evidence.write("letters-fonts", {**about, "table": table})


def build_labels(work: Path) -> None:
    """Fit and check the rulers, write the sets, fit the judge; write bench/results/letters.json."""
    faces = read_faces(work)
    training, test = (faces[faces.part == name] for name in ("train", "test"))
    measured.fit_expected(training.glyphs, training.rows, rulers.EXPECTED)
    upright = [row for row in test.rows if measured.is_upright(row)]
    generator = np.random.default_rng(0)
    checked = [upright[i] for i in generator.permutation(len(upright))[:CHECKED]]
    root = work / "unpacked"
    judge, accuracy = shipped.fit_judge(faces)
    judge.save(sets.JUDGE)
    figures = {
        "slant": measured.check_slant(checked, root),
        "width": measured.check_width(checked, root),
        "weight": measured.check_weight(checked, root),
        "sets": shipped.write_sets(faces),
        "judge_of_serif": accuracy,
    }
    print_json(data=figures)
    evidence.write("letters", figures)


def build_prior(work: Path) -> None:
    """Do the rounds of training that bench/results/letters-train.json lacks, from the weights that ship."""
    faces, done = read_faces(work), evidence.read("letters-train", [])
    data = [
        train.Glyphs(each.glyphs, each.family) for each in (faces[faces.part == name] for name in ("train", "pool"))
    ]
    torch.manual_seed(0)
    net = train.load_network(LETTERS) if done else train.new_network()
    for number, part in list(enumerate(train.ROUNDS, start=1))[len(done) :]:
        net, row = train.train_round(net, part, *data, work / f"round-{number}.pt")
        train.save_pipeline(net, LETTERS)
        done.append({"round": number, **asdict(part), **row})
        evidence.write("letters-train", done)


def build_quality(work: Path) -> None:
    """Measure the prior; write bench/results/letters-prior.json and docs/pictures/letters-prior.png."""
    faces = read_faces(work)
    figures, samples = quality.measure(Prior.from_pretrained(LETTERS), reader.load_reader(work / "reader.pt"), faces)
    print_json(data=figures)
    evidence.write("letters-prior", figures)
    quality.write_page(samples, faces[faces.part == "test"])


STAGES: dict[str, Stage] = {
    "fonts": build_fonts,
    "glyphs": build_glyphs,
    "labels": build_labels,
    "train": build_prior,
    "quality": build_quality,
}


def main() -> None:
    """Command line: do the stages named, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", choices=[*STAGES, []], help=", ".join(STAGES))
    parser.add_argument("--work", type=Path, default=Path("runs/letters"), help="the folder of work files")
    args = parser.parse_args()
    quiet_dependencies()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    for name in [name for name in STAGES if name in args.stages or not args.stages]:
        print(f"letters: {name}")
        STAGES[name](args.work)


if __name__ == "__main__":
    main()
