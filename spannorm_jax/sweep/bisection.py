"""A bisecting sweep: of each cell the runs that decide next, by how those before have ended.

What is wanted is a function of the runs' folders alone. So several runners on one folder, and one that was killed and
started again, find the same ceilings.
"""

import itertools
import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spannorm_jax.config import replace
from spannorm_jax.report.ceilings import Bracket, Trained, Try, bracket, interval_text, odd, trains, tries
from spannorm_jax.report.folders import read_run
from spannorm_jax.sweep.expansion import Run, Sweep, shown
from spannorm_jax.sweep.records import ENDED, RunPlace
from spannorm_jax.training.program_key import program_key


@dataclass(frozen=True)
class Cell:
    """The runs that differ in nothing but rate and seed: of each rung of the ladder its seeds, ascending."""

    rungs: tuple[tuple[Run, ...], ...]

    @property
    def title(self) -> str:
        run, varying = self.rungs[0][0], ("optim.lr", "seed")
        return " ".join(word for word in shown(run).split(" ") if word.partition("=")[0] not in varying)


def cells_of(sweep: Sweep) -> list[Cell]:
    found: dict[object, dict[float, list[Run]]] = {}
    for run in sweep.runs:
        rungs = found.setdefault(replace(run.config, seed=0, optim__lr=1.0), {})
        rungs.setdefault(run.config.optim.lr, []).append(run)
    by_seed = operator.attrgetter("config.seed")
    return [Cell(tuple(tuple(sorted(rungs[lr], key=by_seed)) for lr in sorted(rungs))) for rungs in found.values()]


def chances(sweep: Sweep) -> dict[int, float]:
    """Index -> how likely a run is to be needed: every ceiling is as likely, and it is that of every seed.

    A sweep that bisects nothing needs all its runs.
    """
    if not sweep.bisects:
        return dict.fromkeys(range(len(sweep.runs)), 1.0)
    found: dict[int, float] = {}
    for cell in cells_of(sweep):
        rungs, seeds = len(cell.rungs), len(cell.rungs[0])
        needed = np.zeros((rungs, seeds))
        for ceiling in range(rungs + 1):
            asked: set[Try] = set()

            def trained(rung: int, seed: int, ceiling: int = ceiling, asked: set[Try] = asked) -> bool:
                asked.add((rung, seed))
                return rung < ceiling

            bracket(rungs, seeds, trained)
            for at in asked:
                needed[at] += 1
        for runs, counts in zip(cell.rungs, needed.tolist(), strict=True):
            found |= {run.index: count / (rungs + 1) for run, count in zip(runs, counts, strict=True)}
    return found


class Bisection:
    """How far a bisecting sweep is in a folder of runs. Outcomes are read once, when a run has ended."""

    def __init__(self, sweep: Sweep, out: Path):
        self.cells, self._out = cells_of(sweep), out
        self._outcomes: dict[int, str] = {}

    def outcome(self, run: Run) -> str | None:
        """As a report has it; None while the run has not ended."""
        if run.index not in self._outcomes:
            place = RunPlace(self._out, run.name)
            if place.state_at_rest() not in ENDED:
                return None
            self._outcomes[run.index] = read_run(place.workdir).outcome
        return self._outcomes[run.index]

    def _of(self, cell: Cell) -> tuple[int, int, Trained]:
        """What the functions of `report.ceilings` take."""
        return len(cell.rungs), len(cell.rungs[0]), lambda rung, seed: trains(self.outcome(cell.rungs[rung][seed]))

    def bracket(self, cell: Cell) -> Bracket:
        return bracket(*self._of(cell))

    def settled(self) -> int:
        """How many ceilings are."""
        return sum(not self.bracket(cell).wanted for cell in self.cells)

    def progress(self) -> str:
        return f"{self.settled()}/{len(self.cells)} ceilings"

    def wanted(self, ahead: int = 1) -> Iterator[tuple[int, int, Run]]:
        """The runs that are needed next, and those that may be needed, of less than `ahead` outcomes on.

        Each comes with the number of outcomes on, 0 for what is needed, and its place among the seeds.
        """
        for cell in self.cells:
            seen: set[Try] = set()
            for n, wanted in enumerate(itertools.islice(tries(*self._of(cell)), ahead)):
                yield from ((n, seed, cell.rungs[rung][seed]) for rung, seed in wanted if (rung, seed) not in seen)
                seen.update(wanted)

    def next_group(self, lanes: int, taken: Collection[int]) -> tuple[Run, ...]:
        """What a worker takes next, besides the runs (by index) that are `taken`; () while none is needed.

        A rate's first seed may settle it, so that other cells come before its second. Lanes that are left take what may
        be needed after either outcome.
        """
        free = [each for each in self.wanted(ahead=lanes) if each[2].index not in taken]
        free.sort(key=lambda each: each[:2])
        if not free or free[0][0] > 0:
            return ()
        first = free[0][2]
        if lanes == 1:
            return (first,)
        key = program_key(first.config)
        return tuple(itertools.islice((run for *_, run in free if program_key(run.config) == key), lanes))

    def lines(self) -> list[str]:
        """A line a cell: its interval so far, the run that decides next, and rates that fail below one that holds."""
        said = []
        for cell in self.cells:
            rates = [runs[0].config.optim.lr for runs in cell.rungs]
            low, high, wanted = self.bracket(cell)
            ends = (rates[rung] if 0 <= rung < len(rates) else None for rung in (low, high))
            text = f"{cell.title}: ceiling {interval_text(*ends)}"
            if wanted:
                run = cell.rungs[wanted[0][0]][wanted[0][1]]
                text += f" so far, next run {run.index} ({run.config.optim.lr:g})"
            below = odd(*self._of(cell))
            if below:
                text += f"; not monotone: fails at {', '.join(f'{rates[rung]:g}' for rung in below)} too"
            said.append(text)
        return said
