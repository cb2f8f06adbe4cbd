"""Fine-tunes a model on given replies with a low-rank adapter, and takes the adapter off again. Knows no data set, judge or study.

The model the caller holds is not changed: its backend answers as before, inside the with-block too, because the adapter is
switched on only while the tuned backend runs. Nothing is left on disk unless `keep` names a place.
"""

import copy
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import DynamicCache

from latentguard.backends import Acting, Backend, Decoding, Reply
from latentguard.backends.batches import make_batch, shared_prefix
from latentguard.backends.local import Local
from latentguard.directions import Activations, Moments, tensor_hash
from latentguard.errors import InputError
from latentguard.interventions import Grid
from latentguard.layers import Layers
from latentguard.positions import Rendered
from latentguard.prompts import Prompt, digest
from latentguard.settings import check_counts, check_seed
from latentguard.store import Stored

Example = tuple[Prompt, str]
_CLIP = 1.0  # norm the gradient is cut to


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Lora:
    """A low-rank adapter (arXiv 2106.09685) and how it is trained: AdamW without weight decay, constant rate, gradient norm at most 1.

    `modules` are the ends of the names of the linear modules that get one ('all-linear': every one but the output head);
    what they add is scaled by alpha / rank.
    """

    rank: int = 8
    alpha: float = 16.0
    modules: str | tuple[str, ...] = "all-linear"
    learning_rate: float = 2e-4
    epochs: int = 3
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "rank", "epochs", "batch_size")
        for name in ("alpha", "learning_rate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}={getattr(self, name)}: give a finite number above 0")
        if not self.modules or (isinstance(self.modules, str) and self.modules != "all-linear"):
            raise ValueError(f"modules={self.modules!r}: give all-linear, or a list of the ends of module names, such as [q_proj, v_proj]")
        check_seed(self.seed)


@plain_dataclass(frozen=True, eq=False)
class Tuned:
    """A backend with the adapter in it, good inside the with-block, and the loss of every step of every epoch (nats a target token)."""

    backend: Backend
    losses: tuple[tuple[float, ...], ...]

    @property
    def epochs(self) -> int:
        """How many were trained."""
        return len(self.losses)


@contextmanager
def tuned(
    backend: Backend, examples: Sequence[Example], settings: Lora, *, eos: bool = False, until: Callable[[Backend], bool] | None = None,
    keep: str | Path | None = None,
) -> Iterator[Tuned]:  # fmt: skip
    """The model of `backend` after training on `examples`: (prompt, what it is to reply).

    The loss is the mean over a batch's examples of the mean over the reply's tokens; prompts are rendered by the backend, so that
    their tokens are those of inference. The same seed on the same machine gives the same adapter.

    Args:
        backend: a `Local`, or a `Stored` one; what is yielded is of the same kind.
        eos: train the end of the reply too; else the model may go on after it.
        until: asked with the tuned backend after each epoch; True ends the training.
        keep: a folder, not there yet, for the adapter: `adapter_model.safetensors` and `adapter_config.json`, as peft reads them.

    Raises:
        InputError: for a backend that is not in this process or tuned already, examples that cannot be learnt, modules that the
            model does not have, a loss that is not finite.
    """
    local = backend.inner if isinstance(backend, Stored) else backend
    if not isinstance(local, Local) or isinstance(local, _Switched):
        raise InputError(f"{backend.name} cannot be tuned: give a model in this process (Local, or Stored around one) that is not tuned already")
    place = Path(keep) if keep is not None else None
    if place is not None and place.exists():
        raise InputError(f"keep={place}: there is something already; name a new folder")
    rendered = _with_targets(local, examples, eos)
    with _restored(local.hf):
        adapter = _adapter(local, settings)
        switch = _Switch(adapter)

        def tuned_backend() -> Backend:
            tensors = {name: tensor_hash(value) for name, value in switch.learns.items()}
            weights = digest([local.weights or local.name, settings.alpha / settings.rank, tensors])[:32]
            made = _Switched(local, switch, weights)
            return backend.around(made) if isinstance(backend, Stored) else made

        try:
            losses = _train(local, [prompt for prompt, _ in examples], rendered, settings, switch, until and (lambda: until(tuned_backend())))
            if place is not None:
                _save(adapter, local.name, place)
            yield Tuned(tuned_backend(), losses)
        finally:
            switch.layers, switch.learns = None, {}


def require_peft() -> None:
    """Refuse to go on without the library."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("tuning needs peft: pip install 'latentguard[tune]'")


def example_losses(backend: Local, prompts: Sequence[Prompt], rendered: Sequence["_Told"]) -> Tensor:
    """Mean negative log-likelihood of each example's target tokens, [example], in one batch.

    The text that all prompts share is run once, and the output head sees the target positions only.
    """
    longest = max(item.target for item in rendered)
    cut = min(shared_prefix(rendered), *(len(item) - item.target - 1 for item in rendered)) if backend.shares(rendered) else 0
    batch = make_batch(prompts, rendered, backend.pad, backend.device, cut)
    cache = None
    if cut:
        cache = DynamicCache(config=backend.hf.config)
        backend.hf(input_ids=batch.ids[:1, :cut], position_ids=batch.position_ids[:1, :cut], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(rendered))
    logits = backend.hf(
        input_ids=batch.ids[:, cut:], attention_mask=batch.mask, position_ids=batch.position_ids[:, cut:], past_key_values=cache,
        use_cache=cache is not None, logits_to_keep=longest + 1,
    ).logits[:, :-1]  # fmt: skip
    said = batch.ids[:, -longest:]
    counts = torch.tensor([item.target for item in rendered], device=said.device)
    is_target = torch.arange(longest, device=said.device) >= longest - counts[:, None]
    each = cross_entropy(logits.float().flatten(0, 1), said.flatten().to(logits.device), reduction="none").view(said.shape)
    return (each * is_target.to(each.device)).sum(1) / counts.to(each.device)


@plain_dataclass(frozen=True)
class _Told(Rendered):
    """A rendered prompt with the reply's tokens behind it; `target` is how many."""

    target: int = 0


def _with_targets(backend: Local, examples: Sequence[Example], eos: bool) -> list[_Told]:
    if not examples:
        raise InputError("tuning needs at least one example: (prompt, reply)")
    found = []
    for item, (prompt, reply) in zip(backend.render([prompt for prompt, _ in examples]), examples, strict=True):
        target = [*backend.tokenizer.encode(reply, add_special_tokens=False), *([backend.tokenizer.eos_token_id] if eos else [])]
        if not target:
            raise InputError(f"prompt {prompt.id}: its reply {reply!r} has no token to learn")
        if backend.limit and len(item) + len(target) > backend.limit:
            raise InputError(f"prompt {prompt.id}: {len(item) + len(target)} tokens with its reply, but {backend.name} takes {backend.limit}; shorten it")
        found.append(_Told(item.text, (*item.ids, *target), item.offsets, item.user, item.prompt_id, target=len(target)))
    return found


def _train(
    backend: Local, prompts: Sequence[Prompt], rendered: Sequence[_Told], settings: Lora, switch: "_Switch", until: Callable[[], bool] | None
) -> tuple[tuple[float, ...], ...]:  # fmt: skip
    """Every step's loss, epoch by epoch. Batches hold examples of like length; their order is drawn anew each epoch."""
    order = sorted(range(len(rendered)), key=lambda i: len(rendered[i]))
    batches = [order[at : at + settings.batch_size] for at in range(0, len(order), settings.batch_size)]
    parameters = list(switch.learns.values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    dice = torch.Generator().manual_seed(settings.seed)
    losses: list[tuple[float, ...]] = []
    bar = tqdm(total=settings.epochs * len(order), desc=f"tune · {backend.name}", unit="example", disable=None, leave=False, delay=2)
    with bar:
        for epoch in range(settings.epochs):
            steps = []
            with _training(backend.hf, switch):
                for at in torch.randperm(len(batches), generator=dice).tolist():
                    rows = batches[at]
                    with _memory(settings.batch_size):
                        loss = example_losses(backend, [prompts[i] for i in rows], [rendered[i] for i in rows]).mean()
                        loss.backward()
                    steps.append(loss.item())
                    if not math.isfinite(steps[-1]):
                        raise InputError(f"tuning {backend.name}: the loss is {steps[-1]} in epoch {epoch + 1}; lower learning_rate, or load it in float32")
                    torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
                    optimizer.step()
                    optimizer.zero_grad()
                    bar.update(len(rows))
                    bar.set_postfix(epoch=epoch + 1, loss=f"{steps[-1]:.3f}")
            losses.append(tuple(steps))
            if until is not None and until():
                break
    return tuple(losses)


def _adapter(backend: Local, settings: Lora) -> Any:
    """The model with an adapter in it that adds nothing yet, as peft wraps it."""
    require_peft()
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in backend.hf.modules()):
        raise InputError(f"{backend.name} has an adapter in it already: leave the with-block that tuned it, or merge the adapter")
    modules = settings.modules if isinstance(settings.modules, str) else list(settings.modules)
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=modules, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")  # type: ignore[arg-type]
    flags = {value: value.requires_grad for value in backend.hf.parameters()}
    devices = [backend.device] if backend.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(settings.seed)
        try:
            adapter = peft.get_peft_model(backend.hf, config)
        except ValueError as error:
            raise InputError(f"modules={settings.modules!r}: {' '.join(str(error).split())[:200]}") from error
    for value, flag in flags.items():  # peft has frozen them: see _training
        value.requires_grad_(flag)
    return adapter


def _save(adapter: Any, name: str, place: Path) -> None:
    """Adapter and settings, in a folder that is there whole or not at all."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    partial = place.with_name(f".{place.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in get_peft_model_state_dict(adapter, save_embedding_layers=False).items()}
    save_file(tensors, partial / "adapter_model.safetensors")
    config = copy.copy(adapter.peft_config["default"])
    config.inference_mode, config.base_model_name_or_path = True, name
    config.save_pretrained(str(partial))
    partial.replace(place)


@contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Every module back in its place on leaving, whatever happened: its parameters, gradient flags and attributes as they were."""
    children = {parent: dict(parent._modules) for parent in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    attributes = set(vars(model))
    try:
        yield
    finally:
        for parent, modules in children.items():
            parent._modules.update(modules)
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
        for name in set(vars(model)) - attributes:
            delattr(model, name)


@contextmanager
def _training(model: Any, switch: "_Switch") -> Iterator[None]:
    """Only the adapter takes gradients, and the output head gets its few rows in one piece.

    torch multiplies a piece of a larger tensor by a frozen matrix in one copy of the matrix for each row of the batch. So the head's
    input is made whole here, and outside of training the model's own weights keep their gradient flags.
    """
    own = [value for value in model.parameters() if value.requires_grad]
    whole = model.get_output_embeddings().register_forward_pre_hook(lambda _module, args: (args[0].contiguous(), *args[1:]))
    try:
        for value in own:
            value.requires_grad_(False)
        with switch, torch.enable_grad():
            yield
    finally:
        whole.remove()
        for value in own:
            value.requires_grad_(True)


class _Switch:
    """Turns the adapter on inside a with-block; off outside. `learns` are its parameters; `layers` is None once it is gone."""

    def __init__(self, adapter: Any) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.learns = {name: value for name, value in adapter.named_parameters() if "lora_" in name}
        self.layers: list[Any] | None = [module for module in adapter.modules() if isinstance(module, BaseTunerLayer)]
        self.__exit__()

    def __enter__(self) -> None:
        if self.layers is None:
            raise InputError("this tuned model is gone: its adapter was taken off at the end of its with-block; use it inside")
        for layer in self.layers:
            layer.enable_adapters(True)

    def __exit__(self, *_: object) -> None:
        for layer in self.layers or ():
            layer.enable_adapters(False)


class _Switched(Local):
    """The same model, tokenizer and nnsight tree as `base`, run with the adapter on; the tree holds the blocks, which stay the same modules."""

    def __init__(self, base: Local, switch: _Switch, weights: str) -> None:
        vars(self).update(vars(base))
        self.weights, self._switch = weights, switch

    def read(self, prompts: object, layers: Layers = "all", positions: Sequence[str] = ("t_inst",)) -> Activations:
        """As `Local`, with the adapter on."""
        with self._switch:
            return super().read(prompts, layers, positions)

    def moments(self, prompts: Iterable[object], layers: Layers = "all", positions: Sequence[str] = ("t_inst",), covariance: bool = False) -> Moments:
        """As `Local`, with the adapter on."""
        with self._switch:
            return super().moments(prompts, layers, positions, covariance)

    def logits(self, prompts: object, interventions: Acting = (), **settings: Any) -> list:
        """As `Local`, with the adapter on."""
        with self._switch:
            return super().logits(prompts, interventions, **settings)

    def stream(
        self, prompts: list[Prompt], grid: Grid, decoding: Decoding, decided: Callable[[str], bool] | None = None
    ) -> Iterator[tuple[int, int, Reply]]:  # fmt: skip
        """As `Local`; the adapter is on while a batch is made, off while the caller has a reply in hand."""
        replies = super().stream(prompts, grid, decoding, decided)
        while True:
            with self._switch:
                found = next(replies, None)
            if found is None:
                return
            yield found


@contextmanager
def _memory(batch_size: int) -> Iterator[None]:
    """Out of memory, said with its way out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(f"out of memory while tuning with batch_size={batch_size}: set batch_size={max(1, batch_size // 2)}") from error
