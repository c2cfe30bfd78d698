"""KL divergence of next-token distributions on a given answer, many steerings in one pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import kl_div

from pvec.backends.hf.forward import CausalModel
from pvec.errors import ModelError
from pvec.models.memory import run_in_batches
from pvec.steering.positions import roles_by_length
from pvec.steering.steerer import Steerer
from pvec.types import Divergence, TokenSpans


def divergences(
    model: CausalModel, reference: TokenSpans, variants: Sequence[TokenSpans]
) -> Iterator[Divergence]:
    """Yield the ``Divergence`` of each variant; see ``Backend.divergences``."""
    for spans in (reference, *variants):
        _check(spans, reference, context=model.context)
    (target,) = _logprobs(model, [reference])  # [T, V]
    answer = torch.tensor(_response(reference), device=target.device)[:, None]

    def run(now: Sequence[int]) -> list[Divergence]:
        chosen = [variants[index] for index in now]
        results = []
        for spans, logprobs in zip(chosen, _logprobs(model, chosen), strict=True):
            kl = kl_div(logprobs, target, reduction="none", log_target=True).sum(dim=-1)  # [T]
            own = logprobs.gather(1, answer)[:, 0]
            results.append(Divergence(id=spans.id, kl=kl.cpu().numpy(), logprobs=own.cpu().numpy()))
        return results

    done = run_in_batches(
        sorted(range(len(variants)), key=lambda index: -len(variants[index].token_ids)),
        lambda queue: _take(queue, variants, model),
        run,
        limits=model.limits,
        notify=model.notify,
        unit="texts",
        describe=lambda index: f"a text of {len(variants[index].token_ids)} tokens",
    )
    for _, result in done:
        yield result


def _response(spans: TokenSpans) -> tuple[int, ...]:
    start, stop = spans.spans["response"]
    return spans.token_ids[start:stop]


def _check(spans: TokenSpans, reference: TokenSpans, *, context: int | None) -> None:
    start, stop = spans.spans["response"]
    if start in (0, stop) or stop != len(spans.token_ids):
        raise ModelError(f"{spans.id} has no prompt or no response at its end: give it both.")
    if _response(spans) != _response(reference):
        raise ModelError(f"{spans.id} and {reference.id} have different responses: give them one.")
    if context is not None and stop > context:
        raise ModelError(
            f"{spans.id} has {stop} tokens and the model's context has {context}: shorten it."
        )


def _take(queue: deque[int], variants: Sequence[TokenSpans], model: CausalModel) -> list[int]:
    """Take variants of one length, so that nothing is padded, whose logits fit."""
    width = len(variants[queue[0]].token_ids)
    most = min(model.limits.rows, model.limits.logits // (width * model.vocab_size))
    taken = [queue.popleft()]
    while queue and len(taken) < most and len(variants[queue[0]].token_ids) == width:
        taken.append(queue.popleft())
    return taken


@torch.inference_mode()
def _logprobs(model: CausalModel, rows: Sequence[TokenSpans]) -> torch.Tensor:
    """Return log P over the vocabulary at every response token, ``[R, T, V]``, as steered."""
    # The last token predicts nothing that is looked at, and generation never feeds it either.
    ids = torch.tensor([spans.token_ids[:-1] for spans in rows], device=model.device)
    starts = torch.tensor([spans.spans["response"][0] for spans in rows], device=model.device)
    steerer = Steerer(model.decoder, [spans.steering for spans in rows])
    steerer.set_roles(roles_by_length(torch.ones_like(ids, dtype=torch.bool), starts))
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    logits = model.forward(
        ids, mask=None, positions=positions, cache=None, steerer=steerer, all_logits=True
    )
    steerer.check_complete()
    tokens = len(_response(rows[0]))
    for row, spans in enumerate(rows):
        start = spans.spans["response"][0]
        steerer.check_touched(row, prompt_tokens=start, generated_tokens=tokens - 1)
    return logits[:, -tokens:].log_softmax(dim=-1)
