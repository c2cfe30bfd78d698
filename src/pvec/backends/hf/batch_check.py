"""Check that a batch computes for each row what the model computes for that row alone.

Some architectures ignore the padding mask, or keep a state that pvec's cache does not hold, and
then answer differently in a batch, with no error. So the first time that an architecture generates
in a process, a few tokens are decoded in a padded batch and compared with transformers' plain
forward pass of each row, without batch, padding or cache. Layers with a recurrent state run without
padding; some compute a step otherwise than a whole pass, so the row alone is decoded too.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pvec.backends.hf.forward import CausalModel, left_padded
from pvec.backends.hf.step import decode_step
from pvec.errors import ModelError
from pvec.steering.steerer import Steerer

_PROMPTS = (24, 9)
"""Lengths of the prompts in tokens: the second row is padded."""

_STEPS = 3

_TOLERANCE = {torch.float32: 0.01}
_ROUGH_TOLERANCE = 0.3
"""Allowed relative difference of logits: rounding gives about 1e-6 in float32 and 1e-2 in half
precision, where a mixture of experts may also choose another expert; a wrong mask gives about 1.
"""

_checked: set[tuple[type, str, torch.dtype, bool, bool]] = set()


def check_batching(model: CausalModel) -> CausalModel:
    """Check an architecture once in a process (see above) and return the model to decode with.

    A step of fixed shapes that differs is left out, and the user is told. Raises ``ModelError``
    when a batch differs all the same.
    """
    if model.fixed_shapes:
        problem = _problem(model)
        if problem is None:
            return model
        model.notify(f"{problem}: decoding without a CUDA graph, which is slower")
        model = replace(model, fixed_shapes=False)
    problem = _problem(model)
    if problem is not None:
        raise ModelError(
            f"{problem}: it cannot generate on the hf backend; use --backend vllm or another model."
        )
    return model


def _problem(model: CausalModel) -> str | None:
    """Return what is wrong with the batches of an architecture; None when nothing is."""
    inner = model.inner
    attention = str(inner.config._attn_implementation)  # noqa: SLF001 - transformers' own name
    quantised = getattr(inner.config, "quantization_config", None) is not None
    key = (type(inner), attention, inner.dtype, quantised, model.fixed_shapes)
    if key in _checked:
        return None
    name = type(inner).__name__
    try:
        difference = batch_difference(model)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        first = str(error).split("\n", maxsplit=1)[0][:200]
        return f"{name} does not run in a batch with a cache ({first})"
    if not difference <= _TOLERANCE.get(inner.dtype, _ROUGH_TOLERANCE):
        return (
            f"{name} computes other logits in a batch than alone (relative difference "
            f"{difference:.2g})"
        )
    _checked.add(key)
    return None


@torch.inference_mode()
def batch_difference(model: CausalModel) -> float:
    """Return the largest relative difference between logits of a batch and of its rows alone."""
    batched = _decoded(model, rows := _rows(model))  # [R, steps, V]
    worst = 0.0
    for row, logits in zip(rows, batched, strict=True):
        if model.row_cache:
            ids = torch.tensor([row], device=model.device)
            alone = model.inner(input_ids=ids, use_cache=False).logits[0, -_STEPS:].float()
        else:
            alone = _decoded(model, [row])[0]
        spread = (alone - alone.mean(dim=-1, keepdim=True)).norm()
        worst = max(worst, float((logits - alone).norm() / spread))
    return worst


def _rows(model: CausalModel) -> list[list[int]]:
    """Return token ids of the prompts and what follows them: fixed, and different for each row."""
    prompts = _PROMPTS if model.row_cache else (max(_PROMPTS),) * len(_PROMPTS)
    longest = min(model.context or 1 << 20, max(_PROMPTS) + _STEPS - 1)
    count = min(model.vocab_size, int(model.decoder.embed.weight.shape[0]))  # type: ignore[index]
    special = {*model.stop_ids, model.pad_id}
    usable = [token for token in range(count) if token not in special]
    return [
        [usable[(7919 * (row + 1) * (step + 1)) % len(usable)] for step in range(length)]
        for row, length in enumerate(min(p + _STEPS - 1, longest) for p in prompts)
    ]


def _decoded(model: CausalModel, rows: list[list[int]]) -> torch.Tensor:
    """Return the logits of the last tokens of each row, the rows decoded as one padded batch."""
    prompts = [row[: len(row) - _STEPS + 1] for row in rows]
    ids, real, positions = left_padded(prompts, pad_id=model.pad_id, device=model.device)
    cache = model.new_cache()
    mask = real if model.row_cache else None
    logits = [model.forward(ids, mask=mask, positions=positions, cache=cache)]
    step, steerer = decode_step(model), Steerer(model.decoder, [()] * len(rows))
    lengths = [len(prompt) for prompt in prompts]
    for number in range(1, _STEPS):
        tokens = [row[number - _STEPS] for row in rows]
        logits.append(step(tokens, lengths, cache=cache, steerer=steerer).clone())
        lengths = [length + 1 for length in lengths]
    return torch.stack(logits, dim=1)
