"""A transformers model with a head over labels (no language model): texts in, logits a label out. Knows no guard and no prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from latentguard.backends.batches import lengthwise
from latentguard.backends.loading import dtype_of, readable
from latentguard.errors import InputError
from latentguard.weights import ModelSpec, locate, skeleton_folder

_TOKENS = 8192  # in one forward pass, padding included
_A_PASS = 64  # what a pass costs besides, in tokens


class Classifier:
    """A sequence classifier in this process; `labels` is how many logits it gives, `limit` how many tokens it takes."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"{type(tokenizer).__name__} gives no character offsets; latentguard needs a fast tokenizer (tokenizer.json)")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id  # decoder classifiers read the last token that is no padding
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.labels: int = model.config.num_labels
        self.limit: int | None = getattr(model.config, "max_position_embeddings", None)
        self.device = next(model.parameters()).device

    @property
    def parameters(self) -> int:
        """Weights that every token is multiplied with: all but embeddings."""
        looked_up = sum(part.weight.numel() for part in self.model.modules() if isinstance(part, torch.nn.Embedding))
        return sum(p.numel() for p in self.model.parameters()) - looked_up

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids as the model gets them, and the characters of each; tokens that it adds itself have none."""
        found = self.tokenizer(text, return_offsets_mapping=True)
        return found["input_ids"], [tuple(pair) for pair in found["offset_mapping"]]

    def logits(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Logits float32 [text, label] of token ids, in their order; texts of like length share a pass."""
        out = torch.empty(len(ids), self.labels)
        for rows in lengthwise([len(item) for item in ids], lambda length: max(1, _TOKENS // length), _A_PASS) if ids else ():
            width = max(len(ids[i]) for i in rows)
            batch = torch.full((len(rows), width), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(batch)
            for row, i in enumerate(rows):
                batch[row, : len(ids[i])], mask[row, : len(ids[i])] = torch.tensor(ids[i]), 1
            with torch.inference_mode():
                found = self.model(input_ids=batch.to(self.device), attention_mask=mask.to(self.device)).logits
            out[rows] = found.float().cpu()
        return out


def load_classifier(spec: ModelSpec, labels: int, *, tokenizer: ModelSpec | None = None) -> Classifier:
    """The classifier of a folder or Hub id.

    Args:
        labels: how many it must tell apart; another model has another head.
        tokenizer: where the tokenizer comes from if its own files hold none.

    Raises:
        InputError: unreachable, gated, unreadable, of another head, or with weights missing.
    """
    folder = locate(spec)
    with readable(spec):
        config = AutoConfig.from_pretrained(folder)
    if config.num_labels != labels:
        raise InputError(f"{spec.id or folder} tells {config.num_labels} labels apart and {spec.name} {labels}: give the folder or id of {spec.name}")
    words = spec if tokenizer is None or Path(folder, "tokenizer.json").is_file() else tokenizer
    with readable(words):
        made = AutoTokenizer.from_pretrained(folder if words is spec else skeleton_folder(words))
    with readable(spec):
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype_of(spec.dtype),
            device_map=spec.device_map or ("cuda" if torch.cuda.is_available() else "cpu"),
            use_safetensors=True,
            output_loading_info=True,
        )
    model, told = loaded
    if wrong := sorted([*told["missing_keys"], *(str(key) for key in told["mismatched_keys"])]):
        raise InputError(f"{spec.id or folder}: {len(wrong)} weights are missing or of another shape, first {wrong[0]}: its files hold no trained classifier")
    return Classifier(model, made, name=spec.name)
