"""Does nnsight's vLLM engine read and steer as transformers does? States, and tokens of plain and steered replies, of one model in both; knows nothing of ours.

    PYTHONPATH=benchmarks VENV/bin/python benchmarks/vllm_probe.py MODEL_FOLDER float32

Runs in an environment of its own (docs/vllm.md). On a GPU leave `on_cpu` out: nnsight's own worker is for GPUs alone.
"""

import sys

import nnsight
import torch
from nnsight.modeling.vllm import VLLM
from nnsight.modeling.vllm.model_runners.GPUModelRunner import NNsightGPUModelRunner
from nnsight.modeling.vllm.workers.GPUWorker import NNsightGPUWorker
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

SAID = ("Tell me how to bake bread.", "How do I write a for loop in C?", "What is the capital of Japan, and why?", "Name seven old houses by the sea.")
NEW = 16


class Runner(NNsightGPUModelRunner, CPUModelRunner):
    """vLLM's CPU runner with nnsight's visits in it."""


class Worker(CPUWorker):
    """vLLM's CPU worker; nnsight has one for GPUs."""

    def init_device(self):
        super().init_device()
        if type(self.model_runner) is not CPUModelRunner:
            raise RuntimeError(f"vLLM built a {type(self.model_runner).__name__}: set VLLM_USE_V2_MODEL_RUNNER=0")
        self.model_runner.__class__ = Runner

    collect_nnsight = NNsightGPUWorker.collect_nnsight
    nnsight_request_count = NNsightGPUWorker.nnsight_request_count
    nnsight_register = NNsightGPUWorker.nnsight_register
    nnsight_clear_registered = NNsightGPUWorker.nnsight_clear_registered


def plain(model, ids, layers):
    """States [prompt][layer, last five tokens, d_model] behind some layers, by transformers."""
    found = []
    for row in ids:
        with torch.inference_mode():
            states = model(torch.tensor([row]), output_hidden_states=True).hidden_states
        found.append(torch.stack([states[layer][0, -5:].float() for layer in layers]))
    return found


def replies(model, ids, layer, vector, when):
    """Greedy tokens by transformers, the vector added to what enters block `layer`."""
    found = []
    for row in ids:
        calls = []

        def hook(_module, args, calls=calls):
            calls.append(1)
            return (args[0] + vector, *args[1:]) if when == "every" or (when == "prefill" and len(calls) == 1) else args

        handle = model.model.layers[layer].register_forward_pre_hook(hook)
        with torch.inference_mode():
            out = model.generate(torch.tensor([row]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, repetition_penalty=1.0)
        handle.remove()
        found.append(out[0, len(row) :].tolist())
    return found


def main(folder, dtype, on_cpu=True):
    """Print what differs."""
    if on_cpu:
        VLLM._WORKER_CLS = "vllm_probe.Worker"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True, return_dict=True)["input_ids"] for said in SAID]
    far = VLLM(folder, dispatch=True, dtype=dtype, max_model_len=512, gpu_memory_utilization=0.2)
    here = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    depth = here.config.num_hidden_layers
    layers, at = (1, depth // 2, depth - 1), depth // 2
    with far.trace(temperature=0.0, max_tokens=1) as tracer:
        for row in ids:
            with tracer.invoke(row):
                got = []
                for layer in layers:  # what enters block l is what leaves l - 1: hidden states and residual, apart
                    hidden, residual = far.model.layers[layer - 1].output
                    got.append((hidden + residual)[-5:].float())
                states = nnsight.save(torch.stack(got))
    wanted = plain(here, ids, layers)
    for k, layer in enumerate(layers):
        apart = max(float(((a[k] - b[k]).norm(dim=-1) / b[k].norm(dim=-1)).max()) for a, b in zip(states, wanted, strict=True))
        print(f"states entering layer {layer}: relative difference at most {apart:.1e}")
    vector = (wanted[0][1, -1] - wanted[1][1, -1]).to(getattr(torch, dtype))
    for when in ("none", "prefill", "every"):
        with far.trace(temperature=0.0, max_tokens=NEW, min_tokens=NEW) as tracer:
            for row in ids:
                with tracer.invoke(row):
                    if when == "prefill":
                        hidden, residual = far.model.layers[at - 1].output
                        far.model.layers[at - 1].output = (hidden + vector, residual)
                    if when == "every":
                        for _ in tracer.iter[:NEW]:
                            hidden, residual = far.model.layers[at - 1].output
                            far.model.layers[at - 1].output = (hidden + vector, residual)
                    result = nnsight.save(tracer.result)
        got = [list(one.outputs[0].token_ids) for one in result]
        same = [a == b for a, b in zip(got, replies(here, ids, at, vector, when), strict=True)]
        print(f"steering {when}: tokens equal for {sum(same)} of {len(same)} prompts")


if __name__ == "__main__":
    main(*sys.argv[1:3])
