"""Steering at serving speed: ratios in one run, on the same model and requests.

    python benchmarks/vllm_speed.py                 # 40 M parameters, for a CPU
    python benchmarks/vllm_speed.py --size 7b       # Qwen2.5-7B's shape, random weights, for a GPU

Compared are: the vLLM engine unsteered, with one steering and with sixteen different ones in
flight; the reference way (transformers' generate, batches of 20, one forward hook); and extraction
end to end (generate and capture on vLLM in one pass, against generate in batches of 20 and one
hidden-state forward per answer). Every round runs all of vLLM's ways one after the other, after one
round that is not counted; a ratio is taken within each round, and the median over rounds is shown.
Prefix caching is off, since every round asks the same. Seconds are of the process's CPU on a CPU
(other work on the machine does not count) and of the clock on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy as np
import torch
from common import hooked, left_padded, parser_of
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from pvec.backends.vllm.engine import VLLMBackend
from pvec.models.files import ModelSpec
from pvec.settings.sections import VLLMSettings
from pvec.types import Instruction, Request, Sampling

SHAPES = {
    "tiny": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    "40m": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8},
    "7b": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28},
}
REFERENCE_BATCH = 20
CPU_CACHE_BYTES = 2**29


def make_model(folder: Path, size: str) -> None:
    """Write a random Qwen2 of a size, with a tokenizer that only has to exist."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    shape: dict[str, Any] = SHAPES[size]
    big = size == "7b"
    config = Qwen2Config(
        **shape,
        num_key_value_heads=4 if big else shape["num_attention_heads"] // 2,
        intermediate_size=18944 if big else 3 * shape["hidden_size"],
        vocab_size=152064 if big else 8192,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if big else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def make_requests(
    config: Qwen2Config, *, number: int, tokens: int, vectors: np.ndarray
) -> list[Request]:
    """Return prompts of 20 to 60 tokens and answers of varied length; steered by turns."""
    draw = np.random.default_rng(0)
    layer = config.num_hidden_layers // 2
    return [
        Request(
            id=str(n),
            prompt_ids=tuple(draw.integers(2, config.vocab_size, draw.integers(20, 60)).tolist()),
            sampling=Sampling(max_tokens=int(draw.integers(tokens // 4, tokens + 1)), seed=n),
            steering=(Instruction(vector=vectors[n % len(vectors)], layer=layer, coef=0.5),)
            if len(vectors)
            else (),
        )
        for n in range(number)
    ]


def reference(
    model: Any, requests: Sequence[Request], *, capture: bool
) -> Iterator[tuple[int, torch.Tensor | None]]:
    """Generate in batches of 20 under one hook; with ``capture``, a forward per answer after it."""
    for start in range(0, len(requests), REFERENCE_BATCH):
        batch = requests[start : start + REFERENCE_BATCH]
        width = max(len(r.prompt_ids) for r in batch)
        inputs = left_padded([r.prompt_ids for r in batch], pad=1)
        with steered(model, batch[0].steering):
            output = model.generate(
                **{name: tensor.to(model.device) for name, tensor in inputs.items()},
                max_new_tokens=max(r.sampling.max_tokens for r in batch),
                do_sample=True,
                top_k=0,
                pad_token_id=1,
                eos_token_id=None,
            )
        for row, request in enumerate(batch):
            answer = output[row : row + 1, width : width + request.sampling.max_tokens]
            states = None
            if capture:
                whole = torch.cat([output[row : row + 1, :width], answer], dim=1)
                hidden = model(whole, output_hidden_states=True).hidden_states
                states = torch.stack([h[0, width:].float().mean(dim=0).cpu() for h in hidden])
            yield answer.shape[1], states


def steered(model: Any, steering: Sequence[Instruction]) -> AbstractContextManager[None]:
    """Add the first vector at every token; nothing without one."""
    if not steering:
        return nullcontext()
    added = torch.from_numpy(steering[0].vector * steering[0].coef).to(model.device, model.dtype)
    return hooked(model.model.layers[steering[0].layer - 1], lambda hidden: hidden + added)


def main() -> None:
    """Measure and print a table and, as the last line, JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=SHAPES, default="40m")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), options.size)
        rows = measure(Path(name), options)
    for label, rates in rows.items():
        print(f"{label:34} {' '.join(f'{rate:9.1f}' for rate in rates)}  tokens/s")
    ratios = {
        "one steering / unsteered": ratio(rows, "vllm, one steering", "vllm, unsteered"),
        "sixteen steerings / unsteered": ratio(rows, "vllm, 16 steerings", "vllm, unsteered"),
        "capturing / unsteered": ratio(rows, "vllm, generate and capture", "vllm, unsteered"),
        "steered: vllm / reference": ratio(rows, "vllm, one steering", "reference, one steering"),
        "extract: vllm / reference": ratio(
            rows, "vllm, generate and capture", "reference, generate then capture"
        ),
    }
    for label, (middle, low, high) in ratios.items():
        print(f"{label:34} {middle:9.2f} x  ({low:.2f} to {high:.2f})")
    print(json.dumps({"options": vars(options), "rates": rows, "ratios": ratios}))


def ratio(rows: dict[str, list[float]], of: str, to: str) -> tuple[float, float, float]:
    """Return the median, lowest and highest ratio of two ways' rates, round by round."""
    ratios = [a / b for a, b in zip(rows[of], rows[to], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


class Meter:
    """Answer tokens per second of each way, round by round."""

    def __init__(self) -> None:
        self.rates: dict[str, list[float]] = {}
        self.gpu = torch.cuda.is_available()

    def run(self, label: str, lengths: Iterator[int], *, counted: bool = True) -> None:
        """Run a way to its end; ``lengths`` are those of its answers, in tokens."""
        clock = time.perf_counter if self.gpu else time.process_time
        start = clock()
        tokens = sum(lengths)
        if self.gpu:
            torch.cuda.synchronize()
        if counted:
            self.rates.setdefault(label, []).append(tokens / (clock() - start))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return answer tokens per second of every way, round by round."""
    config = Qwen2Config.from_pretrained(folder)
    vectors = np.random.default_rng(1).standard_normal((16, config.hidden_size)).astype(np.float32)
    sets = {
        label: make_requests(
            config, number=options.requests, tokens=options.tokens, vectors=vectors[:count]
        )
        for label, count in (("unsteered", 0), ("one steering", 1), ("16 steerings", 16))
    }
    meter = Meter()
    with VLLMBackend(ModelSpec(model=str(folder)), options=engine_settings(options)) as backend:
        backend._requests.stop_ids = ()  # noqa: SLF001 (answers of the lengths asked for)
        for number in range(options.repeats + 1):
            for label, requests in sets.items():
                lengths = (len(answer.token_ids) for answer in backend.generate(requests))
                meter.run(f"vllm, {label}", lengths, counted=number > 0)
            captured = backend.generate_and_capture(sets["unsteered"])
            lengths = (len(answer.token_ids) for answer, _ in captured)
            meter.run("vllm, generate and capture", lengths, counted=number > 0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model = model.to("cuda" if meter.gpu else "cpu")
    with torch.inference_mode():
        for _ in range(options.repeats):
            steered = reference(model, sets["one steering"], capture=False)
            meter.run("reference, one steering", (length for length, _ in steered))
            both = reference(model, sets["unsteered"], capture=True)
            meter.run("reference, generate then capture", (length for length, _ in both))
    return meter.rates


def engine_settings(options: argparse.Namespace) -> VLLMSettings:
    """Return an engine that holds all requests at once."""
    gpu = torch.cuda.is_available()
    return VLLMSettings(
        enforce_eager=options.eager,
        kv_cache_memory_bytes=None if gpu else CPU_CACHE_BYTES,
        gpu_memory_utilization=0.6,
        enable_prefix_caching=False,
        block_size=None if gpu else 32,
        max_model_len=1024,
        max_num_seqs=256 if gpu else 96,
        max_num_batched_tokens=8192 if gpu else 2048,
        captures=256 if gpu else 96,
    )


if __name__ == "__main__":
    main()
