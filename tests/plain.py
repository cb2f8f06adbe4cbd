"""The oracle of the engine's tests: cells one by one, prompts one by one, plain torch hooks, no padding and no cache. Knows nothing of backends."""

import copy
from contextlib import contextmanager

import torch

from latentguard.families import blocks_path
from latentguard.interventions import add, patch, scale
from latentguard.positions import parse_position

PURE = {"add": add, "scale": scale, "patch": patch}


class Plain:
    """A copy of a backend's model without nnsight around it, run on one sequence at a time."""

    def __init__(self, backend):
        self.backend, self.hf = backend, backend.bare
        self.blocks = self.hf.get_submodule(blocks_path(self.hf))
        self.n_layers = len(self.blocks)

    def hidden(self, change):
        """Hooks under which every layer's state becomes change(layer, state); layer L is the last block's output."""

        def entering(layer):
            def hook(_module, args, kwargs):
                if args:
                    return (change(layer, args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": change(layer, kwargs["hidden_states"])}

            return hook

        def leaving(_module, _args, out):
            return (change(self.n_layers, out[0]), *out[1:]) if isinstance(out, tuple) else change(self.n_layers, out)

        handles = [block.register_forward_pre_hook(entering(layer), with_kwargs=True) for layer, block in enumerate(self.blocks)]
        return [*handles, self.blocks[-1].register_forward_hook(leaving)]

    def acting(self, prompt, rendered, acts):
        """The change that `acts` make to a sequence of this prompt and what was said after it."""
        end = len(rendered)

        def change(layer, state):
            state = state.clone()
            for act in acts:
                if layer in act.layers(self.n_layers):
                    at = [*parse_position(act.positions).tokens(rendered), *(range(end, state.shape[1]) if act.when == "every_step" else ())]
                    state[0, at] = PURE[act.kind](state[0, at].float(), act.vector(layer, prompt), act.amount).to(state.dtype)
            return state

        return change

    def run(self, ids, change):
        """Logits [token, vocab] of one sequence."""
        with hooked(self.hidden(change)), torch.no_grad():
            return self.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()

    def states(self, rendered):
        """[layer, token, d_model] of an untouched prompt."""
        seen = {}
        self.run(rendered.ids, lambda layer, state: seen.setdefault(layer, state))
        return torch.stack([seen[layer][0].float() for layer in range(self.n_layers + 1)])

    def logprobs(self, prompt, acts, position="t_post_inst"):
        """[token, vocab] at a position."""
        rendered = self.backend.render([prompt])[0]
        logits = self.run(rendered.ids, self.acting(prompt, rendered, acts))
        return logits[parse_position(position).tokens(rendered)].log_softmax(-1)

    def check_reply(self, prompt, acts, reply, most, decided=None, tie=1e-4):
        """A greedy reply's tokens are the likeliest one by one (or as likely but for `tie`), and it ends where it should."""
        rendered, said = self.backend.render([prompt])[0], list(reply.tokens)
        logits = self.run((*rendered.ids, *said), self.acting(prompt, rendered, acts))[len(rendered) - 1 :]
        for step, token in enumerate(said):
            assert token not in self.backend.eos
            gap = float(logits[step].max() - logits[step, token])
            assert gap <= tie, f"{prompt.id}: token {step} is {gap:.3g} below the likeliest"
        if reply.finish == "eos":
            gap = float(logits[len(said)].max() - max(logits[len(said), token] for token in self.backend.eos))
            assert gap <= tie, f"{prompt.id}: ends {gap:.3g} below the likeliest"
        texts = [self.backend.tokenizer.decode(said[: k + 1], skip_special_tokens=True) for k in range(len(said))]
        assert reply.text == (texts[-1] if texts else "") and reply.prompt is prompt
        assert (reply.finish == "length") == (len(said) == most), reply
        if decided:
            assert not any(map(decided, texts[: len(said) - 1])), "stops at the first text that decides"
            assert reply.finish != "decided" or decided(texts[-1])
            assert reply.finish == "decided" or reply.finish == "length" or not texts or not decided(texts[-1])
        else:
            assert reply.finish != "decided"


@contextmanager
def hooked(handles):
    """Hooks that are gone afterwards."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_plain(backend_of, model, **settings):
    """A backend around `model`, and the oracle on a copy of it."""
    bare = copy.deepcopy(model)
    backend = backend_of(model, **settings)
    backend.bare = bare
    return backend, Plain(backend)
