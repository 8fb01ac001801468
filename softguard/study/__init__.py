"""The study: a grid of base models, adapters, objectives, learning rates, lengths and seeds, fairly run and kept as a table.

Every adapter has its own range of learning rates; the rate is chosen for each base, row and length by the validation loss of
the row's own objective at the first seed, and then serves all seeds. Data, steps, prompts and judge are the same for all.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from softguard.errors import SoftguardError
from softguard.files import check_file, check_folder
from softguard.study.cells import attempt, finish, prepare
from softguard.study.grid import Arm, Cell, Grid, load_grid
from softguard.study.kept import ground_of, is_finished, rows_of, write_table
from softguard.study.table import NAME, read_table
from softguard.study.workers import Task, open_workers, run_tasks

__all__ = ["NAME", "Arm", "Cell", "Grid", "load_grid", "read_table", "run_study"]


def run_study(
    grid: Grid,
    out: Path,
    workers: int = 1,
    ray_address: str | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> Path:
    """Run all cells of a grid that are not done under `out`, and write `out/cells.parquet` after each; returns its path.

    `workers` processes of this machine, or, with `ray_address`, a Ray cluster whose nodes share the folder `out`. `told` gets a
    line for every task that ended. A learning rate at which training diverges is passed over. Of a study that is done it is
    checked that its model, guard and prompts are those it was made with.
    Raises SoftguardError at the end if cells are missing, naming the first reason, or at once if no worker can be had.
    """
    out = out.resolve()
    check_folder(out)
    check_file(out / NAME)
    tasks = study_tasks(grid, out)
    failed: list[str] = []
    done, dropped, begin = 0, 0, time.perf_counter()

    def without(skipped: int) -> str:
        return f" and {skipped} could not run" if skipped else ""

    def ended(task: Task, error: str, skipped: int) -> None:
        nonlocal done, dropped
        done, dropped = done + 1 + skipped, dropped + skipped
        spent = time.perf_counter() - begin
        told(
            f"[{done}/{len(tasks)}, {spent / 60:.0f} min, about {spent / done * (len(tasks) - done) / 60:.0f} left] {task.name}"
        )
        if error:
            told(f"  failed{without(skipped)}: {error}")
            failed.append(error)
        write_table(grid, out)

    cores = next(iter(grid.grounds.values())).model.threads
    with open_workers(workers, ray_address, cores) as pool:
        run_tasks(tasks, pool, ended)
    write_table(grid, out)
    if failed:
        raise SoftguardError(
            f"{len(failed)} of the study's {len(tasks)} tasks failed{without(dropped)}, the first with: {failed[0]}; "
            "the same command tries again"
        )
    return out / NAME


def study_tasks(grid: Grid, out: Path) -> list[Task]:
    """What is still to be done, base by base; within one, the first seed of all rows before the others.

    Before it, and where nothing is, each base's corpus and answers are made or checked.
    """
    tasks = []
    for base in grid.grounds:
        arms = [arm for arm in grid.arms if arm.cells[0][0].base == base]
        if not arms:
            continue
        ground = ground_of(arms[0], grid, out)
        own: dict[str, Task] = {}
        first = f"{base}: corpus and the base's answers"
        asked = ground.measuring
        rows = [rows_of(ground, arm, asked) for arm in arms]
        for number in range(max(len(arm.cells) for arm in arms)):
            for arm, found in zip(arms, rows, strict=True):
                if number >= len(arm.cells) or is_finished(arm, number, found):
                    continue
                trials = {f"{cell.label}: trial": cell for cell in arm.trials if cell.place not in found}
                for name, cell in trials.items():
                    own.setdefault(name, Task(name, partial(attempt, ground, cell), (first,)))
                head = arm.cells[number][0].recipe
                label = f"{base}, {arm.cells[0][0].row}, length {head.distil.n_soft}, seed {head.seed}"
                own[label] = Task(label, partial(finish, ground, arm, number), (first, *trials))
        tasks += [Task(first, partial(prepare, ground, [arm.cells[0][0].recipe for arm in arms], bool(own))), *own.values()]
    return tasks
