"""Causal language models, their tokenizers and adapters, loaded through Transformers and peft.

Transformers and peft are imported when a function here is called, so that this module loads without them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from finfluence.errors import InputError

# Modules of the extra "transformers", in the order in which they are missed.
_NEEDED = ("transformers", "peft", "pydantic", "yaml", "datasets")


def require_transformers() -> None:
    """Checks that the extra is installed.

    Raises:
        InputError: a module of it is missing; names the command that installs it.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed and not installed; run: "
            "pip install 'finfluence[transformers]'"
        )


def quiet_loading() -> None:
    """Turns off what Transformers prints while it loads a model, for the whole process: progress bars and advice."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> Any:
    """The tokenizer of a local directory or of a model on the hub.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main", **options)
    except Exception as error:  # files, network, formats: each library below raises its own
        raise InputError(f"cannot load the tokenizer of {name!r}: {_first_line(error)}; {_REMEDY}") from error


def load_model_config(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> Any:
    """A model's configuration alone, without its weights.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoConfig

    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoConfig.from_pretrained(name, revision=revision or "main", **options)
    except Exception as error:
        raise InputError(f"cannot load the model {name!r}: {_first_line(error)}; {_REMEDY}") from error


def load_causal_model(
    name: str,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: str = "float32",
    attention: Literal["sdpa", "eager"] = "sdpa",
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """A causal language model in training mode, without the generation cache.

    Args:
        name: local directory or name on the hub.
        revision: of the hub.
        gguf_file: file with the weights in GGUF.
        dtype: of the weights, a torch dtype's name.
        attention: kernel.
        gradient_checkpointing: whether the backward pass recomputes activations.

    Raises:
        InputError: it cannot be loaded, or is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        with _without_bars():
            model = AutoModelForCausalLM.from_pretrained(
                name, revision=revision or "main", dtype=getattr(torch, dtype), attn_implementation=attention, **options
            )
    except Exception as error:
        raise InputError(f"cannot load the model {name!r}: {_first_line(error)}; {_REMEDY}") from error
    model.config.use_cache = False
    if gradient_checkpointing:
        # renamed in the course of Transformers 5
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model.train()
    return model


def attach_lora(
    model: nn.Module,
    *,
    r: int,
    alpha: float,
    dropout: float,
    targets: str | list[str],
    variant: Literal["lora", "dora"],
    seed: int,
) -> nn.Module:
    """The model with a trainable adapter and everything else frozen, in training mode.

    Args:
        model: from `load_causal_model`.
        r: rank.
        alpha: the update is scaled by alpha / r.
        dropout: on the adapter's input.
        targets: names of the modules that are adapted, or "all-linear".
        variant: "lora" or "dora".
        seed: of the adapter's initial values.

    Raises:
        InputError: no module matches, so that nothing would be trained.
    """
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(
        r=r,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] - any number
        lora_dropout=dropout,
        target_modules=targets,
        use_dora=variant == "dora",
        bias="none",
        task_type="CAUSAL_LM",
    )
    names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    hint = f"linear modules of this model are called {', '.join(names)}"
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft advises on targets that were found in part and on untied heads
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            adapted: nn.Module = get_peft_model(model, options)  # pyright: ignore[reportArgumentType, reportAssignmentType]
    except ValueError as error:
        raise InputError(
            f"the adapter has no trainable parameters: {_first_line(error)}; set model.lora.targets, {hint}"
        ) from None
    if not any(p.requires_grad for p in adapted.parameters()):
        raise InputError(f"the adapter with targets {targets!r} has no trainable parameters; {hint}")
    adapted.train()
    return adapted


def resolve_device(device: str) -> str:
    """ "auto" as the device that there is; another name checked.

    Raises:
        InputError: an unknown device, or one that is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}; use auto, cpu or cuda") from None
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but PyTorch sees no GPU; use auto or cpu")
    return device


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """(trainable parameters, all parameters)."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


_REMEDY = "give a local directory of a causal language model, or a name on the hub that this machine can reach"


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Retraining loads a model again and again, and its bars would bury what the command says."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 240 else text[:239] + "…"


__all__ = [
    "attach_lora",
    "load_causal_model",
    "load_model_config",
    "load_tokenizer",
    "quiet_loading",
    "require_transformers",
    "resolve_device",
    "trainable_share",
]
