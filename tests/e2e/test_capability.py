"""Capability tasks on the steered model, with a task of our own and no network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install '.[eval]'")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

from pvec.backends.hf.backend import HFBackend  # noqa: E402
from pvec.errors import InputError  # noqa: E402
from pvec.evaluation.tasks import TaskScore, evaluate_tasks  # noqa: E402
from pvec.models.decoder import find_decoder  # noqa: E402
from pvec.types import Instruction  # noqa: E402
from tests.helpers.models import HIDDEN_SIZE, tiny_model, tiny_tokenizer  # noqa: E402

QUESTIONS = [f"Plan early, walk {i} times and talk with" for i in range(24)]
CHOICES = [" the people", " a little patience"]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    lines = [
        json.dumps({"question": q, "choices": CHOICES, "answer": i % 2})
        for i, q in enumerate(QUESTIONS)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "travel.yaml").write_text(
        f"""\
task: travel
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path / "data.jsonl"}"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return tmp_path


def accuracy(scores: tuple[TaskScore, ...], condition: str) -> float:
    (one,) = (s for s in scores if s.condition == condition and s.metric == "acc")
    assert one.n == len(QUESTIONS)
    return one.score


def by_hand(added: torch.Tensor | None, layer: int) -> float:
    """Accuracy from a plain forward per choice, with a hand-written hook."""
    model, tokenizer = tiny_model("llama", seed=1), tiny_tokenizer()
    if added is not None:

        def hook(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
            return output + added

        find_decoder(model).blocks[layer - 1].register_forward_hook(hook)
    hits = 0
    for i, question in enumerate(QUESTIONS):
        sums = []
        for choice in CHOICES:
            head = tokenizer(question)["input_ids"]
            ids = tokenizer(question + choice)["input_ids"]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[t - 1, ids[t]]) for t in range(len(head), len(ids))))
        hits += int(np.argmax(sums)) == i % 2
    return hits / len(QUESTIONS)


def test_tasks_run_on_the_steered_model_and_agree_with_a_hand_written_hook(tasks: Path) -> None:
    backend = HFBackend.wrap(tiny_model("llama", seed=1), tiny_tokenizer())
    vector = np.random.default_rng(0).standard_normal(HIDDEN_SIZE).astype(np.float32)
    steering = Instruction(vector=vector, layer=2, coef=3.0)
    scores = evaluate_tasks(
        backend, ["travel"], {"unsteered": (), "steered": (steering,)}, include_path=str(tasks)
    )
    assert accuracy(scores, "unsteered") == pytest.approx(by_hand(None, 2))
    assert accuracy(scores, "steered") == pytest.approx(by_hand(torch.from_numpy(3 * vector), 2))


def test_an_unknown_task_is_refused(tasks: Path) -> None:
    backend = HFBackend.wrap(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(InputError, match="'no_such_task'"):
        evaluate_tasks(backend, ["no_such_task"], {"unsteered": ()}, include_path=str(tasks))
