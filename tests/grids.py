"""Random prompts, grids, budgets and tiny models, each from one seed, and their check against the oracle. Knows no test."""

import random
import zlib
from collections import Counter

import torch

from latentguard.backends import Decoding
from latentguard.backends.local import Local
from latentguard.backends.memory import Budget
from latentguard.backends.tiny import tiny_model, tiny_tokenizer
from latentguard.directions import mean_difference, random_like
from latentguard.errors import InputError
from latentguard.interventions import Ablate, Add, Cell, Grid, Patch, Scale
from latentguard.layers import resolve_layers
from latentguard.positions import parse_position
from latentguard.prompts import Message, Prompt, digest
from tests.plain import with_plain

DEPTH = 3
MODELS = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 0}),
    "mpt": ("mpt", {"n_heads": 4, "max_seq_len": 4096}),
    "gemma2": ("gemma2", {"sliding_window": 0}),
    "llama4": ("llama4_text", {"num_local_experts": 4, "attention_chunk_size": 0, "head_dim": 8, "intermediate_size_mlp": 64}),
    "gpt_neo": ("gpt_neo", {"num_heads": 4, "attention_types": [[["global", "local", "local"], 1]], "window_size": 0}),
    "gpt2": ("gpt2", {}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 0}),
    "falcon": ("falcon", {"new_decoder_architecture": False, "alibi": True}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 1}),
    "llama_mqa": ("llama", {"num_key_value_heads": 1}),
    "bloom": ("bloom", {"n_head": 4}),
    "gemma3": ("gemma3_text", {"sliding_window": 0}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "cohere2": ("cohere2", {"sliding_window": 0}),
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "alibi": False, "num_kv_heads": 2}),
}
WORDS = ("tell", "me", "how", "to", "sing", "a", "very", "long", "song", "number", "7", "é", "now")
PLACES = ("all", "all", "user", "t_inst", "t_post_inst", "post(1)", "last_word", "t_inst-1", 'before("Is that")', 'between("e", "Is")')
READS = ("t_inst", "t_post_inst", "post(1)", "last_word", "mean(user)", "mean(all)")
WINDOWS = (8, 25, 45, 70, 100, 160)  # tokens; the prompts have 30 to 200


def a_model(r, name):
    """A backend and its oracle. A 0 among the settings is a window, drawn anew."""
    family, settings = MODELS[name]
    settings = {key: r.choice(WINDOWS) if value == 0 and value is not False else value for key, value in settings.items()}
    model = tiny_model(family, n_layers=DEPTH, seed=r.randrange(10**6), **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4 if family.startswith("gemma") else 8)
    chosen = {"batch_size": r.choice((1, 2, 3, 5, "auto")), "system": r.choice((None, "You are kind.", "Be very very very kind.")), "reuse": r.random() > 0.1}
    return with_plain(lambda m, **s: Local(m, tiny_tokenizer(), name=name, weights=name, **s), model, **chosen)


def some_text(r):
    return " ".join(r.choice(WORDS) for _ in range(r.choice((1, 2, 3, 5, 8, 14))))


def some_prompts(r):
    """Of mixed lengths and turns, some twice, some without what the template puts after the instruction."""
    turns, lead, cut = r.random() < 0.25, r.choice(("", "", "tell me ", "User wants to ")), r.random() < 0.2
    found = []
    for k in range(r.randint(2, 7)):
        before = (Message("user", some_text(r)), Message("assistant", some_text(r))) if turns and r.random() < 0.6 else ()
        found.append(Prompt((*before, Message("user", f"{lead}{some_text(r)} Is that so?")), id=f"q{k}", suffix=not (cut and r.random() < 0.5)))
    found += [r.choice(found)] if r.random() < 0.3 else []
    r.shuffle(found)
    return found


def stands(place, rendered):
    """Whether every prompt has such a place."""
    try:
        return bool([parse_position(place).tokens(item) for item in rendered])
    except InputError:
        return False


def some_acts(r, v, states, places):
    """Nothing to three interventions that act together."""
    found = []
    for _ in range(r.choice((0, 1, 1, 1, 2, 3))):
        layer = r.choice((r.randint(0, DEPTH), r.randint(0, DEPTH), 0, DEPTH, "all", sorted(r.sample(range(DEPTH + 1), 2))))
        where = {"layer": layer, "positions": r.choice(places), "when": r.choice(("prefill", "every_step"))}
        along, kind = r.choice((v, random_like(v, r.randrange(99)))), r.choice(("add", "add", "scale", "ablate", "patch"))
        if kind == "add":
            found.append(Add(along, coef=r.choice((0.0, -1.0, 0.5, 1.0, 2.0, -3.0)), **where))
        elif kind == "scale":
            found.append(Scale(along, factor=r.choice((0.0, -1.0, 0.5, 2.0)), **where))
        elif kind == "ablate":
            found.append(Ablate(along, **where))
        elif states:
            ids = [p.id for p in states.prompts]
            source = r.choice((None, {i: r.choice(ids) for i in ids}))
            found.append(Patch(states, read_at="mean(user)", coef=r.choice((1.0, 0.5, -0.5)), source=source, **where))
    return tuple(found)


def a_budget(r, longest):
    """None (measured), few rows, few tokens, a pool of few rows fed by units of one, or little room: a pool smaller than a unit."""
    rows = r.randint(1, 9)
    return r.choice(
        (
            None,
            Budget(rows, r.choice((1, 60, 200, 600)), a_pass=r.choice((0, 1, 32, 500))),
            Budget(r.choice((4, 6, 8)), longest, a_pass=1),
            Budget(rows + 3, room=r.choice((50, 300, 700, 1500)), a_logit=r.choice((1, 20))),
        )
    )


def check_case(seed, name):
    """One draw: read, moments, logits and replies of a backend are the oracle's. The number of replies that were checked."""
    r = random.Random(seed)
    backend, oracle = a_model(r, name)
    prompts = some_prompts(r)
    rendered = backend.render(prompts)
    places = [place for place in PLACES if stands(place, rendered)]
    backend._budget = a_budget(r, max(map(len, rendered)))

    layers, reads = r.choice(("all", 0, DEPTH, [0, 2], [3, 1])), r.sample([place for place in READS if stands(place, rendered)], 2)
    states = backend.read(prompts, layers, reads)
    plain = [oracle.states(item)[list(resolve_layers(layers, DEPTH))] for item in rendered]
    for row, item, found in zip(states.values, rendered, plain, strict=True):
        expected = torch.stack([found[:, parse_position(place).tokens(item)].mean(1) for place in reads], 1)
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)
    moments = backend.moments((p for p in prompts), layers, reads)
    torch.testing.assert_close(moments.mean, states.values.mean(0), atol=1e-4, rtol=1e-4)

    known = list({p.id: p for p in prompts}.values())
    states = backend.read(known, "all", ["mean(user)"])
    v = mean_difference(states, known[: len(known) // 2], position="mean(user)")
    kept = states if r.random() < 0.3 else None
    cells = [Cell(some_acts(r, v, kept, places)) for _ in range(r.choice((1, 1, 2, 3, 4, 5)))]
    place = r.choice(places)
    for cell, row in zip(cells, backend.logits(prompts, Grid(tuple(cells)), position=place), strict=True):
        for prompt, found in zip(prompts, row, strict=True):
            torch.testing.assert_close(found, oracle.logprobs(prompt, cell.interventions, place), atol=2e-4, rtol=1e-5)

    backend.eos = backend.eos | set(r.sample(range(256), r.choice((0, 20, 60))))
    most, salt, share = r.randint(1, 12), r.randrange(99), r.choice((0, 0, 4, 12))
    decided = (lambda text: zlib.crc32(f"{salt}{text}".encode()) % share == 0) if share else None
    temperature, seen = r.choice((0.0, 0.0, 0.0, 0.7)), Counter()
    for c, i, reply in backend.stream(prompts, Grid(tuple(cells)), Decoding(most, temperature, seed), decided):
        seen[c, i] += 1
        if temperature:
            check_sampled(oracle, prompts[i], cells[c].interventions, reply, temperature, seed)
        else:
            oracle.check_reply(prompts[i], cells[c].interventions, reply, most, decided, tie=2e-4)
    assert seen == Counter({(c, i): 1 for c in range(len(cells)) for i in range(len(prompts))}), "each pair once"
    return sum(seen.values())


def check_sampled(oracle, prompt, acts, reply, temperature, seed):
    """The tokens are those that the prompt's own noise makes the likeliest, whatever stood beside it."""
    rendered, said = oracle.backend.render([prompt])[0], list(reply.tokens)
    logits = oracle.run((*rendered.ids, *said), oracle.acting(prompt, rendered, acts))[len(rendered) - 1 :]
    for k in range(len(said) + (reply.finish == "eos")):
        generator = torch.Generator().manual_seed(int(digest([seed, prompt.id, k + 1])[:15], 16))
        noise = torch.rand(logits.shape[-1], generator=generator).clamp_min(1e-20)
        score = logits[k] / temperature - (-noise.log()).log()
        chosen = score[said[k]] if k < len(said) else score[sorted(oracle.backend.eos)].max()
        assert float(score.max() - chosen) < 1e-3, (prompt.id, k)
