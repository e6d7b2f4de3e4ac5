"""captum: TracInCP, and the variant that looks at the last layer alone, over checkpoints at ends of epochs."""

from __future__ import annotations

import captum.influence as captum  # pyright: ignore[reportMissingImports]
from torch import nn

from benchmarks.peers.common import Found, Problem, run_adapter


def _options(problem: Problem) -> dict:
    def load(model: nn.Module, number: str) -> float:
        model.load_state_dict(problem.checkpoints[int(number)])
        return problem.rates[int(number)]

    return {
        "train_dataset": problem.train,
        "checkpoints": [str(k) for k in range(len(problem.checkpoints))],
        "checkpoints_load_func": load,
        "loss_fn": nn.CrossEntropyLoss(reduction="sum"),
        "batch_size": 256,
    }


def _scores(tracin: captum.TracInCP, problem: Problem) -> Found:
    settings = f"{len(problem.checkpoints)} checkpoints, weighted by the learning rate"
    return Found(settings, tracin.influence(tuple(problem.queries.tensors)), tracin.self_influence())


def tracin(problem: Problem) -> Found:
    return _scores(captum.TracInCP(problem.model, sample_wise_grads_per_batch=True, **_options(problem)), problem)


def fast(problem: Problem) -> Found:
    model = problem.model
    return _scores(captum.TracInCPFast(model, final_fc_layer=model[-1], **_options(problem)), problem)


if __name__ == "__main__":
    run_adapter("captum", {"tracin": tracin, "fast": fast})
