"""A model on this machine, read and changed inside nnsight traces. Knows no data set, judge or experiment.

What makes it cheap changes no result: the forward pass ends at the deepest layer read; prompts of like length go together;
a cell that first acts at layer l starts from the clean states entering it; the text that all prompts share is run once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from latentguard import families
from latentguard.backends import Acting, Backend, Decoding, Reply, as_grid
from latentguard.backends.attribution import attributed
from latentguard.backends.batches import lengthwise, make_batch, shared_prefix, spots
from latentguard.backends.decoding import Decoder
from latentguard.backends.guarding import Guarding
from latentguard.backends.memory import Budget, blank_states, release, shortage
from latentguard.backends.passes import Passes
from latentguard.backends.prefill import Pair, Prefill, Unit
from latentguard.backends.served import averaged
from latentguard.backends.texts import Texts, ends, places
from latentguard.backends.tracing import nnsight
from latentguard.directions import Activations, Moments
from latentguard.errors import InputError
from latentguard.interventions import Grid, Intervention
from latentguard.layers import Layers, resolve_layers
from latentguard.positions import Position, Rendered, parse_position
from latentguard.prompts import Prompt, as_prompts, digest
from latentguard.ranks import ALONE, Alone
from latentguard.templates import Template

_WINDOW = 4096  # prompts that are rendered, and sorted by length, at a time where only moments are kept


class Local(Texts, Backend):
    """A transformers model in this process.

    Args:
        model: any decoder-only `transformers` model; it is left as it was found.
        batch_size: rows at most in one forward pass; 'auto' is what the model's shapes and the free memory allow. Either is
            halved where memory runs out.
        weights: a hash of the weights, for the store and for directions' cards.
        reuse: start cells from clean states and run shared text once (off only in tests).
        team: the processes that the model lies on (tensor parallel); `loading.load` makes the model on all of them.
    """

    number = 0  # by which the other ranks know the model

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, weights: str = "", template: str = "chat", system: str | None = None,
        batch_size: int | str = "auto", reuse: bool = True, team: Alone = ALONE,
    ) -> None:  # fmt: skip
        if batch_size != "auto" and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
            raise InputError(f"batch_size={batch_size!r}: choose auto, or a number of rows, 1 or more")
        self.template = Template(tokenizer, template, system)  # type: ignore[arg-type]
        self.tokenizer, self.name, self.weights = tokenizer, name, weights
        self.reuse, self.team, self.passes = reuse, team, Passes(model.eval(), tokenizer, team)
        self.model, self.blocks = self.passes.tree, self.passes.blocks
        self.batch_size = batch_size
        self.n_layers, self.d_model = families.n_layers(model.config), families.text_config(model.config).hidden_size
        self.window = families.sliding_window(model.config)
        self.limit = getattr(families.text_config(model.config), "max_position_embeddings", None)
        self.device = self.passes.device
        if any(not hasattr(layer, "keys") for layer in DynamicCache(config=model.config).layers):
            raise InputError(
                f"{type(model).__name__} has layers without attention keys (linear attention, state space); latentguard reads attention models only"
            )
        self.eos = ends(model.generation_config, tokenizer)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def key(self) -> dict:
        """Model, template and libraries."""
        return {
            "weights": self.weights or self.name,
            "template": digest(self.template.source),
            "config": digest(
                {key: value for key, value in self.passes.hf.config.to_diff_dict().items() if key != "_name_or_path"}
            ),  # rope, norms, windows, quantisation
            "eos": sorted(self.eos),
            "dtype": str(self.passes.hf.dtype),
            "attention": self.passes.hf.config._attn_implementation,
            "device": self.device.type,
            **({"ranks": self.team.size} if self.team.size > 1 else {}),  # each adds up its share, and the sums of shares round otherwise
            "versions": [torch.__version__, transformers.__version__, nnsight.__version__],
        }

    @property
    def hf(self) -> Any:
        """The transformers model; refused where only the methods below reach all of it."""
        self.team.guard()
        return self.passes.hf

    @property
    def batch_size(self) -> int | str:
        """Rows of one forward pass, or 'auto'."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int | str) -> None:
        self._batch_size, self._budget = value, None

    @property
    def budget(self) -> Budget:
        """What goes into one forward pass; measured when first asked for."""
        if self._budget is None:
            self._budget = Budget.of(self.passes.hf, None if self._batch_size == "auto" else int(self._batch_size), self.team.size)
        return self._budget

    def _asking(self, what: str, *args: Any) -> AbstractContextManager[object]:
        """While open, the other ranks follow a method, in batches as large as here."""
        return self.team.asking(self.number, what, self.budget, *args)

    def follow(self, what: str, budget: Budget, *args: Any) -> None:
        """What rank 0 asks of a method, done beside it; what comes of it is rank 0's."""
        self._budget = self.budget.set(budget) if self._budget else budget
        if what == "logits":
            listed, grid, position = args
            self.logits(listed, grid, position=position, reduce=lambda *_: None)
        else:
            for _ in getattr(self, what)(*args):
                pass

    def _halved(self, left: set, elsewhere: bool) -> set:
        """After memory ran out, here or elsewhere: what rank 0 still lacks, in batches of half the rows."""
        if self.team.follows:
            release()
        else:
            self.budget.shrink(elsewhere)
        left, budget = self.team.same(lambda: (left, self.budget))
        self.budget.set(budget)
        return left

    def read(self, prompts: object, layers: Layers = "all", positions: Sequence[str] = ("t_inst",)) -> Activations:
        """States at named positions; the mean is taken where a position is a mean. What half of the memory does not hold lies
        in an unnamed file mapped into it.
        """
        listed, wanted, parsed = as_prompts(prompts), resolve_layers(layers, self.n_layers), places(positions)
        values, bar = blank_states(len(listed), len(wanted), len(parsed), self.d_model), self._bar("read", len(listed))
        for rows, states in self._states(listed, wanted, parsed):
            values[rows] = states
            bar.update(len(rows))
        bar.close()
        return Activations(values, tuple(listed), wanted, tuple(place.name for place in parsed), self.name, self.weights, self.n_layers)

    def moments(self, prompts: Iterable[object], layers: Layers = "all", positions: Sequence[str] = ("t_inst",), covariance: bool = False) -> Moments:
        """Mean (and covariance) of states over prompts, added up as they are read: the memory does not grow with the prompts."""
        wanted, parsed = resolve_layers(layers, self.n_layers), places(positions)
        source = iter(as_prompts(prompts) if isinstance(prompts, Sequence | Mapping | Prompt) else prompts)
        found = Moments.none(wanted, tuple(place.name for place in parsed), self.d_model, covariance, self.name, self.weights, self.n_layers)
        bar = self._bar("moments", len(prompts) if isinstance(prompts, Sequence) else None)
        while listed := as_prompts(list(islice(source, _WINDOW))):
            for rows, states in self._states(listed, wanted, parsed):
                found.add(states)
                bar.update(len(rows))
        bar.close()
        return found

    def _states(self, listed: list[Prompt], wanted: tuple[int, ...], parsed: list[Position]) -> Iterator[tuple[list[int], Tensor]]:
        """Batches of prompts, by index, and their states [prompt, layer, position, d_model]; each prompt once, whatever fails to fit."""
        with self._asking("_states", listed, wanted, parsed) as question:
            for rows, states in self._read(listed, wanted, parsed):
                yield rows, states
                self.team.resume(question)

    def _read(self, listed: list[Prompt], wanted: tuple[int, ...], parsed: list[Position]) -> Iterator[tuple[list[int], Tensor]]:
        rendered = self.render(listed)
        tokens = [[place.tokens(item) for place in parsed] for item in rendered]  # every position is found before anything runs
        cut = min((shared_prefix(rendered), *(t for places in tokens for at in places for t in at))) if listed else 0
        left, prefix = set(range(len(listed))), None
        while left:
            todo = sorted(left)
            with shortage(self.team) as short:
                for rows in [[todo[r] for r in part] for part in lengthwise([len(rendered[i]) - cut for i in todo], self.budget.most, self.budget.a_pass)]:
                    chunk = [rendered[i] for i in rows]
                    batch = make_batch([listed[i] for i in rows], chunk, self.pad, self.device, cut if self.shares(chunk) else 0)
                    self.budget.tried = len(rows)
                    if batch.prefix and prefix is None:
                        prefix = self._prefix_cache(batch.ids[:1, :cut], max(1, *wanted))
                    yield rows, self._read_batch(batch, prefix if batch.prefix else None, wanted, [tokens[i] for i in rows])
                    left.difference_update(rows)
            if short:
                left, prefix = self._halved(left, short[0]), None

    def _read_batch(self, batch: Any, prefix: DynamicCache | None, wanted: tuple[int, ...], tokens: list[list[list[int]]]) -> Tensor:
        row, column, target = spots(batch, tokens)
        picked = self.passes.states(batch, prefix, wanted, row, column - batch.prefix)
        return averaged(picked, target, len(tokens) * len(tokens[0])).reshape(len(wanted), len(tokens), -1, self.d_model).transpose(0, 1)

    def _prefix_cache(self, ids: Tensor, deepest: int) -> DynamicCache:
        """Keys and values of the shared prefix below the deepest layer, one row."""
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        return self.passes.forward(ids, torch.ones_like(ids), positions, self.passes.cache(), {}, end=deepest).cache

    def shares(self, chunk: Sequence[Rendered], ahead: int = 0) -> bool:
        """Whether a prefix may stand apart from its padding: not where an attention window could fall between them, nor where
        attention counts columns.
        """
        return self._within(chunk, ahead) and self.passes.bears_holes()

    def _within(self, chunk: Sequence[Rendered], ahead: int) -> bool:
        return self.reuse and not (self.window and max(map(len, chunk)) + ahead > self.window)

    def logits(
        self, prompts: object, interventions: Acting = (), *, position: str = "t_post_inst", reduce: Callable[[int, Tensor], object] | None = None
    ) -> list:  # fmt: skip
        """Next-token log-probabilities (float32) at a position."""
        listed, grid = as_prompts(prompts), as_grid(interventions)
        with self._asking("logits", listed, grid, position):
            found = self._scored(listed, grid, parse_position(position), reduce)
        return found if isinstance(interventions, Grid) else found[0]

    def _scored(self, listed: list[Prompt], grid: Grid, place: Position, reduce: Callable[[int, Tensor], object] | None) -> list[list]:
        rendered = self.render(listed)
        tokens = [place.tokens(item) for item in rendered]
        getattr(reduce, "prepare", lambda _: None)(range(len(listed)))
        found: list[list] = [[None] * len(listed) for _ in grid]
        todo = {(c, i) for c in range(len(grid)) for i in range(len(listed))}
        bar = self._bar("score", len(todo))
        while todo:
            with shortage(self.team) as short:
                for unit in self._prefill(listed, rendered, grid, [at[0] for at in tokens]).units(todo):
                    start = unit.batch.width - unit.logits.shape[1]
                    for (c, i), r, logits in zip(unit.pairs, unit.at, unit.logits, strict=True):
                        logprobs = logits[[unit.batch.column(r, token) - start for token in tokens[i]]].float().log_softmax(-1).cpu()
                        found[c][i] = logprobs if reduce is None else reduce(i, logprobs)
                        todo.discard((c, i))
                    bar.update(len(unit.pairs))
                    del unit, logits, logprobs
            if short:
                todo = self._halved(todo, short[0])
        bar.close()
        return found

    def read_under(
        self, prompts: object, interventions: Sequence[Intervention], layers: Layers = "all", positions: Sequence[str] = ("t_inst",)
    ) -> Activations:  # fmt: skip
        """States as interventions leave them, by the prefill of a reply."""
        listed, wanted, parsed = as_prompts(prompts), resolve_layers(layers, self.n_layers), places(positions)
        values, bar = blank_states(len(listed), len(wanted), len(parsed), self.d_model), self._bar("read", len(listed))
        with self._asking("_read_under", listed, as_grid(interventions), wanted, parsed) as question:
            for rows, states in self._read_under(listed, as_grid(interventions), wanted, parsed):
                values[rows] = states
                bar.update(len(rows))
                self.team.resume(question)
        bar.close()
        return Activations(values, tuple(listed), wanted, tuple(place.name for place in parsed), self.name, self.weights, self.n_layers)

    def _read_under(self, listed: list[Prompt], grid: Grid, wanted: tuple[int, ...], parsed: list[Position]) -> Iterator[tuple[list[int], Tensor]]:
        """Batches of prompts, by index, and their states under the one cell of a grid."""
        rendered = self.render(listed)
        tokens = [[place.tokens(item) for place in parsed] for item in rendered]
        last, todo = [len(item) - 1 for item in rendered], {(0, i) for i in range(len(listed))}
        while todo:
            with shortage(self.team) as short:
                for unit in self._prefill(listed, rendered, grid, last, layers=wanted, read=tokens).units(set(todo)):
                    assert unit.states is not None
                    yield [i for _, i in unit.pairs], unit.states
                    todo.difference_update(unit.pairs)
                    del unit
            if short:
                todo = self._halved(todo, short[0])

    def attributions(
        self, prompts: object, layer: int | float, vector: Tensor, position: str = "t_post_inst", against: Literal["zero", "mean"] = "zero"
    ) -> list[np.ndarray]:  # fmt: skip
        """Gradient × input of each instruction token, for a projection."""
        return attributed(self, as_prompts(prompts), layer, vector, position, against)

    def stream(
        self, prompts: list[Prompt], grid: Grid, decoding: Decoding, decided: Callable[[str], bool] | None = None
    ) -> Iterator[tuple[int, int, Reply]]:  # fmt: skip
        """Replies, each as soon as it is finished."""
        with self._asking("stream", prompts, grid, decoding) as question:
            for reply in self._replies(prompts, grid, decoding, decided):
                yield reply
                self.team.resume(question)

    def guarded(self, decoding: Decoding, decided: Callable[[str], bool] | None, guarding: Guarding) -> Iterator[tuple[int, int, Reply]]:
        """Replies under a guard, which reads the states that the prefill makes anyway; flagged prompts that are steered are prefilled
        once more, and those that are refused come last. Read first where the prefill has no untouched states, where ranks share the
        model, and where a subclass answers in a way of its own.
        """
        if guarding.touched or self.team.size > 1 or type(self).stream is not Local.stream:
            yield from super().guarded(decoding, decided, guarding)
            return
        for cell, row, reply in self._replies(guarding.prompts, guarding.grid, decoding, decided, guarding):
            yield cell % len(guarding.grid), row, guarding.marked(row, reply)
        for cell, row in ((cell, row) for cell in range(len(guarding.grid)) for row in range(len(guarding.prompts))):
            if isinstance(refusal := guarding.then(cell, row), Reply):
                yield cell, row, refusal

    def _replies(
        self, prompts: list[Prompt], grid: Grid, decoding: Decoding, decided: Callable[[str], bool] | None, guarding: Guarding | None = None
    ) -> Iterator[tuple[int, int, Reply]]:  # fmt: skip
        rendered, cells = self.render(prompts), Grid(guarding.cells) if guarding else grid
        self._room(rendered, decoding)
        if guarding:
            guarding.fits(rendered)
        todo = {(c, i) for c in range(len(grid)) for i in range(len(prompts))}
        bar = self._bar("generate", len(todo))
        while todo:
            with shortage(self.team) as short:
                units = self._sifted(rendered, decoding, guarding, todo) if guarding else self._begun(prompts, rendered, grid, decoding).units(set(todo))
                decoder = Decoder(self.passes, self.budget, cells, prompts, decoding, self._text, self.eos, decided)
                for c, i, reply in decoder.replies(units):
                    todo.discard((c, i))
                    bar.update()
                    yield c, i, reply
            if short:
                del units, decoder
                todo = self._halved(todo, short[0])
        bar.close()

    def _sifted(self, rendered: list[Rendered], decoding: Decoding, guarding: Guarding, todo: set[Pair]) -> Iterator[Unit]:
        """Prefilled rows of the grid but for flagged prompts that are refused or steered, which leave `todo`; then the steered ones, which
        enter it as rows of their own cells.
        """
        size = len(guarding.grid)
        for unit in self._begun(guarding.prompts, rendered, guarding.grid, decoding, guarding).units({pair for pair in todo if pair[0] < size}):
            assert unit.states is not None
            guarding.judge(list(dict.fromkeys(i for _, i in unit.pairs)), unit.states)
            after = [guarding.then(*pair) for pair in unit.pairs]
            stay = [k for k, (c, _) in enumerate(unit.pairs) if after[k] == c]
            for (c, i), then in zip(unit.pairs, after, strict=True):
                if then != c:
                    todo.discard((c, i))
                    todo.update([] if isinstance(then, Reply) else [(then, i)])
            if stay:
                unit.keep(stay)
                yield unit
            del unit
        steered = {pair for pair in todo if pair[0] >= size}
        if used := sorted({c for c, _ in steered}):
            again = self._begun(guarding.prompts, rendered, Grid(tuple(guarding.cells[c] for c in used)), decoding)
            for unit in again.units({(used.index(c), i) for c, i in steered}):
                unit.pairs = [(used[c], i) for c, i in unit.pairs]
                yield unit
                del unit

    def _begun(self, prompts: list[Prompt], rendered: list[Rendered], grid: Grid, decoding: Decoding, guarding: Guarding | None = None) -> Prefill:
        """The prefill of replies, read on its way by a guard."""
        last = [len(item) - 1 for item in rendered]
        if guarding is None:
            return self._prefill(prompts, rendered, grid, last, decoding.max_new_tokens)
        read = [[place.tokens(item) for place in guarding.positions] for item in rendered]
        return self._prefill(prompts, rendered, grid, last, decoding.max_new_tokens, layers=guarding.layers, read=read)

    def _prefill(self, prompts: list[Prompt], rendered: list[Rendered], grid: Grid, first: list[int], ahead: int = 0, **reading: Any) -> Prefill:
        self._fits(rendered, grid)
        within = lambda chunk: self._within(chunk, ahead)  # noqa: E731
        return Prefill(self.passes, self.budget, prompts, rendered, grid, first, within, self.pad, self.device, **reading)

    def _bar(self, what: str, total: int | None) -> tqdm:
        return tqdm(total=total, desc=f"{what} · {self.name}", unit="prompt", disable=self.team.follows or None, leave=False, delay=2)
