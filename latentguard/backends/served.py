"""What runs where the weights are: plain nnsight traces over padded rows. It travels as source and knows nothing else of ours.

Where there is a cache, only modules' outputs are written: a block's input is the output of the module before it. Written through `.input`,
the cache that a block is handed would come back from an NDIF sandbox as a copy, and generation would lose its keys (docs/remote.md).

Shapes: `ids`, `mask` [row, column]; a plan is {layer: [(change, vector [row, 1, d_model], amount [row, 1, 1], mask [row, column, 1])]}.
"""

from typing import Any

import torch

from latentguard.backends.tracing import nnsight


def state_of(output: Any) -> Any:
    """A block's residual stream: some architectures return a tuple."""
    return output[0] if isinstance(output, tuple) else output


def entering(tree: Any, places: list, layer: int) -> Any:
    """The state entering a layer, inside a trace without a cache; `places[layer]` is the path of the module that puts it out.

    Layer 0 is block 0's input: the output of embeddings that lie in parts on several cards cannot be read (nnsight 0.8.1, transformers 5.22).
    """
    return state_of(tree.get(places[layer]).output) if layer else tree.get(places[1]).input


def changed(slots: list, state: Any) -> Any:
    """The state with each slot's change where its mask is true."""
    for change, vector, amount, mask in slots:
        new = change(state.float(), vector.to(state.device), amount.to(state.device))
        state = torch.where(mask.to(state.device), new.to(state.dtype), state)
    return state


def put(tree: Any, places: list, plan: dict, cached: bool) -> None:
    """Do what a plan says, inside a trace; `cached` where blocks are handed a cache."""
    for layer in sorted(plan):
        if not (layer or cached):
            block = tree.get(places[1])
            block.input = changed(plan[layer], block.input)
        else:
            module = tree.get(places[layer])
            output = module.output
            state = changed(plan[layer], state_of(output))
            module.output = (state, *output[1:]) if isinstance(output, tuple) else state


def nothing(tree: Any, places: list, tasks: list) -> int:
    """Nothing at all: to see whether a queue moves."""
    return len(tasks)


def states(tree: Any, places: list, wanted: list, task: dict, last: bool) -> Any:
    """States float32 [layer, place, d_model], the mean where a place has several tokens.

    Only a job's last pass ends at the deepest layer: behind a stop, ndif 0.1.2's sandbox runs nothing of the next trace, and says nothing.
    """
    picked, ids, mask = [], task["ids"], task["mask"]
    row, column, target, count = task["row"], task["column"], task["target"], task["count"]
    with torch.inference_mode():
        with tree.trace(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), use_cache=False, logits_to_keep=1) as tracer:
            for layer in wanted:
                state = entering(tree, places, layer)
                picked.append(nnsight.save(state[row.to(state.device), column.to(state.device)].float()))
            if last:
                tracer.stop()
    return averaged(torch.stack([state.to(picked[0].device) for state in picked]), target, count)


def averaged(found: Any, target: Any, count: int) -> Any:
    """States [layer, spot, d_model] as [layer, place, d_model]: the mean over the spots of each place."""
    if len(target) == count:  # one token a place: in order already
        return found
    target = target.to(found.device)
    share = torch.zeros(count, device=found.device).index_add_(0, target, torch.ones(len(target), device=found.device))
    return torch.zeros(len(found), count, found.shape[-1], device=found.device).index_add_(1, target, found) / share[:, None]


def read(tree: Any, places: list, wanted: list, dtype: str, tasks: list) -> list:
    """`states` of each batch, in the type they travel in."""
    return [states(tree, places, wanted, task, task is tasks[-1]).to(getattr(torch, dtype)).cpu() for task in tasks]


def sums(tree: Any, places: list, wanted: list, covariance: bool, tasks: list) -> dict:
    """Of all states of all batches: how many, the first, and sums (and products) of differences from it, [layer, position, d_model]."""
    origin: Any = None
    total: Any = None
    products: Any = None
    n = 0
    for task in tasks:
        found = states(tree, places, wanted, task, task is tasks[-1])
        found = found.reshape(len(wanted), len(task["ids"]), -1, found.shape[-1]).double()  # [layer, prompt, position, d_model]
        if origin is None:
            origin = found[:, 0].clone()
            total = torch.zeros_like(origin)
        shifted = found - origin[:, None]
        total += shifted.sum(1)
        if covariance:
            near = shifted.permute(0, 2, 3, 1).float()
            with torch.autocast(near.device.type, enabled=False):  # NDIF runs blocks under the model's own type, and products would have it
                products = near @ near.transpose(-1, -2) + (0 if products is None else products)
        n += found.shape[1]
    return {"n": n, "origin": origin.cpu(), "sum": total.cpu(), "products": products.cpu() if covariance else None}


def logprobs(tree: Any, places: list, plan: dict, ids: Any, mask: Any, keep: int) -> Any:
    """Log-probabilities float32 [row, token, vocab] of the last `keep` columns."""
    with torch.inference_mode():
        with tree.trace(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), use_cache=False, logits_to_keep=keep):
            put(tree, places, plan, False)
            logits = nnsight.save(tree.output.logits)
    return logits.float().log_softmax(-1)


def score(tree: Any, places: list, function: Any, clean: bool, tasks: list) -> list:
    """Of each batch of prompts a list over its rows of `function(log-probabilities [token, vocab], those of the untouched model, own)`.

    Each task's `runs` are (prompts of the batch, one a row; plan), its `columns` of each prompt count within what is kept.
    """
    found = []
    for task in tasks:
        ids, mask, keep, columns, own = task["ids"], task["mask"], task["keep"], task["columns"], task["own"]
        before = logprobs(tree, places, {}, ids, mask, keep) if clean else None
        results = []
        for rows, plan in task["runs"]:
            after = logprobs(tree, places, plan, ids[rows], mask[rows], keep)
            for r, i in enumerate(rows.tolist()):
                results.append(function(after[r, columns[i]], None if before is None else before[i, columns[i]], own[i]))
            del after
        found.append(results)
    return found


def whole(values: Any, _clean: Any, _own: Any) -> Any:
    """The log-probabilities themselves."""
    return values.cpu()


def by_index(reduce: Any, values: Any, _clean: Any, own: int) -> Any:
    """What a function of (index, log-probabilities) makes of them."""
    made = reduce(own, values.cpu())
    return made.clone() if isinstance(made, torch.Tensor) else made  # of a view all that it looks at would travel


def reply(tree: Any, places: list, head: str, settings: dict, tasks: list) -> list:
    """Tokens [row, step] of each batch: greedy, or drawn with each row's own noise (Gumbel's) where a temperature is given."""
    return [tokens(tree, places, head, settings, task) for task in tasks]


def tokens(tree: Any, places: list, head: str, settings: dict, task: dict) -> Any:
    """One batch of replies. `going` is the plan of every step after the prompt's."""
    ids, mask, plan, going, seeds, temperature = task["ids"], task["mask"], task["plan"], task["going"], task["seeds"], task["temperature"]
    with torch.inference_mode():
        with tree.generate(**settings) as tracer:
            with tracer.invoke(input_ids=ids, attention_mask=mask):
                if going or seeds:
                    for step in tracer.iter[:]:
                        put(tree, places, going if step else plan, True)
                        if seeds:
                            said = tree.get(head)
                            said.output = noisy(said.output, [row[step] for row in seeds], temperature)
                else:
                    put(tree, places, plan, True)
            with tracer.invoke():
                out = nnsight.save(tracer.result)
    return out[:, ids.shape[1] :].cpu()


def noisy(logits: Any, seeds: list, temperature: float) -> Any:
    """Logits [row, 1, vocab] whose likeliest token is a draw at this temperature, the same wherever it is drawn."""
    noise = torch.stack([torch.rand(logits.shape[-1], generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return (logits.float() / temperature - (-noise.clamp_min(1e-20).log()).log().to(logits.device)[:, None]).to(torch.float32)
