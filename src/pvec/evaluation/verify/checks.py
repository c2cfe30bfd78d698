"""The checks of ``pvec verify``, each comparing two ways of getting the same numbers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pvec.evaluation.verify.inputs import POSITIONS, WEIGHTS, Check, VerifyInputs, texts_of
from pvec.models.decoder import block_index, describe_layer
from pvec.models.stored import compare_weights
from pvec.types import Instruction, Positions, Request, TokenSpans

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pvec.backends.base import Backend


_NO_EMBEDDING_STATE = frozenset(("mamba", "mamba2", "falcon_mamba"))


class Bench(VerifyInputs):
    """A transformers model, run with and without steering while its residual stream is recorded."""

    def __init__(
        self,
        backend: Backend,
        steering: Sequence[Instruction],
        *,
        thinking: bool,
        thorough: bool = True,
        folder: Path | None = None,
    ) -> None:
        import torch

        from pvec.backends.hf.backend import HFBackend
        from pvec.models.decoder import find_decoder, module_after

        super().__init__(backend, steering, thinking=thinking, thorough=thorough)
        assert isinstance(backend, HFBackend), "vLLM has checks of its own"
        assert backend.model is not None
        self.folder = folder  # of the checkpoint; None: its weights were changed since
        self.model: Any = backend.model
        decoder = find_decoder(self.model)
        self.blocks: nn.ModuleList = decoder.blocks
        base_model: Any = getattr(self.model, "get_base_model", lambda: self.model)
        self.takes_positions = "position_ids" in inspect.signature(base_model().forward).parameters
        self.keys_and_values_only = decoder.keys_and_values_only
        self.device = decoder.device
        ids = torch.tensor([self.prompts[0]], device=self.device)
        self.after = module_after(self.model, self.blocks, ids)
        list(backend.generate([self.request(0)]))  # the first one runs forwards of its own

    def generated(self, request: Request) -> tuple[tuple[int, ...], list[torch.Tensor]]:
        """Return the tokens fed to the model and the residual stream per layer ``[T, H]``."""
        from pvec.steering.proof import record_residual_stream

        with record_residual_stream(self.blocks, after=self.after) as stream:
            (answer,) = self.backend.generate([request])
        states = [state[0] for state in stream.states()]
        fed = (*request.prompt_ids, *answer.token_ids)[: states[0].shape[0]]
        return fed, states

    def plain(self, token_ids: Sequence[int], *, prompt: int | None = None) -> list[torch.Tensor]:
        """Return the residual stream per layer of one plain, unsteered forward.

        With ``prompt`` tokens of a model that keeps a recurrent state, the others run one by one
        behind it, with transformers' own cache: its two ways of computing a state may differ.
        """
        import torch

        from pvec.steering.proof import record_residual_stream

        ids = torch.tensor([list(token_ids)], device=self.device)
        sizes = [len(token_ids)]
        if prompt is not None and not self.keys_and_values_only:
            sizes = [prompt] + [1] * (len(token_ids) - prompt)
        cache: dict[str, Any] = {}
        places = torch.arange(len(token_ids), device=self.device)[None]
        with (
            torch.inference_mode(),
            record_residual_stream(self.blocks, after=self.after) as stream,
        ):
            for chunk, place in zip(
                torch.split(ids, sizes, dim=1), torch.split(places, sizes, dim=1), strict=True
            ):
                # some models would begin again at position 0 for every chunk
                given = self.takes_positions and len(sizes) > 1
                positions = {"position_ids": place} if given else {}
                output = self.model(input_ids=chunk, use_cache=len(sizes) > 1, **positions, **cache)
                cache = {n: output[n] for n in ("past_key_values", "cache_params") if n in output}
        return [state[0] for state in stream.states()]


def all_checks(bench: Bench) -> Iterator[Check]:
    """Yield every check as it is done; a failed check is a result, not an exception."""
    before = bench.plain(bench.prompts[1])
    yield from _weights(bench)
    yield _layer_numbers(bench)
    for positions in POSITIONS:
        yield from _change_checks(bench, positions)
    yield _zero_is_identity(bench)
    yield _plain_hook_agrees(bench)
    requests = bench.mixed_requests()
    yield from bench.alone_checks(requests, texts_of(bench.backend, requests), how="")
    yield _means_in_a_batch(bench)
    yield _nothing_is_left(bench, before)


def _weights(bench: Bench) -> Iterator[Check]:
    """Compare the tensors in memory with those of the checkpoint, where they can be compared."""
    if bench.folder is None:
        return
    found = compare_weights(bench.model, bench.folder)
    if not found.compared:
        return
    named = f", the first: {found.different[0]}" if found.different else ""
    others = f", {found.others} packed or not used" if found.others else ""
    yield bench.check(
        WEIGHTS,
        len(found.different),
        f"{found.compared} tensors compared{others}{named}",
        unit="tensors that differ",
        allowed=0,
    )


def _layer_numbers(bench: Bench) -> Check:
    """Layer l is transformers' hidden_states[l]; their last one is normed and so not compared.

    Mamba models of transformers leave the embedding out: their hidden_states[0] is layer 1.
    """
    import torch

    ids = torch.tensor([bench.prompts[1]], device=bench.device)
    with torch.inference_mode():
        theirs = bench.model(input_ids=ids, output_hidden_states=True).hidden_states
    ours = bench.plain(bench.prompts[1])
    first = 1 if bench.model.config.model_type in _NO_EMBEDDING_STATE else 0
    error = max(
        _relative(ours[first + n] - state[0].float().cpu(), ours[first + n])
        for n, state in enumerate(theirs[: len(ours) - 1 - first])
    )
    return bench.check("layer numbers are those of transformers' hidden_states", error)


def _positions_of(positions: Positions, *, prompt: int, total: int) -> list[int]:
    first = {"all": 0, "prompt": 0, "response": prompt - 1}[positions]
    return list(range(first, prompt if positions == "prompt" else total))


def _change_checks(bench: Bench, positions: Positions) -> Iterator[Check]:
    """Compare a steered answer with a plain forward over the same tokens.

    Up to the steered layer the two differ by the steering only.
    """
    from pvec.steering.proof import due_state

    at_layer = elsewhere = 0.0
    where, count = "", 0
    for instruction in bench.steering:
        layer = instruction.layer
        request = bench.request(0, replace(instruction, positions=positions), prompt=1)
        fed, steered = bench.generated(request)
        plain = bench.plain(fed, prompt=len(request.prompt_ids))
        touched = _positions_of(positions, prompt=len(request.prompt_ids), total=len(fed))
        count += len(touched)
        due = due_state(instruction, plain[layer][touched])
        error = _relative(steered[layer][touched] - due, plain[layer][touched])
        if error >= at_layer:
            at_layer, where = error, describe_layer(layer)
        others = [t for t in range(len(fed)) if t not in set(touched)]
        for below in range(layer):
            elsewhere = max(elsewhere, _relative(steered[below] - plain[below], plain[below]))
        if others:
            change = steered[layer][others] - plain[layer][others]
            elsewhere = max(elsewhere, _relative(change, plain[layer][others]))
    changed = f"positions={positions}: the residual stream changes by coef x v"
    yield bench.check(changed, at_layer, f"{count} positions, worst at {where}")
    yield bench.check(
        f"positions={positions}: no other token changes, nor any layer below", elsewhere
    )


def _zero_is_identity(bench: Bench) -> Check:
    worst, detail = 0.0, ""
    tokens, plain = bench.generated(bench.request(0, prompt=1))
    for instruction in bench.steering:
        zero = replace(instruction, coef=0.0)
        same, states = bench.generated(bench.request(0, zero, prompt=1))
        if same != tokens:
            worst, detail = float("inf"), "another text"
            break
        worst = max(
            worst, *(float((a - b).abs().max()) for a, b in zip(states, plain, strict=True))
        )
    return bench.check("coefficient 0 is the identity", worst, detail, unit="absolute", allowed=0)


def _plain_hook_agrees(bench: Bench) -> Check:
    """Greedy text equals that of transformers' generate with a hook written out by hand."""
    different = 0
    for instruction in bench.steering:
        everywhere = replace(instruction, positions="all")
        (answer,) = bench.backend.generate([bench.request(0, everywhere, prompt=0)])
        theirs = _generate_by_hand(bench, everywhere)
        different += theirs[: len(answer.token_ids)] != answer.token_ids
    return bench.check(
        "greedy text equals model.generate with a hand-written hook",
        different,
        f"{len(bench.steering)} answers",
        unit="answers that differ",
        allowed=0,
    )


def _generate_by_hand(bench: Bench, instruction: Instruction) -> tuple[int, ...]:
    import torch

    block = bench.blocks[block_index(instruction.layer)]
    added = torch.from_numpy(np.float32(instruction.coef) * instruction.vector)

    def add(_module: Any, _args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        hidden = hidden + added.to(device=hidden.device, dtype=hidden.dtype)
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    ids = torch.tensor([bench.prompts[0]], device=bench.device)
    handle = block.register_forward_hook(add)
    try:
        with torch.inference_mode():
            output = bench.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=bench.answer_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=0,
            )
    finally:
        handle.remove()
    return tuple(int(token) for token in output[0, ids.shape[1] :])


def _means_in_a_batch(bench: Bench) -> Check:
    """Mean activations of steered and unsteered rows: batched against one at a time."""
    sequences = [
        TokenSpans(
            id=request.id,
            token_ids=request.prompt_ids,
            spans={"prompt": (0, len(request.prompt_ids))},
            steering=request.steering,
        )
        for request in bench.mixed_requests()
    ]
    together = {means.id: means.means["prompt"] for means in bench.backend.capture(sequences)}
    worst = 0.0
    for sequence in sequences:
        (alone,) = bench.backend.capture([sequence])
        means = alone.means["prompt"]  # [L + 1, H]
        gap = np.linalg.norm(together[sequence.id] - means, axis=1) / np.linalg.norm(means, axis=1)
        worst = max(worst, float(gap.max()))
    return bench.check(
        "mean activations in a mixed batch equal those alone",
        worst,
        f"{len(sequences)} rows",
    )


def _nothing_is_left(bench: Bench, before: list[torch.Tensor]) -> Check:
    after = bench.plain(bench.prompts[1])
    worst = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    name = "unsteered, the model computes afterwards what it did before"
    return bench.check(name, worst, unit="absolute", allowed=0)


def _relative(error: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest norm of ``error`` ``[T, H]`` in units of the reference's norm there."""
    return float((error.norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-12)).max())
