"""One peer in its own interpreter: reads jobs from stdin, a JSON line each, and answers with CPU seconds. Imports nothing of latentguard.

Started as a script by `peers.py` with the Python that has the peer. Jobs: load, read_one, read_all, generate, sweep. States
go to a .npy file, tokens into the answer. A job that fails ends the process with its traceback on stderr.
"""

# pyright: basic, reportMissingImports=false

import gc
import importlib.metadata
import json
import os
import resource
import sys
import time
from typing import Any

BATCH = 16


def seconds() -> float:
    """CPU seconds of this process and its children so far; wall seconds after a synchronisation on a GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Peer:
    """What peers share: a transformers model and its tokenizer. Layer l is the residual stream entering block l."""

    package = ""

    def __init__(self, folder):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.padding_side = "left"
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        self.model: Any = model.float().eval().to(self.device)
        self.depth = self.model.config.num_hidden_layers

    def padded(self, ids):
        """Left-padded ids and mask."""
        width = max(map(len, ids))
        pad = self.tokenizer.pad_token_id or 0
        rows = self.torch.tensor([[pad] * (width - len(row)) + list(row) for row in ids], device=self.device)
        mask = self.torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self.device)
        return {"input_ids": rows, "attention_mask": mask}

    def batches(self, items):
        """`BATCH` at a time, in the order given: no peer sorts."""
        return [items[at : at + BATCH] for at in range(0, len(items), BATCH)]

    def read_one(self, job):
        """States entering one block at each prompt's last token, [prompt, d_model]."""
        return self.read(job, [job["layer"]])[:, 0]

    def read_all(self, job):
        """States entering blocks 1 … L − 1, [prompt, layer, d_model]."""
        return self.read(job, range(1, self.depth))

    def read(self, job, layers):
        """States entering several blocks."""
        raise NotImplementedError

    def generate(self, job):
        """Tokens of replies steered at every step, [1][prompt]."""
        return [self.steered(job, job["layer"], self.torch.tensor(job["vector"]))]

    def sweep(self, job):
        """The same for each (layer, vector), one after another."""
        return [self.steered(job, layer, self.torch.tensor(vector)) for layer, vector in job["cells"]]

    def steered(self, job, layer, vector):
        """Replies of all prompts with `vector` added to what enters block `layer`."""
        raise NotImplementedError

    def plain_generate(self, generate, job):
        """Replies through a function like `model.generate`."""
        said = []
        how = {"max_new_tokens": job["tokens"], "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
        if job["eos"]:
            how["eos_token_id"] = job["eos"]
        if job["eos"] and job["full"]:
            how["min_new_tokens"] = job["tokens"]
        for ids in self.batches(job["ids"]):
            batch = self.padded(ids)
            out = generate(batch, {**how, "pad_token_id": self.tokenizer.pad_token_id})
            said += out[:, batch["input_ids"].shape[1] :].tolist()
        return said


class Transformers(Peer):
    """No peer at all: transformers and torch hooks in a process of their own, to see that the floor pays for nothing of ours."""

    package = "transformers"

    def read(self, job, layers):
        """Hooks on the whole model, as most people write it."""
        found, taken = [], []
        blocks = self.model.model.layers
        hooks = [blocks[layer - 1].register_forward_hook(lambda _module, _inputs, output: taken.append(self.state(output)[:, -1].clone())) for layer in layers]
        with self.torch.no_grad():
            for ids in self.batches(job["ids"]):
                self.model(**self.padded(ids))
                found.append(self.torch.stack(taken, 1))
                taken.clear()
        for hook in hooks:
            hook.remove()
        return self.torch.cat(found)

    def steered(self, job, layer, vector):
        """A hook on the block before."""
        vector = vector.to(self.device)

        def add(_module, _inputs, output):
            return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

        hook = self.model.model.layers[layer - 1].register_forward_hook(add)
        with self.torch.no_grad():
            said = self.plain_generate(lambda batch, how: self.model.generate(**batch, **how), job)
        hook.remove()
        return said

    @staticmethod
    def state(output):
        """A block's residual stream."""
        return output[0] if isinstance(output, tuple) else output


class SteeringVectors(Peer):
    """steering-vectors: pairs of texts, hooks on the layers asked for."""

    package = "steering-vectors"

    def read(self, job, layers):
        """Its reader takes pairs: the prompts two by two, eight pairs a batch."""
        from steering_vectors.train_steering_vector import extract_activations

        texts, blocks = job["texts"], [layer - 1 for layer in layers]
        even = [*texts, texts[-1]] if len(texts) % 2 else texts
        pairs = list(zip(even[::2], even[1::2], strict=True))
        first, second = extract_activations(self.model, self.tokenizer, pairs, layers=blocks, batch_size=BATCH // 2)
        sides = [self.torch.stack([self.torch.cat(side[block]) for block in blocks], 1) for side in (first, second)]
        return self.torch.stack(sides, 1).flatten(0, 1)[: len(texts)]

    def steered(self, job, layer, vector):
        """`SteeringVector.apply` around generate."""
        from steering_vectors import SteeringVector

        with SteeringVector({layer - 1: vector}).apply(self.model), self.torch.no_grad():
            return self.plain_generate(lambda batch, how: self.model.generate(**batch, **how), job)


class Repeng(Peer):
    """repeng: all hidden states of the whole model, and blocks wrapped for control."""

    package = "repeng"

    def read(self, job, layers):
        """`batched_get_hiddens`."""
        from repeng.extract import batched_get_hiddens

        blocks = [layer - 1 for layer in layers]
        found = batched_get_hiddens(self.model, self.tokenizer, job["texts"], blocks, BATCH)
        return self.torch.stack([self.torch.from_numpy(found[block]) for block in blocks], 1)

    def steered(self, job, layer, vector):
        """`ControlModel.generate`."""
        from repeng import ControlModel

        wrapped = ControlModel(self.model, [layer - 1])
        wrapped.set_raw_control({layer - 1: vector.to(self.device)})
        with self.torch.no_grad():
            said = self.plain_generate(lambda batch, how: wrapped.generate(**batch, **how), job)
        wrapped.unwrap()
        return said


class Pyvene(Peer):
    """pyvene: interventions of a config around the model."""

    package = "pyvene"

    def read(self, job, layers):
        """Collect interventions at the last column."""
        import pyvene

        parts = [{"layer": layer - 1, "component": "block_output", "intervention_type": pyvene.CollectIntervention} for layer in layers]
        wrapped, found = pyvene.IntervenableModel(pyvene.IntervenableConfig(parts), model=self.model), []
        for ids in self.batches(job["ids"]):
            batch = self.padded(ids)
            spots = [[[batch["input_ids"].shape[1] - 1]] * len(ids)] * len(parts)
            with self.torch.no_grad():
                collected = wrapped(batch, unit_locations={"base": spots})[0][1]
            rows = self.torch.stack([row.reshape(-1) for row in collected])
            found.append(rows.reshape(len(parts), len(ids), -1).transpose(0, 1))
        return self.torch.cat(found)

    def steered(self, job, layer, vector):
        """An addition whose place is left open, so that it acts on every token of every step."""
        import pyvene

        part = {"layer": layer - 1, "component": "block_output", "intervention": pyvene.AdditionIntervention(source_representation=vector.to(self.device))}
        wrapped = pyvene.IntervenableModel(pyvene.IntervenableConfig([part]), model=self.model)
        with self.torch.no_grad():
            return self.plain_generate(lambda batch, how: wrapped.generate(batch, unit_locations=None, intervene_on_prompt=True, **how)[1], job)


class TransformerLens(Peer):
    """TransformerLens: its bridge over the transformers model."""

    package = "transformer-lens"

    def __init__(self, folder):
        super().__init__(folder)
        from transformer_lens.model_bridge import TransformerBridge

        self.bridge = TransformerBridge.boot_transformers(folder, dtype=self.torch.float32, device=self.device, tokenizer=self.tokenizer)
        self.model = None

    def read_one(self, job):
        """The forward pass ended with `stop_at_layer`."""
        found = []
        with self.torch.no_grad():
            for ids in self.batches(job["ids"]):
                batch = self.padded(ids)
                found.append(self.bridge(batch["input_ids"], attention_mask=batch["attention_mask"], stop_at_layer=job["layer"])[:, -1].clone())
        return self.torch.cat(found)

    def read(self, job, layers):
        """`run_with_cache` with a filter of names."""
        names, found = [f"blocks.{layer}.hook_resid_pre" for layer in layers], []
        with self.torch.no_grad():
            for ids in self.batches(job["ids"]):
                batch = self.padded(ids)
                cache = self.bridge.run_with_cache(batch["input_ids"], attention_mask=batch["attention_mask"], names_filter=names)[1]
                found.append(self.torch.stack([cache[name][:, -1] for name in names], 1))
        return self.torch.cat(found)

    def steered(self, job, layer, vector):
        """`generate` of the bridge inside its hooks."""
        vector, said = vector.to(self.device), []
        with self.torch.no_grad(), self.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", lambda state, hook: state + vector)]):
            for ids in self.batches(job["ids"]):
                batch = self.padded(ids)
                how = {"max_new_tokens": job["tokens"], "do_sample": False, "return_type": "tokens", "verbose": False}
                how = {**how, "stop_at_eos": bool(job["eos"]) and not job["full"], "eos_token_id": job["eos"][0] if job["eos"] else None}
                out = self.bridge.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **how)
                said += out[:, batch["input_ids"].shape[1] :].tolist()
        return said


PEERS = {"transformers": Transformers, "steering_vectors": SteeringVectors, "repeng": Repeng, "pyvene": Pyvene, "transformer_lens": TransformerLens}


def load(job):
    """The peer and its model; says which versions these are."""
    import torch

    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    peer = PEERS[job["peer"]](job["folder"])
    return peer, {name: importlib.metadata.version(name) for name in (peer.package, "transformers", "torch")}


def work(peer, job):
    """Do one job and say how long it took."""
    import numpy

    gc.collect()
    start = seconds()
    out = getattr(peer, job["do"])(job)
    taken = seconds() - start
    if job["do"].startswith("read"):
        numpy.save(job["out"], out.detach().float().cpu().numpy())
        out = None
    return {"seconds": taken, "said": out}


def main():
    """Answer line by line; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = None
    for line in sys.stdin:
        job = json.loads(line)
        if job["do"] == "load":
            peer, answer = load(job)
        else:
            answer = work(peer, job)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
