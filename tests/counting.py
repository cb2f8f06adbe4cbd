"""A backend that counts what it is asked on the way to another; and the files of a store. Knows no test."""

from latentguard.backends import Backend


class Counting:
    """Passes on to a backend and counts what it was asked."""

    def __init__(self, backend):
        self.backend, self.read_prompts, self.replies, self.scored = backend, 0, 0, []

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def read(self, prompts, *args):
        self.read_prompts += len(prompts)
        return self.backend.read(prompts, *args)

    def logits(self, prompts, interventions=(), **settings):
        self.scored.append((len(prompts), len(interventions)))
        return self.backend.logits(prompts, interventions, **settings)

    def stream(self, prompts, grid, *args):
        self.replies += len(prompts) * len(grid)
        yield from self.backend.stream(prompts, grid, *args)

    generate = Backend.generate


def packs_of(folder, kind):
    """Its packs of a kind, or of all (*)."""
    return sorted(folder.rglob(f"{kind}-*.safetensors"))
