"""Reasoning as a span of its own: steered by it, and projected apart from the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pvec.activations.capture import capture_means
from pvec.backends.hf import generation
from pvec.backends.hf.backend import HFBackend
from pvec.backends.hf.rows import admit_all
from pvec.backends.session import ModelSession
from pvec.errors import InputError
from pvec.models.chat import ThinkTracker, spans_from_ids
from pvec.runs.tokens import read_tokens
from pvec.settings import Settings
from pvec.steering.hooks import steer
from pvec.steering.tables import plan_rows
from pvec.types import Generation, Instruction, Positions, Request, Sampling
from pvec.vectors.files import load_vector
from tests.helpers.models import saved_model, tiny_model, tiny_tokenizer
from tests.helpers.shell import pvec
from tests.helpers.vectors import saved_vector

TOKENIZER = tiny_tokenizer()
PROMPTS = tuple(
    f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n{opening}"
    for words in ("How can I cook?", "What is a dinner for friends?", "Where do I travel?")
    for opening in ("<think>", "<think>\n", "")
)
LAYER, COEF = 2, 6.0
VECTOR = np.random.default_rng(1).normal(size=32).astype(np.float32)


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("prompt", "answer", "thinking"),
    [
        ("<think>\n", "so, so</think>Yes.", "so, so"),
        ("<think>", "so</think>Yes <think>no</think>.", "so"),
        ("", "<think>hm hm</think>\n\nYes.", "hm hm"),
        ("", "\n<think>never ends", "never ends"),
        ("<think>\n\n</think>\n\n", "Yes.", ""),
        ("", "Yes, and <think> is a word.", ""),
    ],
)
def test_the_tracker_agrees_with_the_text_at_every_token(
    prompt: str, answer: str, thinking: str
) -> None:
    tokens = ids(answer)
    tracker = ThinkTracker(TOKENIZER, ids(f"user: hi\n{prompt}"))
    for stop in range(len(tokens) + 1):
        tracker.follow(tokens[:stop])
    opened = prompt.endswith(("<think>", "<think>\n"))
    expected = [opened]
    for stop in range(1, len(tokens) + 1):
        text = TOKENIZER.decode(tokens[:stop])
        begun = opened or text.lstrip().startswith("<think>")
        expected.append(begun and "</think>" not in text)
    assert tracker.thinking == expected
    inside = [t for t, marked in zip(tokens, expected[1:], strict=True) if marked]
    assert TOKENIZER.decode(inside).replace("<think>", "").strip() == thinking


def model() -> Any:
    """A model that likes to end its reasoning."""
    made: Any = tiny_model("llama")
    head = nn.Linear(32, made.config.vocab_size)
    with torch.no_grad():
        head.weight.copy_(made.lm_head.weight)
        head.bias.zero_()
        head.bias[TOKENIZER.convert_tokens_to_ids("</think>")] = 5.0
    made.lm_head = head
    return made.eval()


@contextmanager
def added(model: Any, positions: Sequence[int]) -> Iterator[None]:
    """A plain hook that adds at these positions of a single sequence."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, list(positions)] += COEF * torch.tensor(VECTOR)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = model.model.layers[LAYER - 1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def steered_positions(positions: Positions | None, request: Request, fed: int) -> list[int]:
    """Which tokens are due, read off the text."""
    prompt = len(request.prompt_ids)
    opened = TOKENIZER.decode(request.prompt_ids).rstrip().endswith("<think>")
    due = []
    for place in range(prompt - 1, prompt + fed):
        text = TOKENIZER.decode(TOKENS[request.id][: place - prompt + 1])
        inside = (opened or text.lstrip().startswith("<think>")) and "</think>" not in text
        if positions == "response" or (positions is not None and inside == (positions == "think")):
            due.append(place)
    return due


TOKENS: dict[str, tuple[int, ...]] = {}


def requests(positions: Positions | None) -> list[Request]:
    steering = ()
    if positions is not None:
        steering = (Instruction(vector=VECTOR, layer=LAYER, coef=COEF, positions=positions),)
    return [
        Request(
            id=f"{positions}-{number}",
            prompt_ids=ids(prompt),
            sampling=Sampling(temperature=0.0, max_tokens=14),
            steering=steering,
        )
        for number, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("fixed", [False, True], ids=["ordinary step", "step of fixed shapes"])
def test_each_span_is_steered_as_a_plain_hook_on_its_tokens_would(fixed: bool) -> None:
    """All kinds in one batch; the oracle is one uncached forward of transformers per answer."""
    made = model()
    backend = HFBackend.wrap(made, TOKENIZER)
    backend._causal = replace(backend._decoding_model(), fixed_shapes=fixed)
    kinds: tuple[Positions | None, ...] = ("think", "answer", "response", None)
    asked = [request for kind in kinds for request in requests(kind)]
    answers = {answer.id: answer for answer in backend.generate(asked)}
    TOKENS.update({name: answer.token_ids for name, answer in answers.items()})
    ended = 0
    for request in asked:
        answer, kind = answers[request.id], request.id.partition("-")[0]
        positions = request.steering[0].positions if request.steering else None
        due = steered_positions(positions, request, len(answer.token_ids) - 1)
        if answer.finish_reason == "length" and request.steering:
            assert answer.touched == (len(due),)
        with added(made, due), torch.no_grad():
            whole = torch.tensor([[*request.prompt_ids, *answer.token_ids]])
            logits = made(input_ids=whole).logits[0, len(request.prompt_ids) - 1 : -1]
        assert tuple(logits.argmax(dim=-1).tolist()) == answer.token_ids, kind
        text = TOKENIZER.decode(answer.token_ids)
        opened = TOKENIZER.decode(request.prompt_ids).rstrip().endswith("<think>")
        ended += opened and 0 < text.find("</think>") < len(text) - len("</think>")
    assert ended >= 6  # both spans occur in answers
    texts = {kind: [answers[f"{kind}-{n}"].text for n in range(len(PROMPTS))] for kind in kinds}
    assert len({tuple(t) for t in texts.values()}) == len(kinds)  # each kind changes something


def test_an_answer_that_starts_again_in_the_middle_goes_on_as_it_was() -> None:
    """As after running out of memory: prompt and tokens so far are run at once."""
    made = model()
    backend = HFBackend.wrap(made, TOKENIZER)
    for kind in ("think", "answer"):
        asked = requests(kind)
        whole = {answer.id: answer for answer in backend.generate(asked)}
        causal = backend._decoding_model()
        rows = admit_all(asked, causal)
        for row in rows:
            row.tokens = list(whole[row.request.id].token_ids[:5])
        begun = [row for row in rows if len(row.tokens) < row.room]
        batch = generation.DecodeBatch(causal)
        batch.extend(begun)
        ended: list[generation.Finished] = []
        while batch.rows:
            ended += batch.step()
        assert len(ended) == len(begun)
        for done in ended:
            answer: Generation = whole[done.row.request.id]
            assert tuple(done.row.tokens) == answer.token_ids
            assert done.touched == answer.touched


def test_where_reasoning_is_not_known_it_is_refused() -> None:
    by_span = Instruction(vector=VECTOR, layer=LAYER, positions="think")
    with pytest.raises(InputError, match="needs the transformers backend"):
        plan_rows([by_span], clamps=1)  # what vLLM's tables are made of
    settings = Settings.model_validate({"steer": {"positions": "answer"}})
    session = SimpleNamespace(settings=settings, choice=SimpleNamespace(name="vllm"))
    with pytest.raises(InputError, match="answer needs the transformers backend"):
        ModelSession.check_positions(session)  # type: ignore[arg-type]
    made = tiny_model("llama")
    with pytest.raises(InputError, match="which tokens are reasoning"), steer(made, [by_span]):
        pass
    spans = spans_from_ids("a", prompt_ids=(5, 6), answer_ids=(7, 8), steering=(by_span,))
    with pytest.raises(InputError, match="cannot be captured under steering"):
        list(capture_means(made, [spans]))


CHATS = (
    "<think>The quick brown fox is a dinner.</think>\n\nYou could walk the dog.",
    "Plan early and walk often.",
    "<think>never ends",
)


@pytest.mark.parametrize("spans", ["think,answer", "think", "answer"])
def test_spans_are_projected_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spans: str
) -> None:
    """Against transformers' hidden states, averaged over tokens that a plain loop finds."""
    monkeypatch.chdir(tmp_path)
    folder = saved_model("llama")
    path = saved_vector(tmp_path, model_fingerprint="")
    lines = [
        {
            "messages": [
                {"role": "user", "content": "How?"},
                {"role": "assistant", "content": answer},
            ]
        }
        for answer in CHATS
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokens = ("--tokens",) if spans == "think,answer" else ()
    done = pvec(
        "project", "chats.jsonl", "--model", folder, "--vector", path, "--layer", 2,
        "--spans", spans, "--projection-type", "proj", "--projection-type", "cos_sim",
        "--out", "out.jsonl", *tokens,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert ("thinking are left out" in done.out) == (spans == "answer")
    rows = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    made = tiny_model("llama")
    vector = load_vector(path).row(2).astype(np.float64)
    prompt = ids("<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n")
    end = TOKENIZER.convert_tokens_to_ids("</think>")
    for answer, row in zip(CHATS, rows, strict=True):
        tail = ids(answer)
        with torch.no_grad():
            output = made(input_ids=torch.tensor([[*prompt, *tail]]), output_hidden_states=True)
        states = output.hidden_states[2][0, len(prompt) :].double().numpy()
        skip = len(tail) if answer.endswith("ends") else 0
        if end in tail:
            skip = tail.index(end) + 1
            while not TOKENIZER.decode([tail[skip]]).strip():
                skip += 1
        for name, part in (("think_", states[:skip]), ("", states[skip:])):
            wanted = (name == "think_") == (spans == "think") or spans == "think,answer"
            key = f"{folder.name}_evil_{name}proj_layer2"
            assert (key in row) == wanted
            if not wanted:
                continue
            if not len(part):
                assert row[key] is None
                continue
            mean = part.mean(axis=0)
            along = mean @ vector / np.linalg.norm(vector)
            assert float(row[key]) == pytest.approx(along, rel=1e-4)
            cosine = along / np.linalg.norm(mean)
            assert float(row[key.replace("proj", "cos_sim")]) == pytest.approx(cosine, rel=1e-4)
    if not tokens:
        return
    records = list(read_tokens(tmp_path / "out.tokens"))
    assert [record.think > 0 for record in records] == [True, False, True]
    for record, row in zip(records, rows, strict=True):
        for name, part in (
            ("think_", record.values[: record.think]),
            ("", record.answer_values),
        ):
            if len(part):
                stored = float(row[f"{folder.name}_evil_{name}proj_layer2"])
                assert part[:, 0].mean() == pytest.approx(stored, rel=1e-3)
    assert records[0].text.startswith("<think>The quick")
    page = pvec("report", "out.tokens", "--out", "page.html")
    assert page.code == 0, page.err
    html = Path("page.html").read_text(encoding="utf-8")
    assert f'"think":[{records[0].think},0,{records[2].think}]' in html.replace(" ", "")
