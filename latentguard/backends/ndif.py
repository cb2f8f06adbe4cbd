"""A model on an NDIF server: the same Backend, its passes run where the weights are (served.py). No weights are loaded here.

What one call asks for goes as few jobs of several batches each; of every batch only what was asked for comes back. A job that the
server has too little memory or time for is halved and sent again.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm

from latentguard import families
from latentguard.backends import Acting, Backend, Decoding, Measure, Reply, as_grid, served
from latentguard.backends.batches import Batch, lengthwise, make_batch, make_plan, spots, step_plan
from latentguard.backends.jobs import Host, JobError, TooLargeError
from latentguard.backends.memory import blank_states
from latentguard.backends.parcels import parcel, sent
from latentguard.backends.texts import Texts, ends, places
from latentguard.backends.tracing import nnsight
from latentguard.directions import Activations, Moments
from latentguard.errors import InputError
from latentguard.fingerprints import told
from latentguard.interventions import Grid
from latentguard.layers import Layers, resolve_layers
from latentguard.positions import Position, parse_position
from latentguard.prompts import Prompt, as_prompts, digest
from latentguard.templates import Template

log = logging.getLogger(__name__)
_WINDOW = 4096  # prompts that are rendered at a time where only moments are kept
_A_PASS = 1024  # what a forward pass costs a large model on a GPU besides its tokens, in tokens
_LOGITS = 2**28  # bytes of logits in one forward pass, at most
_PLAIN = {"repetition_penalty": 1.0, "num_beams": 1, "do_sample": False, "use_cache": True}  # no habit of the model's generation_config


@dataclass(frozen=True)
class Sizes:
    """How large what is sent and returned may be.

    Args:
        batch: rows in one forward pass, at most.
        batches: forward passes in one job, at most (of a generation, its batches); one batch goes whole whatever it takes.
        megabytes: of one job's result and of prompts' own vectors (`Patch`), about, at most; one row goes whole whatever it takes.
        ahead: jobs on their way at a time.
        dtype: in which states travel.
    """

    batch: int = 32
    batches: int = 16
    megabytes: float = 64.0
    ahead: int = 2
    dtype: str = "float32"


class Ndif(Texts, Backend):
    """A model that an NDIF server holds.

    Args:
        host: the server, and the name it knows the model by.
        tree: an nnsight model of the same architecture without weights.
        held_in: the type of its weights there.
    """

    def __init__(
        self, host: Host, tree: Any, tokenizer: Any, generation_config: Any, *, name: str, template: Template, sizes: Sizes | None = None,
        held_in: str = "",
    ) -> None:  # fmt: skip
        module, config = tree._module, tree._module.config
        self.host, self.tree, self.tokenizer, self.name, self.sizes = host, tree, tokenizer, name, sizes or Sizes()
        self.template, self.held_in = template, held_in
        self.n_layers, self.d_model = families.n_layers(config), families.text_config(config).hidden_size
        self.limit = getattr(families.text_config(config), "max_position_embeddings", None)
        self.vocab = families.text_config(config).vocab_size
        self.weights = digest(["ndif", host.url, host.model_key])[:32]
        self.config = config
        host.probe = lambda: parcel(tree, [], partial(served.nothing), [])
        self.places = where(module)
        self.head = next(path for path, part in module.named_modules() if part is module.get_output_embeddings())
        self.eos = ends(generation_config, tokenizer)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def key(self) -> dict:
        """Server, model, template and libraries."""
        return {
            "weights": self.weights,
            "host": self.host.url,
            "model_key": self.host.model_key,
            "template": digest(self.template.source),
            "eos": sorted(self.eos),
            "dtype": self.held_in,
            "states": self.sizes.dtype,
            "versions": [torch.__version__, transformers.__version__, nnsight.__version__],
        }

    def read(self, prompts: object, layers: Layers = "all", positions: Sequence[str] = ("t_inst",)) -> Activations:
        """States at named positions."""
        listed, wanted, parsed = as_prompts(prompts), resolve_layers(layers, self.n_layers), places(positions)
        values = blank_states(len(listed), len(wanted), len(parsed), self.d_model)
        a_prompt = len(wanted) * len(parsed) * self.d_model * getattr(torch, self.sizes.dtype).itemsize
        with self._bar("read", len(listed)) as bar:
            for job, found in self._states(listed, parsed, a_prompt, partial(served.read, wanted=list(wanted), dtype=self.sizes.dtype)):
                for rows, batch in zip(job, found, strict=True):
                    values[rows] = batch.float().reshape(len(wanted), len(rows), len(parsed), self.d_model).transpose(0, 1)
                    bar.update(len(rows))
        return Activations(values, tuple(listed), wanted, tuple(place.name for place in parsed), self.name, self.weights, self.n_layers)

    def moments(self, prompts: Iterable[object], layers: Layers = "all", positions: Sequence[str] = ("t_inst",), covariance: bool = False) -> Moments:
        """Mean (and covariance) of states over prompts, added up on the server: a job brings back as much for a million prompts as for one."""
        wanted, parsed = resolve_layers(layers, self.n_layers), places(positions)
        source = iter(as_prompts(prompts) if isinstance(prompts, Sequence | Mapping | Prompt) else prompts)
        total = Moments.none(wanted, tuple(place.name for place in parsed), self.d_model, covariance, self.name, self.weights, self.n_layers)
        with self._bar("moments", len(prompts) if isinstance(prompts, Sequence) else None) as bar:
            while listed := as_prompts(list(islice(source, _WINDOW))):
                for job, found in self._states(listed, parsed, 0, partial(served.sums, wanted=list(wanted), covariance=covariance)):
                    total.merge(found["n"], found["origin"], found["sum"], found["products"])
                    bar.update(sum(map(len, job)))
        return total

    def logits(
        self, prompts: object, interventions: Acting = (), *, position: str = "t_post_inst", reduce: Callable[[int, Tensor], object] | None = None
    ) -> list:  # fmt: skip
        """Next-token log-probabilities at a position; what a `reduce` with a `measure` makes of them is made on the server."""
        listed, grid, place = as_prompts(prompts), as_grid(interventions), parse_position(position)
        rendered = self.render(listed)
        self._fits(rendered, grid)
        tokens = [place.tokens(item) for item in rendered]
        measure = _measure(reduce, len(listed))
        found: list[list] = [[None] * len(listed) for _ in grid]
        small = 256 if reduce is not None else max(map(len, tokens), default=1) * self.vocab * 4
        heavy = max((len(item) - at[0] for item, at in zip(rendered, tokens, strict=True)), default=1) * self.vocab * 4
        small = small * len(grid) + sum(self._own(grid))  # bytes a prompt, back and forth
        most = min(self._rows(small), max(1, _LOGITS // heavy))

        def side_by_side(n: int) -> list[list[int]]:
            """The cells that n prompts meet in one pass, pass by pass."""
            return _parts(list(range(len(grid))), max(1, most // n))

        def task(rows: list[int]) -> dict:
            chunk = [rendered[i] for i in rows]
            batch = make_batch([listed[i] for i in rows], chunk, self.pad, torch.device("cpu"))
            keep = max(len(item) - tokens[i][0] for i, item in zip(rows, chunk, strict=True))
            columns = [[batch.column(r, t) - (batch.width - keep) for t in tokens[i]] for r, i in enumerate(rows)]
            runs = [self._run(batch, grid, cells) for cells in side_by_side(len(rows))]
            own = [measure.own[i] if measure.own is not None else i for i in rows]
            return {"ids": batch.ids, "mask": batch.mask, "keep": keep, "columns": columns, "own": own, "runs": runs}

        batches = lengthwise([len(item) for item in rendered], lambda _: most, _A_PASS) if listed else []
        with self._bar("score", len(grid) * len(listed)) as bar:
            about = partial(served.score, function=measure.function, clean=measure.clean)
            for job, results in self._jobs(batches, small, task, about, lambda n: len(side_by_side(n)) + measure.clean):
                for rows, batch in zip(job, results, strict=True):
                    answers = iter(batch)
                    for cells in side_by_side(len(rows)):
                        for c in cells:
                            for i in rows:
                                found[c][i] = next(answers)
                    bar.update(len(grid) * len(rows))
        return found if isinstance(interventions, Grid) else found[0]

    def read_under(self, prompts: object, interventions: object, layers: Layers = "all", positions: Sequence[str] = ("t_inst",)) -> Activations:
        """Refused: a server reads untouched states only."""
        raise InputError(f"states under an intervention are not read on a server ({self.host.url}): run this model with backend=local")

    def attributions(self, prompts: object, layer: int | float, vector: Tensor, position: str = "t_post_inst", against: str = "zero") -> list:
        """Refused: no gradient is asked of a server."""
        raise InputError(f"attributions need gradients, which are not asked of a server ({self.host.url}): run this model with backend=local")

    def stream(
        self, prompts: list[Prompt], grid: Grid, decoding: Decoding, decided: Callable[[str], bool] | None = None
    ) -> Iterator[tuple[int, int, Reply]]:  # fmt: skip
        """Replies as their jobs return. The server makes each to its end; `decided` cuts it here, where it would have ended it."""
        rendered = self.render(prompts)
        self._room(rendered, decoding)
        self._fits(rendered, grid)
        if 0 in {layer for cell in grid for act in cell.interventions for layer in act.layers(self.n_layers)} and self.places[0] is None:
            raise InputError(f"{self.name}: layer 0 cannot be changed during remote generation, for its state is no module's output; begin at layer 1")
        if decoding.temperature > 0 and any(getattr(self.config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")):
            raise InputError(f"temperature={decoding.temperature}: {self.name} changes its logits behind the head; remotely it answers at temperature 0 only")
        pairs = [(c, i) for c in range(len(grid)) for i in range(len(prompts))]
        settings = {**_PLAIN, "max_new_tokens": decoding.max_new_tokens, "eos_token_id": sorted(self.eos), "pad_token_id": self.pad}

        def task(rows: list[int]) -> dict:
            asked = [pairs[k] for k in rows]
            inside = sorted({i for _, i in asked})
            batch = make_batch([prompts[i] for i in inside], [rendered[i] for i in inside], self.pad, torch.device("cpu"))
            at = torch.tensor([inside.index(i) for _, i in asked])
            plan = make_plan([(grid.cells[c], inside.index(i)) for c, i in asked], batch, self.n_layers)
            going = step_plan([(grid.cells[c], prompts[i]) for c, i in asked], self.n_layers, torch.device("cpu"))
            seeds = []
            if decoding.temperature > 0:
                seeds = [[decoding.seed_of(prompts[i], n) for n in range(decoding.max_new_tokens)] for _, i in asked]
            return {
                "ids": batch.ids[at], "mask": batch.mask[at], "plan": sent(plan), "going": sent(going), "seeds": seeds, "temperature": decoding.temperature
            }  # fmt: skip

        lengths = [len(rendered[i]) for _, i in pairs]
        a_pair = 8 * decoding.max_new_tokens + max(self._own(grid))
        most = self._rows(a_pair)
        batches = lengthwise(lengths, lambda _: most, _A_PASS) if pairs else []
        with self._bar("generate", len(pairs)) as bar:
            for job, results in self._jobs(batches, a_pair, task, partial(served.reply, head=self.head, settings=settings)):
                for rows, said in zip(job, results, strict=True):
                    for k, line in zip(rows, said.tolist(), strict=True):
                        c, i = pairs[k]
                        yield c, i, self._reply(prompts[i], line, decoding.max_new_tokens, decided)
                        bar.update()

    def _reply(self, prompt: Prompt, line: list[int], most: int, decided: Callable[[str], bool] | None) -> Reply:
        said: list[int] = []
        for token in line:
            if token in self.eos:
                return Reply(prompt, self._text(said), tuple(said), "eos")
            said.append(token)
            if len(said) < most and decided and decided(self._text(said)):
                return Reply(prompt, self._text(said), tuple(said), "decided")
        return Reply(prompt, self._text(said), tuple(said), "length")

    def _run(self, batch: Batch, grid: Grid, cells: Sequence[int]) -> tuple[Tensor, dict]:
        n = len(batch.prompts)
        rows = torch.arange(n).repeat(len(cells))
        return rows, sent(make_plan([(grid.cells[c], r) for c in cells for r in range(n)], batch, self.n_layers))

    def _states(self, listed: list[Prompt], parsed: list[Position], a_prompt: int, about: partial) -> Iterator[tuple[list[list[int]], Any]]:
        """Jobs that read: their batches of prompts, by index, and what came back."""
        rendered = self.render(listed)
        tokens = [[place.tokens(item) for place in parsed] for item in rendered]

        def task(rows: list[int]) -> dict:
            batch = make_batch([listed[i] for i in rows], [rendered[i] for i in rows], self.pad, torch.device("cpu"))
            row, column, target = spots(batch, [tokens[i] for i in rows])
            return {"ids": batch.ids, "mask": batch.mask, "row": row, "column": column, "target": target, "count": len(rows) * len(parsed)}

        most = self._rows(a_prompt)
        batches = lengthwise([len(item) for item in rendered], lambda _: most, _A_PASS) if listed else []
        yield from self._jobs(batches, a_prompt, task, about)

    def _rows(self, a_row: float) -> int:
        """How many rows, of so many bytes each, one batch may have."""
        return max(1, min(self.sizes.batch, int(self.sizes.megabytes * 1e6 / max(a_row, 1))))

    def _own(self, grid: Grid) -> list[int]:
        """Of each cell the bytes of vectors that every prompt brings of its own."""
        return [sum(len(act.layers(self.n_layers)) for act in cell.interventions if act.per_prompt) * self.d_model * 4 for cell in grid]

    def _jobs(
        self, batches: list[list[int]], a_row: int, task: Callable[[list[int]], dict], about: partial, passes: Callable[[int], int] = lambda _: 1
    ) -> Iterator[tuple[list[list[int]], Any]]:  # fmt: skip
        """Batches of rows as jobs: (the batches of a job, the server's answer), in order. A job too large for the server is halved."""
        todo = deque(_jobs_of(batches, self.sizes, a_row, passes))
        waiting: deque = deque()
        done = 0
        while todo or waiting:
            while todo and len(waiting) < max(1, self.sizes.ahead):
                job = todo.popleft()
                tasks = [task(rows) for rows in job]
                key = digest([self.host.url, self.host.model_key, served.__name__, told(about), told(tasks), transformers.__version__])
                self.host.prefix = f"job {done + len(waiting) + 1} of {done + len(waiting) + 1 + len(todo)}"
                waiting.append((job, self.host.submit(key, partial(parcel, self.tree, self.places, about, tasks))))
            job, going = waiting.popleft()
            self.host.prefix = f"job {done + 1} of {done + 1 + len(todo) + len(waiting)}"
            try:
                answer = self.host.fetch(going)["answer"]
            except TooLargeError as error:
                halves = _halves(job)
                if not halves:
                    raise JobError(f"one prompt is too much for {self.host.url}; the server's words:\n{str(error).strip()}") from None
                log.warning("a job of %d batches was too large for the server (%s): in halves", len(job), str(error).strip().splitlines()[-1][:120])
                todo.extendleft(reversed(halves))
                continue
            done += 1
            yield job, answer
            self.host.done(going)

    def _bar(self, what: str, total: int | None) -> tqdm:
        bar = tqdm(total=total, desc=f"{what} · {self.name} · NDIF", unit="prompt", disable=None, leave=False, delay=1)
        self.host.told = lambda said: bar.set_postfix_str(": ".join(filter(None, [self.host.prefix, said])))
        return bar


def where(module: Any) -> list[str | None]:
    """The path of the module that puts out the state entering each layer, 0 to L; None for layer 0 where there is none."""
    blocks = families.blocks_path(module)
    depth = families.n_layers(module.config)
    return [_embedding(module, f"{blocks}.0"), *(f"{blocks}.{i}" for i in range(depth))]


def _embedding(module: Any, first: str) -> str | None:
    """The module whose very output enters the first block: found by running the shapes so far."""
    outputs: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, or an id could be another's
    found: list[str] = []

    def out(path: str, _module: Any, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[id(output)] = (path, output)

    def entering(_module: Any, args: tuple, kwargs: dict) -> None:
        found.extend(path for path, _ in [outputs.get(id(args[0] if args else kwargs["hidden_states"]), ("", None))] if path)
        raise _FarEnough

    hooks = [part.register_forward_hook(partial(out, path)) for path, part in module.named_modules() if path]
    hooks.append(module.get_submodule(first).register_forward_pre_hook(entering, with_kwargs=True))
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(module.parameters()).device)
    try:
        for mask in (torch.zeros(1, 1, 2, 2, device=ids.device), None):  # a ready-made mask spares most architectures a look at values
            with contextlib.suppress(RuntimeError, ValueError, _FarEnough), torch.inference_mode():
                module(input_ids=ids, attention_mask=mask, use_cache=False)
            if found:
                break
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


class _FarEnough(Exception):  # noqa: N818
    """The first block is reached."""


def _measure(reduce: Any, count: int) -> Measure:
    """What is sent in place of a reduction."""
    if reduce is None:
        return Measure(served.whole)
    if hasattr(reduce, "measure"):
        return reduce.measure(list(range(count)))
    return Measure(partial(served.by_index, reduce))


def _parts(items: list, size: int) -> list[list]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def _jobs_of(batches: list[list[int]], sizes: Sizes, a_row: int, passes: Callable[[int], int]) -> list[list[list[int]]]:
    """Batches gathered into jobs within the limits; `passes` is how many forward passes a batch of so many rows takes."""
    jobs: list[list[list[int]]] = []
    size, runs = 0.0, 0
    for rows in batches:
        own, more = len(rows) * a_row, passes(len(rows))
        if not jobs or runs + more > sizes.batches or size + own > sizes.megabytes * 1e6:
            jobs.append([])
            size, runs = 0.0, 0
        jobs[-1].append(rows)
        size, runs = size + own, runs + more
    return jobs


def _halves(job: list[list[int]]) -> list[list[list[int]]]:
    """A job in two, by batches or, of a single one, by rows; nothing where it is one row."""
    if len(job) > 1:
        return [job[: len(job) // 2], job[len(job) // 2 :]]
    rows = job[0]
    return [[rows[: len(rows) // 2]], [rows[len(rows) // 2 :]]] if len(rows) > 1 else []
