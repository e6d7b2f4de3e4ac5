"""What peers are given is the same training: its losses, gradients, queries and optimizer state."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks._peers import TEXT_REQUIREMENTS, missing
from benchmarks.peers.text import read_text_problem
from benchmarks.poison.baselines import Checkpoint, row_losses
from benchmarks.poison.peers import (
    PEERS,
    Positions,
    Recorded,
    about_peers,
    peer_result,
    waiting,
    weights,
    write_problem,
)
from benchmarks.poison.summary import method_scores
from benchmarks.poison.task import AnswerTask, Encoded, Rows, collate
from poison_tiny import peft, rows_of, tiny_model, transformers
from torch.nn import functional

from finfluence.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Tokenizer:
    """As much of one as the writer asks for."""

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")


@pytest.fixture(scope="module")
def adapted():
    return tiny_model()


@pytest.fixture(scope="module")
def problem(adapted, tmp_path_factory):
    """A problem folder, its rows, its asked rows and the adapters of its last checkpoint."""
    folder = tmp_path_factory.mktemp("problem")
    torch.manual_seed(1)
    start = {name: p.detach().clone() for name, p in adapted.trainable().items()}
    end = {name: 0.1 * torch.randn_like(p) for name, p in start.items()}
    moments = {name: torch.rand_like(p) for name, p in start.items()}
    stored = [Checkpoint(step, 0.5, end, moments, moments) for step in (2, 4)]
    optimizer = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    training = Recorded(start, stored, [np.array([1, 0]), [2]], [0.1, 0.2], optimizer, "sum", 0.25)
    rows, asked = rows_of(adapted, (9, 3), (6, 2), (12, 5)), rows_of(adapted, (7, 2), (8, 4), seed=1)
    write_problem(folder, adapted, Tokenizer(), rows=rows, asked=asked, training=training)
    return folder, rows, asked, end


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_losses_and_gradients_are_those_of_the_training(adapted, problem):
    folder, rows, _, end = problem
    adapted.load(end)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder / "checkpoint-1", is_trainable=True)
    task = AnswerTask("row", 1.0, head=adapted.head)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for row, line in enumerate(lines_of(folder / "train.jsonl")):
        logits = model(input_ids=torch.tensor([line["input_ids"]])).logits[0, :-1]
        theirs = functional.cross_entropy(logits, torch.tensor(line["labels"][1:]), ignore_index=-100)
        ours = task.losses(adapted.top, collate([rows[row]])).sum()
        torch.testing.assert_close(theirs, ours)
        gradients = dict(zip(trained, torch.autograd.grad(theirs, list(trained.values())), strict=True))
        expected = torch.autograd.grad(ours, list(adapted.trainable().values()))
        for name, gradient in zip(adapted.trainable(), expected, strict=True):
            torch.testing.assert_close(gradients[f"base_model.model.model.{name}"], gradient, rtol=1e-3, atol=1e-6)


def test_the_optimizer_state_names_the_stored_adapters(problem):
    from safetensors.torch import load_file

    folder, *_ = problem
    stored = torch.load(folder / "checkpoint-0" / "optimizer.pt", weights_only=True)
    adapter = load_file(folder / "checkpoint-0" / "adapter_model.safetensors")
    assert {state["param_name"] for state in stored["state"].values()} == set(adapter)
    for state in stored["state"].values():
        assert state["exp_avg_sq"].shape == adapter[state["param_name"]].shape
        assert state["step"] == 2
    assert stored["param_groups"][0]["params"] == list(stored["state"])


def test_the_description_is_read_back(problem):
    folder, *_ = problem
    read = read_text_problem(str(folder))
    assert read.checkpoints == ["checkpoint-0", "checkpoint-1"]
    assert read.batches == [[1, 0], [2]]
    assert (read.rates, read.loss, read.scale) == ([0.1, 0.2], "sum", 0.25)
    assert Path(read.path("start/adapter_config.json")).exists()


def test_rows_with_equal_beginnings_share_their_positions():
    encoded = [Encoded([5, 6, 7, 8], 1), Encoded([5, 6, 9, 8], 2)]
    positions = Positions()
    first, second = positions.lines(Rows(encoded, [torch.zeros(4, 2), torch.ones(4, 2)]))
    assert first == {"input_ids": [0, 1, 2, 3], "labels": [-100, -100, -100, 8]}
    assert second == {"input_ids": [0, 1, 4, 5], "labels": [-100, -100, 9, 8]}
    assert [float(hidden[0]) for hidden in positions.hidden] == [0, 0, 0, 0, 1, 1]


def test_more_positions_than_tokens_are_refused(adapted, tmp_path):
    training = Recorded({}, [], [], [], {}, "sum", 1.0)
    rows = rows_of(adapted, (40, 3), (40, 3))
    with pytest.raises(InputError, match="80 positions, the vocabulary 61"):
        write_problem(tmp_path, adapted, Tokenizer(), rows=rows, asked=rows.subset([0]), training=training)


def test_weights_make_a_query_of_the_rows_losses(adapted):
    rows = rows_of(adapted, (9, 3), (6, 2), (12, 5), (7, 2))
    contrast = Rows(rows.encoded, rows.hidden, signs=[1.0, 1.0, -0.5, -0.5])
    asked, matrix = weights({"negative": rows.subset([0, 1]), "contrast": contrast})
    task = AnswerTask("row", 1.0, head=adapted.head)
    losses = row_losses(task, adapted.top, asked)
    for number, query in enumerate((rows.subset([0, 1]), contrast)):
        value = task.measure(adapted.top, collate([query[i] for i in range(len(query))]))
        assert float(matrix[number] @ losses) == pytest.approx(float(value.detach()), abs=1e-5)


def test_peers_wait_for_an_environment_and_until_they_have_scores(tmp_path):
    assert waiting({}, None) == []
    assert missing(tmp_path, TEXT_REQUIREMENTS) == list(TEXT_REQUIREMENTS)
    (tmp_path / "bergson" / "bin").mkdir(parents=True)
    (tmp_path / "bergson" / "bin" / "python").touch()
    found = {"bergson EK-FAC": {"scores": {}}, "bergson TrackStar": {"failure": "for a reason"}}
    assert [peer.name for peer in waiting(found, tmp_path)] == ["bergson TrackStar"]
    assert {peer.environment for peer in PEERS} == set(TEXT_REQUIREMENTS)


def test_a_peer_that_does_not_run_says_why(tmp_path):
    result = peer_result(PEERS[0], tmp_path, queries=["a"], matrix=np.ones((1, 1)), folder=tmp_path)
    assert result == {"failure": "no environment"}


def test_tables_and_notes_have_the_peers_that_ran():
    about = {"package": "bergson", "version": "2.5.1", "settings": "as it comes", "peak_mb": 1500.0}
    ran = {"scores": {"negative": [0.0, 1.0], "contrast": [2.0, 1.0]}, "about": about}
    results = [
        {"planted": [True, False], "peers": {"bergson EK-FAC": ran, "bergson TrackStar": {"failure": "too slow"}}},
        {"planted": [True, False]},
    ]
    scores = method_scores(results)
    assert scores["bergson EK-FAC, contrast"].tolist() == [[2.0, 1.0]]
    assert scores["bergson EK-FAC, negative answers"].tolist() == [[0.0, 1.0]]
    assert not any("TrackStar" in name for name in scores)
    versions, notes = about_peers(results)
    assert versions == {"bergson": "2.5.1"}
    assert notes == [
        "bergson EK-FAC 2.5.1: as it comes; at most 1.5 GB of memory.",
        "bergson TrackStar, without scores in 1 trainings: too slow.",
    ]
