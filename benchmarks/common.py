"""What several benchmarks share: models of random weights, requests, hooks, clocks.

pvec is imported where it is used: ``peers.py`` runs in environments that do not have it.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pvec.backends.hf.backend import HFBackend
    from pvec.types import Instruction, Request

Result = TypeVar("Result")

TINY = Path(__file__).parents[1] / "src" / "pvec" / "tiny"
"""The bundled model."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""The environment of a process that is measured."""

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu`` leaves out the time that other processes took, and sums over threads (user and system):
compare it on one thread."""

PROMPT = 64
"""Tokens of a request's prompt."""

SIZES: dict[str, dict[str, Any]] = {
    "bundled": {
        "vocab_size": 3072,
        "hidden_size": 160,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
    },
    "20m": {
        "vocab_size": 16_000,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "100m": {
        "vocab_size": 32_000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "100m-qwen": {  # as many weights in the vocabulary of Qwen2.5 as small chat models have
        "vocab_size": 151_936,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "7b": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}


def parser_of(doc: str) -> argparse.ArgumentParser:
    """Return a parser whose help begins with a script's docstring."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def build(size: str, *, device: str = "cpu", dtype: str = "float32") -> PreTrainedModel:
    """Return a Qwen2 of the wanted size with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**SIZES[size], max_position_embeddings=1024, tie_word_embeddings=False)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


def random_backend(size: str, *, device: str = "cpu", dtype: str = "float32") -> HFBackend:
    """Return a random model of a size with the bundled model's tokenizer."""
    from transformers import AutoTokenizer

    from pvec.backends.hf.backend import HFBackend

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return HFBackend.wrap(build(size, device=device, dtype=dtype), tokenizer, name=size)


def token_ids(number: int, count: int = PROMPT) -> tuple[int, ...]:
    """Return token ids, other ones for each number up to 900."""
    return tuple(3 + (7 * number + i) % 900 for i in range(count))


def request(number: int, *, tokens: int, steering: Sequence[Instruction] = ()) -> Request:
    """Return a request for an answer of so many tokens."""
    from pvec.types import Request, Sampling

    return Request(
        id=str(number),
        prompt_ids=token_ids(number),
        sampling=Sampling(max_tokens=tokens, seed=number),
        steering=tuple(steering),
    )


def write_chats(path: Path, turns: Iterable[tuple[str, str]]) -> Path:
    """Write chats of one question and answer as JSON lines."""
    with path.open("w") as stream:
        for question, answer in turns:
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")
    return path


@contextmanager
def hooked(block: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let ``change`` replace the hidden states ``[B, T, H]`` that a block gives."""

    def replace(_module: Any, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = block.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """Return a batch for ``model.generate``, padded on the left."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def timed(
    work: Callable[[], Result], clock: Callable[[], float] = time.process_time
) -> tuple[float, Result]:
    """Return the seconds of ``work``, by default of this process's CPU, and its result."""
    start = clock()
    result = work()
    return clock() - start, result


@dataclass
class Usage:
    """Seconds, and the highest memory use above that at the start, in MiB."""

    seconds: float = 0.0
    peak: float = 0.0


@contextmanager
def watched(device: str, clock: Callable[[], float] = time.perf_counter) -> Iterator[Usage]:
    """Note the time and the memory of what runs inside."""
    usage = Usage()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), clock()
        yield usage
        torch.cuda.synchronize()
        usage.seconds = clock() - start
        usage.peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    done = threading.Event()
    at_start = resident()

    def watch() -> None:
        while not done.wait(0.01):
            usage.peak = max(usage.peak, resident() - at_start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = clock()
    try:
        yield usage
    finally:
        usage.seconds = clock() - start
        done.set()
        watcher.join()


def resident(process: int | str = "self") -> float:
    """Return a process's resident memory in MiB (Linux; 0 elsewhere)."""
    status = Path(f"/proc/{process}/statm")
    return int(status.read_text().split()[1]) * 4096 / 2**20 if status.exists() else 0.0


def require_same(name: str, difference: float, *, dtype: str) -> None:
    """End the script when two ways differ by more than rounding does, as a share of the largest."""
    limit = 1e-4 if dtype == "float32" else 5e-2
    if difference > limit:
        raise SystemExit(f"{name}: the two ways differ by {difference:.1e}, more than {limit:.0e}")
