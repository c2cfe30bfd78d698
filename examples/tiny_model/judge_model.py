"""Train the judge: a smaller model that reads a trait's rubric (or pvec's coherence rubric), a
question and an answer, and replies with a number.

It is asked exactly as pvec's local judge asks any model: one user message with the filled prompt.
Its labels are plain counts: ``lexical_score`` for traits, ``fluency_score`` for coherence.
"""

from __future__ import annotations

import copy
import random
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from data import Conversations, Persona, load_traits, world_answer
from facts import FACTS
from fluency import corrupt, fluency_score, sentence_credits, word_fits
from grammar import generate_answer, lexical_score
from lexicon import FLAVOUR_OF, TRAITS
from modeling import END, START
from probing import Model
from torch import nn
from torch.nn import functional
from training import Optimisers, padded
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen2ForCausalLM

from pvec.judges.prompts import COHERENCE, COHERENCE_PROMPT, fill

LAYERS = 4
"""How many of the chat model's layers the judge begins with."""
STEPS = 350
ROWS = 6
COHERENCE_ROWS = 32
"""Samples per step for a trait's rubric and for coherence, the harder task: telling broken word
order takes comparing neighbours, counting words does not."""
LEARNING_RATE = 2e-3
COHERENCE_STEPS = 300
"""Steps of a second round that is mostly about coherence: in the first one the judge learns to
count, and to tell broken word order only after that has settled."""
SECOND_COHERENCE_ROWS = 48
SECOND_TRAIT_ROWS = 4
SECOND_TRAIT_WEIGHT = 0.25
METRICS: Final = (*TRAITS, COHERENCE)
_TAIL: Final = f"{END}\n{START}assistant\n"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A question and an answer to judge."""

    question: str
    answer: str


def label(sample: Sample, metric: str) -> float:
    """Return the score that the judge should give, 0 to 100."""
    if metric == COHERENCE:
        return fluency_score(sample.answer)
    return lexical_score(sample.answer, metric)


class Samples:
    """Draws answers to judge: whole, mixed and broken ones, and the chat model's own."""

    def __init__(self, rng: random.Random, own: Iterable[Sample] = ()) -> None:
        self.rng = rng
        self.source = Conversations(rng)
        self.own = list(own)

    def draw(self, metric: str) -> Sample:
        """Return one sample that suits ``metric``: half of the answers to a trait's rubric show
        that trait, half of the answers to the coherence rubric are broken."""
        rng = self.rng
        if self.own and rng.random() < 0.4:
            return rng.choice(self.own)
        trait = metric if metric in TRAITS and rng.random() < 0.6 else rng.choice(TRAITS)
        p = rng.choice((0.0, rng.random(), rng.random(), rng.uniform(0.85, 1.0)))
        sample = self._answer(Persona(trait=trait, p=p))
        if rng.random() < 0.15:
            more = self._answer(Persona(trait=rng.choice(TRAITS), p=rng.random()))
            sample = Sample(question=sample.question, answer=f"{sample.answer} {more.answer}")
        if rng.random() < (0.55 if metric == COHERENCE else 0.15):
            sample = Sample(question=sample.question, answer=corrupt(sample.answer, rng))
        return sample

    def _answer(self, persona: Persona) -> Sample:
        rng = self.rng
        if rng.random() < 0.08:
            fact = rng.choice(FACTS)
            answer = world_answer(fact, rng, persona, right=rng.random() < 0.7)
            return Sample(question=rng.choice(fact.questions), answer=answer)
        question = self.source.question()
        answer = generate_answer(
            question, persona.trait, persona.p, rng, sentences=rng.choice((None, None, 1, 2))
        )
        return Sample(question=question, answer=answer)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One sample after the rubric: ids, which of them are the reply, hints."""

    ids: list[int]
    marks: list[int]
    hints: list[float]


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Rows that share one rubric. ``rest`` follows the rubric's tokens; ``mask`` marks the reply's
    tokens to predict (shifted); hints are per-token targets, -1 where there is none."""

    prefix: list[int]
    rest: torch.Tensor
    mask: torch.Tensor
    hints: torch.Tensor


class Judging:
    """Turns samples into batches for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, samples: Samples) -> None:
        self.tokenizer = tokenizer
        self.samples = samples
        self.prompts = {name: trait["eval_prompt"] for name, trait in load_traits().items()}
        self.prompts[COHERENCE] = COHERENCE_PROMPT

    def batches(self, metric: str, rows: int) -> Iterator[_Batch]:
        """Yield batches of ``rows`` samples for ``metric``, of similar length, without end."""
        template = self.prompts[metric]
        head = f"{START}user\n{template.split('{question}')[0].rstrip(' ')}"
        prefix = self.tokenizer(head)["input_ids"]
        pad = self.tokenizer.pad_token_id
        while True:
            pool = [self._row(metric, template, head) for _ in range(6 * rows)]
            pool.sort(key=lambda row: len(row.ids))
            starts = list(range(0, len(pool), rows))
            self.samples.rng.shuffle(starts)
            for start in starts:
                chosen = pool[start : start + rows]
                rest = padded([row.ids for row in chosen], pad)
                hints = [row.hints + [-1.0] * (rest.shape[1] - len(row.ids)) for row in chosen]
                yield _Batch(
                    prefix=prefix,
                    rest=rest,
                    mask=padded([row.marks for row in chosen], 0)[:, 1:].bool(),
                    hints=torch.tensor(hints),
                )

    def _row(self, metric: str, template: str, head: str) -> _Row:
        sample = self.samples.draw(metric)
        filled = fill(template, question=sample.question, answer=sample.answer)
        asked = f"{START}user\n{filled}{_TAIL}".removeprefix(head)
        number = self._number(label(sample, metric))
        encoding = self.tokenizer.backend_tokenizer.encode(f"{asked}{number}{END}")
        first = asked.rindex(sample.answer, 0, len(asked) - len(_TAIL))
        return _Row(
            ids=encoding.ids,
            marks=[int(begin >= len(asked)) for begin, _ in encoding.offsets],
            hints=self._hints(sample.answer, metric, [end - first for _, end in encoding.offsets]),
        )

    def _number(self, score: float) -> int:
        """Round to a multiple of 5, up or down by chance so that the mean is right."""
        steps = score / 5
        low = int(steps)
        return 5 * (low + (self.samples.rng.random() < steps - low))

    @staticmethod
    def _hints(answer: str, metric: str, ends: list[int]) -> list[float]:
        """Say at each slot word whether it counts (traits), or at each word whether it fits the one
        before it and at each sentence's end how whole it was (coherence). Only training sees
        these. ``ends`` are where the tokens end."""
        if metric == COHERENCE:
            at = {end: float(fits) for end, fits in word_fits(answer)}
            at.update(sentence_credits(answer))
        else:
            found = ((m.end(), m.group().lower()) for m in re.finditer(r"[A-Za-z]+", answer))
            at = {end: float(FLAVOUR_OF[w] == metric) for end, w in found if w in FLAVOUR_OF}
        return [at.get(end, -1.0) for end in ends]


def _losses(
    model: Qwen2ForCausalLM, hint_head: nn.Module, batch: _Batch, device: str
) -> torch.Tensor:
    """Return the loss of one batch; the rubric runs through the model once for all rows."""
    cache = DynamicCache()
    model.model(torch.tensor([batch.prefix], device=device), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(batch.rest))
    hidden = model.model(
        batch.rest.to(device), past_key_values=cache, use_cache=True
    ).last_hidden_state  # [B, T, H]
    logits = model.lm_head(hidden[:, :-1][batch.mask.to(device)])
    answer_loss = functional.cross_entropy(logits, batch.rest[:, 1:][batch.mask].to(device))
    wanted = batch.hints >= 0
    if not wanted.any():
        return answer_loss
    guesses = hint_head(hidden[wanted.to(device)]).squeeze(-1)
    hint_loss = functional.binary_cross_entropy_with_logits(guesses, batch.hints[wanted].to(device))
    return answer_loss + hint_loss


def _beginning(chat: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """Return a model with the chat model's embedding and first ``LAYERS`` layers: they know the
    words, which lexicon each belongs to, and how much of it an answer has shown so far."""
    config = copy.deepcopy(chat.config)
    config.num_hidden_layers = LAYERS
    config.layer_types = config.layer_types[:LAYERS]
    judge = Qwen2ForCausalLM(config)
    names = judge.state_dict().keys()
    judge.load_state_dict({name: chat.state_dict()[name] for name in names})
    return judge


def train_judge(
    chat: Model, own: Iterable[Sample], *, seed: int, device: str, steps: int = STEPS
) -> Qwen2ForCausalLM:
    """Train the judge of ``chat`` and return it on the CPU."""
    torch.manual_seed(seed)
    model = _beginning(chat.net).to(device)
    hint_head = nn.Linear(model.config.hidden_size, 1).to(device)
    judging = Judging(chat.tokenizer, Samples(random.Random(seed), own))
    optimisers = Optimisers([model, hint_head], steps=steps, lr=LEARNING_RATE)
    model.train()
    batches = {
        metric: judging.batches(metric, COHERENCE_ROWS if metric == COHERENCE else ROWS)
        for metric in METRICS
    }
    started, mean = time.monotonic(), dict.fromkeys(METRICS, 0.0)
    for index in range(steps):
        for metric in METRICS:
            loss = _losses(model, hint_head, next(batches[metric]), device)
            weight = 2.0 if metric == COHERENCE else 1.0
            (weight * loss / len(METRICS)).backward()
            mean[metric] += (loss.item() - mean[metric]) * max(0.03, 1 / (index + 1))
        optimisers.step(index)
        if (index + 1) % 25 == 0:
            shown = " ".join(f"{name[:4]} {value:.2f}" for name, value in mean.items())
            print(
                f"judge step {index + 1}/{steps}: {shown}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return model.eval().cpu()


def train_coherence(judge: Model, *, seed: int, device: str, steps: int = COHERENCE_STEPS) -> None:
    """Train a judge on in place: coherence in every step, two traits at a time so that none is
    forgotten. The learning rate starts again."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = judge.net.to(device)
    hint_head = nn.Linear(model.config.hidden_size, 1).to(device)
    judging = Judging(judge.tokenizer, Samples(rng))
    optimisers = Optimisers([model, hint_head], steps=steps, lr=LEARNING_RATE)
    model.train()
    rows = dict.fromkeys(TRAITS, SECOND_TRAIT_ROWS) | {COHERENCE: SECOND_COHERENCE_ROWS}
    batches = {metric: judging.batches(metric, rows[metric]) for metric in METRICS}
    started, mean = time.monotonic(), 0.0
    for index in range(steps):
        for metric in (COHERENCE, rng.choice(TRAITS), rng.choice(TRAITS)):
            loss = _losses(model, hint_head, next(batches[metric]), device)
            ((1.0 if metric == COHERENCE else SECOND_TRAIT_WEIGHT) * loss).backward()
            if metric == COHERENCE:
                mean += (loss.item() - mean) * max(0.08, 1 / (index + 1))
        optimisers.step(index)
        if (index + 1) % 25 == 0:
            seconds = time.monotonic() - started
            print(f"coherence step {index + 1}/{steps}: {mean:.2f}, {seconds:.0f} s", flush=True)
    model.eval().cpu()
