"""Training the adapted top on stored trunk outputs is training the whole model, and rows are cut and padded rightly."""

import numpy as np
import pytest
import torch
from benchmarks.poison.baselines import Checkpoint, CheckpointScores, row_losses
from benchmarks.poison.model import AdaptedModel, Adapters
from benchmarks.poison.summary import recall
from benchmarks.poison.task import AnswerTask, Rows, collate
from poison_tiny import rows_of, tiny_model, transformers
from torch.nn import functional

from finfluence.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def adapted():
    made = tiny_model()
    with torch.no_grad():  # LoRA's B starts at zero, which would hide A
        for parameter in made.trainable().values():
            parameter.normal_(std=0.1)
    return made


@pytest.fixture(scope="module")
def rows(adapted):
    return rows_of(adapted, (9, 3), (6, 2), (12, 5))


def whole_losses(adapted, rows):
    found = []
    for encoded in rows.encoded:
        tokens = torch.tensor([encoded.tokens])
        logits = adapted.whole(input_ids=tokens).logits[0]
        answer = tokens[0, -encoded.answer :]
        found.append(functional.cross_entropy(logits[-encoded.answer - 1 : -1], answer))
    return torch.stack(found)


def test_losses_and_gradients_are_those_of_the_whole_model(adapted, rows):
    task = AnswerTask("row", 1.0, head=adapted.head)
    parameters = list(adapted.trainable().values())
    batch = collate([rows[i] for i in range(len(rows))])
    ours, theirs = task.losses(adapted.top, batch), whole_losses(adapted, rows)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for mine, whole in zip(
        torch.autograd.grad(ours.sum(), parameters), torch.autograd.grad(theirs.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(mine, whole, rtol=1e-3, atol=1e-5)


def test_only_adapters_are_trained(adapted):
    assert all("lora" in name for name in adapted.trainable())
    # 2 layers × 7 linear maps × (A, B)
    assert len(adapted.trainable()) == 28


def test_a_batch_loss_counts_tokens_and_a_row_loss_rows(adapted, rows):
    batch = collate([rows[i] for i in range(len(rows))])
    counts = torch.tensor([float(e.answer) for e in rows.encoded])
    by_row = AnswerTask("row", 4.0, head=adapted.head).losses(adapted.top, batch)
    by_batch = AnswerTask("batch", 4.0, head=adapted.head).losses(adapted.top, batch)
    torch.testing.assert_close(by_batch, by_row * counts / 4.0)


def test_a_measurement_weighs_rows_by_their_signs(adapted, rows):
    task = AnswerTask("batch", 4.0, head=adapted.head)
    losses = row_losses(task, adapted.top, rows)
    signed = Rows(rows.encoded, rows.hidden, signs=[1.0, -0.5, -0.5])
    value = task.measure(adapted.top, collate([signed[i] for i in range(3)]))
    assert float(value.detach()) == pytest.approx(losses[0] - losses[1:].mean(), rel=1e-4)


def test_checkpoint_scores_are_those_of_a_plain_loop(adapted, rows):
    task = AnswerTask("row", 1.0, head=adapted.head)
    parameters = adapted.trainable()
    second = {name: torch.full_like(p, 0.01) for name, p in parameters.items()}
    first = {name: torch.full_like(p, 0.001) for name, p in parameters.items()}
    scorer = CheckpointScores(task, rows, queries={"q": rows.subset([2])})
    scorer.add(adapted.top, Checkpoint(4, 0.5, {}, first, second))

    def gradient(index):
        loss = whole_losses(adapted, rows.subset([index])).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))])

    query = gradient(2)
    for i in range(3):
        g = gradient(i)
        update = (0.9 * 0.001 + 0.1 * g) / (1 - 0.9**5)
        update /= ((0.999 * 0.01 + 0.001 * g**2) / (1 - 0.999**5)).sqrt() + 1e-8
        cosine = functional.cosine_similarity(update, query, dim=0)
        assert scorer.scores["less/q"][i] == pytest.approx(0.5 * float(cosine), abs=1e-4)
        assert scorer.scores["tracin/q"][i] == pytest.approx(0.5 * float(g @ query), rel=1e-3, abs=1e-4)
        assert scorer.scores["gradient norm"][i] == pytest.approx(float(g.norm()), rel=1e-3)


def test_recall_counts_equal_scores_by_their_expectation():
    planted = np.array([True, False, True, False, False])
    assert recall(np.array([5.0, 4.0, 3.0, 2.0, 1.0]), planted, 0.2) == pytest.approx(0.5)
    # Two of four equal rows are taken, one of which would be planted on average half the time.
    assert recall(np.array([5.0, 1.0, 1.0, 1.0, 1.0]), planted, 0.6) == pytest.approx((1 + 0.5) / 2)


def test_more_layers_than_the_model_has_are_refused():
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(InputError, match="2 layers to adapt, the model has 1"):
        AdaptedModel.of(transformers.LlamaForCausalLM(config), Adapters(layers=2), seed=0)
