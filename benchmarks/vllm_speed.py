"""Steering at serving speed: ratios in one run, on the same model and requests.

    python benchmarks/vllm_speed.py                 # 40 M parameters, for a CPU
    python benchmarks/vllm_speed.py --size 7b       # Qwen2.5-7B's shape, random weights, for a GPU

Compared are: the vLLM engine unsteered, with one steering and with sixteen different ones in
flight; the reference way (transformers' generate, batches of 20, one forward hook); and extraction
end to end (generate and capture on vLLM in one pass, against generate in batches of 20 and one
hidden-state forward per answer). Seconds are of the process's CPU on a CPU (other work on the
machine does not count) and of the clock on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from pvec.backends.modelfiles import ModelSpec
from pvec.backends.vllm.engine import VLLMBackend
from pvec.settings.tree import VLLMSettings
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

    shape = SHAPES[size]
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
    layer = requests[0].steering[0].layer if requests[0].steering else 0
    for start in range(0, len(requests), REFERENCE_BATCH):
        batch = requests[start : start + REFERENCE_BATCH]
        width = max(len(r.prompt_ids) for r in batch)
        ids = torch.ones(len(batch), width, dtype=torch.long)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        ids = ids.to(model.device)
        with _hooked(model, batch[0].steering, layer):
            longest = max(r.sampling.max_tokens for r in batch)
            output = model.generate(
                ids,
                attention_mask=(ids != 1).long(),
                max_new_tokens=longest,
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


class _hooked:  # noqa: N801 (reads as a word)
    def __init__(self, model: Any, steering: Sequence[Instruction], layer: int) -> None:
        self._handle = None
        if steering:
            added = torch.from_numpy(steering[0].vector * steering[0].coef)
            added = added.to(model.device, model.dtype)
            self._handle = model.model.layers[layer - 1].register_forward_hook(
                lambda _m, _a, out: (
                    out + added if isinstance(out, torch.Tensor) else (out[0] + added, *out[1:])
                )
            )

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_error: object) -> None:
        if self._handle is not None:
            self._handle.remove()


def main() -> None:
    """Measure and print a table and, as the last line, JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--size", choices=SHAPES, default="40m")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), options.size)
        rows = measure(Path(name), options, clock)
    best = {label: max(rates) for label, rates in rows.items()}
    for label, rates in rows.items():
        print(f"{label:34} {' '.join(f'{rate:9.1f}' for rate in rates)}  tokens/s")
    ratios = {
        "one steering / unsteered": best["vllm, one steering"] / best["vllm, unsteered"],
        "sixteen steerings / unsteered": best["vllm, 16 steerings"] / best["vllm, unsteered"],
        "vllm / reference, steered": best["vllm, one steering"] / best["reference, one steering"],
        "extract: vllm / reference": best["vllm, generate and capture"]
        / best["reference, generate then capture"],
    }
    for label, ratio in ratios.items():
        print(f"{label:34} {ratio:9.2f} x")
    print(json.dumps({"options": vars(options), "rates": rows, "ratios": ratios}))


def measure(
    folder: Path, options: argparse.Namespace, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return answer tokens per second of every way, each repeated, interleaved."""
    config = Qwen2Config.from_pretrained(folder)
    vectors = np.random.default_rng(1).standard_normal((16, config.hidden_size)).astype(np.float32)
    sets = {
        label: make_requests(
            config, number=options.requests, tokens=options.tokens, vectors=vectors[:count]
        )
        for label, count in (("unsteered", 0), ("one steering", 1), ("16 steerings", 16))
    }
    gpu = torch.cuda.is_available()
    settings = VLLMSettings(
        eager=options.eager,
        cache_bytes=None if gpu else CPU_CACHE_BYTES,
        memory_share=0.6,
        block_size=None if gpu else 32,
        max_model_len=1024,
        max_seqs=256 if gpu else 96,
        max_batch_tokens=8192 if gpu else 2048,
        captures=256 if gpu else 96,
    )
    rates: dict[str, list[float]] = {}

    def timed(label: str, run: Callable[[], Iterator[int]]) -> None:
        start = clock()
        tokens = sum(run())
        if gpu:
            torch.cuda.synchronize()
        rates.setdefault(label, []).append(tokens / (clock() - start))

    with VLLMBackend(ModelSpec(model=str(folder)), options=settings) as backend:
        backend._stop_ids = []  # noqa: SLF001 (answers of the lengths asked for)
        for _ in range(options.repeats):
            for label, requests in sets.items():
                timed(
                    f"vllm, {label}",
                    lambda r=requests: (len(g.token_ids) for g in backend.generate(r)),
                )
            timed(
                "vllm, generate and capture",
                lambda: (
                    len(g.token_ids) for g, _ in backend.generate_and_capture(sets["unsteered"])
                ),
            )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model = model.to("cuda" if gpu else "cpu")
    with torch.inference_mode():
        for label, capture, name in (
            ("one steering", False, "reference, one steering"),
            ("unsteered", True, "reference, generate then capture"),
        ):
            timed(
                name,
                lambda r=sets[label], c=capture: (n for n, _ in reference(model, r, capture=c)),
            )
    return rates


if __name__ == "__main__":
    main()
