"""Measure how far what is learned on some c carries to others: bench/results/population.json (a quarter of an hour).

python bench/population.py [NUMBER …]    # of the rows to make, from 0; all if none is named

The prior is the ring of the testbed, which moves with a continuous c (exact/population.py). A row trains on some c and
has the gap on these, on 400 others, and the difference; and the floor, on lattices, of six of the others.
"""

import sys

from evidence import read, write
from rich.console import Console
from rich.table import Table

from ctrl_diffusion.exact.population import programme, reach

SAME = ("learner", "likelihood", "conditions_trained")  # what a row is known by
SHOWN = ("gap_trained", "gap_unseen", "difference")


def main() -> None:
    races, rows = programme(), read("population", [])
    for number in map(int, sys.argv[1:] or range(len(races))):
        task, name = races[number]
        row = reach(task, name)
        rows = [other for other in rows if any(other[key] != row[key] for key in SAME)] + [row]
        write("population", rows)
    table = Table("y", "learner", "c trained on", "gap on these", "on others", "difference", "floor", title="nats")
    for row in rows:
        figures = [f"{row[f'{key}_nats']:.3f} ± {row[f'{key}_stderr']:.3f}" for key in SHOWN]
        names = row["likelihood"], row["learner"], str(row["conditions_trained"])
        table.add_row(*names, *figures, f"{row['gap_floor_nats']:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
