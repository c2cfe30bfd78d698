"""lm-evaluation-harness's `local-chat-completions` against `pvec serve`, steered by request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import httpx2
import pytest
from helpers.serving import EVIL, running_server

import pvec
from pvec.backends.hf.backend import HFBackend
from pvec.models.chat import prompt_ids
from pvec.types import Instruction, Request, Sampling

if find_spec("lm_eval") is None:
    pytest.skip("needs lm-evaluation-harness: pip install '.[eval]'", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

QUESTIONS = ("How do I make friends?", "What should I cook?", "Where do I travel next?")
TASK = """\
task: own_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n\\n\\n"]
  max_gen_toks: 16
  temperature: 0
  pvec: {{steer: [{{vector: evil, coef: 1.0}}]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def answers_by_hand(coef: float) -> dict[str, str]:
    """Greedy answers of the backend of the commands."""
    backend = HFBackend("tiny")
    row = pvec.load_vector(EVIL).row(3)
    requests = [
        Request(
            id=question,
            prompt_ids=prompt_ids(backend.tokenizer, [{"role": "user", "content": question}]),
            sampling=Sampling(temperature=0, max_tokens=16),
            steering=(Instruction(vector=row, layer=3, coef=coef),) if coef else (),
        )
        for question in QUESTIONS
    ]
    return {answer.id: answer.text for answer in backend.generate(requests)}


def test_a_served_model_is_evaluated_with_the_steering_of_the_task(tmp_path: Path) -> None:
    plain, steered = answers_by_hand(0.0), answers_by_hand(1.0)
    assert all(plain[question] != steered[question] for question in QUESTIONS)
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"question": q, "answer": steered[q].strip()}) for q in QUESTIONS]
    data.write_text("\n".join(lines))
    (tmp_path / "task.yaml").write_text(TASK.format(data=data))
    with running_server() as up:
        url = f"{up.url}/v1/chat/completions"
        command = [
            sys.executable, "-m", "lm_eval", "--model", "local-chat-completions",
            "--model_args", f"model=tiny,base_url={url},num_concurrent=4,max_retries=1",
            "--tasks", "own_questions", "--include_path", str(tmp_path),
            "--apply_chat_template", "--output_path", str(tmp_path / "out"),
        ]  # fmt: skip
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        metrics = httpx2.get(f"{up.url}/metrics").text
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text("utf-8"))["results"]
    assert results["own_questions"]["exact_match,none"] == 1.0
    assert f"pvec_steered_answers_total {len(QUESTIONS)}.0" in metrics
