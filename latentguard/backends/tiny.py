"""A real but meaningless model made in memory in a tenth of a second: random weights, a byte-level tokenizer."""

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"


def tiny_tokenizer(chat_template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, five special tokens, a short chat template with text after the instruction."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=chat_template, padding_side="left")


def tiny_model(family: str = "llama", n_layers: int = 4, d_model: int = 32, seed: int = 0, **config: Any) -> Any:
    """A random model of any transformers decoder family, on the CPU in float32."""
    torch.manual_seed(seed)
    size = {"hidden_size": d_model, "intermediate_size": 2 * d_model, "num_hidden_layers": n_layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    if family == "gpt2":
        size = {"n_embd": d_model, "n_layer": n_layers, "n_head": 4}
    elif family.startswith(("gemma", "qwen3")):
        size["head_dim"] = d_model // 4
    settings = {"vocab_size": 256 + len(SPECIAL), "max_position_embeddings": 4096, "eos_token_id": 260, "pad_token_id": 256, "bos_token_id": None}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**size, **settings, **config}), dtype=torch.float32)
    return made.eval()
