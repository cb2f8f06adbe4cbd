"""What a guard's probabilities make of one call to generate: which prompts are refused, steered, or answered as they are. Runs no model itself."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from latentguard.backends import Backend, Controller, Decoding, Reply, Watch
from latentguard.errors import InputError
from latentguard.interventions import Cell, Grid
from latentguard.layers import resolve_layers
from latentguard.positions import Rendered, parse_position
from latentguard.prompts import Prompt

AT = "fpr=0.05"  # where prompts are flagged unless a controller says otherwise


class Guarding:
    """A guard and a controller over the prompts and the grid of one call. It is the untouched prompt that is judged, once for all cells.

    Attributes:
        cells: those of the grid; then, for each of the controller's, those of the grid with its interventions behind their own.
        layers: the layers that the guard reads, ascending.
        probability: of each prompt judged so far, by index.

    Raises:
        InputError: for what is no guard or controller, a guard that cannot judge live text or is not of this model, and a threshold it
            does not have.
    """

    def __init__(self, guard: Watch, controller: Controller | None, prompts: Sequence[Prompt], grid: Grid, backend: Backend) -> None:
        if not isinstance(guard, Watch):
            raise InputError(f"guard={guard!r}: give a LatentGuard, or what has its layers, positions, terminal, thresholds and probabilities()")
        if controller is not None and not isinstance(controller, Controller):
            raise InputError(f"controller={controller!r}: give Flag(…), Refuse(…) or Steer(…)")
        if guard.terminal != "mixed":
            raise InputError(
                f"guard fitted with terminal={guard.terminal!r}: live text ends as its writer likes, so guarding generation takes a guard fitted with "
                "terminal='mixed' (LatentGuard.fit(…, terminal='mixed'))"
            )
        at = controller.at if controller else AT
        if at not in guard.thresholds:
            raise InputError(f"at={at!r}: this guard has no such threshold; it has {', '.join(guard.thresholds) or 'none'}")
        getattr(guard, "check", lambda _: None)(backend)
        self.guard, self.controller, self.prompts, self.grid = guard, controller, list(prompts), grid
        self.threshold = float(guard.thresholds[at].value)
        self.layers, self.depth = resolve_layers(guard.layers, backend.n_layers), backend.n_layers
        self.positions = [parse_position(position, reading=True) for position in guard.positions]
        own = controller.cells if controller else ()
        for act in (act for cell in own for act in cell.interventions):
            act.check(backend)
        self.cells = (*grid, *(Cell((*cell.interventions, *more.interventions), cell.tags) for more in own for cell in grid))
        self.probability: dict[int, float] = {}
        self._answers: dict[int, str | int | None] = {}

    @property
    def touched(self) -> bool:
        """Whether the grid itself changes a state that the guard reads, so that the prefill has none that are untouched."""
        return any(min(act.layers(self.depth)) <= self.layers[-1] for cell in self.grid for act in cell.interventions)

    def fits(self, rendered: Sequence[Rendered]) -> None:
        """Refuse prompts without a place that the controller acts at, whether they come to be flagged or not."""
        for place in map(parse_position, sorted({act.positions for cell in self.cells[len(self.grid) :] for act in cell.interventions})):
            for item in rendered:
                place.tokens(item)

    def judge(self, rows: Sequence[int], states: Tensor) -> None:
        """Keep the probabilities of prompts, by index, from their untouched states float32 [prompt, layer, position, d_model]. What was
        said of a prompt before stays, so that a batch that ran out of memory is not judged anew.

        Raises:
            InputError: for a probability that is none: a prompt is never let through for it.
        """
        if all(row in self.probability for row in rows):
            return
        found = np.asarray(self.guard.probabilities(states), dtype=float)
        if found.shape != (len(rows),):
            raise InputError(f"the guard gave probabilities of shape {found.shape} for {len(rows)} prompts: one for each is needed")
        for row, value in zip(rows, found.tolist(), strict=True):
            if not 0 <= value <= 1:
                raise InputError(f"the guard gave {value} for prompt {self.prompts[row].id}, which is no probability: were its states finite?")
            if row not in self.probability:
                self.probability[row] = value
                flagged = self.controller is not None and value >= self.threshold
                self._answers[row] = self.controller.choose(value, self.threshold) if flagged else None  # type: ignore[union-attr]

    def then(self, cell: int, row: int) -> Reply | int:
        """What becomes of a judged prompt in a cell of the grid: a reply that refuses, or the cell (of `cells`) that answers it."""
        answer = self._answers[row]
        if isinstance(answer, str):
            return self.marked(row, Reply(self.prompts[row], answer, (), "refused"))
        return cell if answer is None else len(self.grid) * (1 + answer) + cell

    def marked(self, row: int, reply: Reply) -> Reply:
        """The reply with what the guard says of its prompt."""
        return replace(reply, probability=self.probability[row], flagged=self.probability[row] >= self.threshold)

    def read_first(self, backend: Backend, decoding: Decoding, decided: Callable[[str], bool] | None) -> Iterator[tuple[int, int, Reply]]:
        """Replies by `backend.read` and then `backend.stream`, which never hear of the guard."""
        self.fits(backend.render(self.prompts))
        every, size = range(len(self.prompts)), len(self.grid)
        if self.prompts:
            self.judge(every, backend.read(self.prompts, self.layers, [place.name for place in self.positions]).values)
        answered: dict[int, list[int]] = {}  # prompts by the first of the cells that answer them
        for row in every:
            if isinstance(first := self.then(0, row), Reply):
                yield from ((cell, row, first) for cell in range(size))
            else:
                answered.setdefault(first, []).append(row)
        for first, rows in sorted(answered.items()):
            cells = Grid(self.cells[first : first + size])
            for cell, k, reply in backend.stream([self.prompts[row] for row in rows], cells, decoding, decided):
                yield cell, rows[k], self.marked(rows[k], reply)
