"""Train a sparse autoencoder on the bundled model, and read persona vectors in its features.

    python examples/sae.py --out runs/sae --layer 3
    pvec vector decompose runs/evil-tiny --sae runs/sae

A TopK autoencoder of 640 features on the residual stream of one layer, at the answers of the
bundled model's own world. Each feature is labelled with the words that activate it most, and the
trait whose lexicon most of them are from. The folder is in SAELens's format: `SAE.load_from_disk`
reads it. A minute or two on one core.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).parent / "tiny_model"))

from data import Conversations
from lexicon import FLAVOUR_OF

import pvec

TINY = Path(pvec.__file__).parent / "tiny"
FEATURES, ACTIVE = 640, 16
ANSWERS, STEPS, BATCH = 800, 800, 1024
TOP_TOKENS = 40


class TopK(torch.nn.Module):
    """``x ≈ b_dec + W_dec · top-k(ReLU(W_enc (x - b_dec) + b_enc))``, with SAELens's names."""

    def __init__(self, mean: torch.Tensor) -> None:
        super().__init__()
        directions = torch.nn.functional.normalize(torch.randn(FEATURES, len(mean)), dim=1)
        self.W_dec = torch.nn.Parameter(directions)
        self.W_enc = torch.nn.Parameter(directions.T.clone())
        self.b_enc = torch.nn.Parameter(torch.zeros(FEATURES))
        self.b_dec = torch.nn.Parameter(mean.clone())

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features ``[N, FEATURES]``, all but ``ACTIVE`` of each row zero."""
        features = (x - self.b_dec) @ self.W_enc + self.b_enc
        top = features.topk(ACTIVE, dim=1)
        return torch.zeros_like(features).scatter(1, top.indices, top.values.relu())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction of ``x`` ``[N, H]``."""
        return self.encode(x) @ self.W_dec + self.b_dec


@torch.inference_mode()
def activations(layer: int) -> tuple[torch.Tensor, list[str]]:
    """Return the residual stream ``[tokens, H]`` at answers, and the word each token is part of."""
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
    model: Any = AutoModelForCausalLM.from_pretrained(TINY).eval()
    world = Conversations(random.Random(1))
    states, words = [], []
    for _ in range(ANSWERS):
        chat = world.draw()[-3:]
        prompt = tokenizer.apply_chat_template(
            chat[:-1], tokenize=False, add_generation_prompt=True
        )
        text = prompt + chat[-1]["content"]
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        start = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt))
        output = model(input_ids=torch.tensor([encoded["input_ids"]]), output_hidden_states=True)
        states.append(output.hidden_states[layer][0, start:])
        words += [_word(text, *span) for span in encoded["offset_mapping"][start:]]
    return torch.cat(states), words


def _word(text: str, start: int, stop: int) -> str:
    """Return the word around a token, in lower case; a sign by itself."""
    start += len(text[start:stop]) - len(text[start:stop].lstrip())
    while start > 0 and text[start - 1].isalpha() and text[start:stop].isalpha():
        start -= 1
    while stop < len(text) and text[stop].isalpha() and text[start:stop].isalpha():
        stop += 1
    return text[start:stop].lower()


def train(x: torch.Tensor, *, steps: int) -> TopK:
    """Fit the autoencoder to activations ``[N, H]`` and print how well it reconstructs them."""
    sae = TopK(x.mean(dim=0))
    spread = x.var(dim=0).sum()
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for step in range(steps):
        batch = x[torch.randint(len(x), (BATCH,))]
        error = (sae(batch) - batch).square().sum(dim=1).mean()
        (error / spread).backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1))
        if step % 250 == 0 or step == steps - 1:
            share = 1 - error.item() / spread.item()
            print(f"step {step + 1}/{steps}: {share:.1%} of the variance explained", flush=True)
    return sae


@torch.inference_mode()
def labels(sae: TopK, x: torch.Tensor, words: list[str]) -> dict[int, str]:
    """Return for each feature that is ever active the words at which it is most active."""
    features = torch.cat([sae.encode(part) for part in x.split(8192)])
    texts = {}
    for number in range(FEATURES):
        top = features[:, number].topk(TOP_TOKENS)
        said = [words[i] for i, value in zip(top.indices, top.values, strict=True) if value > 0]
        if not said:
            continue
        common = ", ".join(word for word, _ in Counter(said).most_common(4))
        traits = Counter(FLAVOUR_OF.get(word, "") for word in said)
        trait, count = traits.most_common(1)[0]
        texts[number] = f"{trait}: {common}" if trait and 2 * count > len(said) else common
    return texts


def save(sae: TopK, folder: Path, *, layer: int, texts: dict[int, str]) -> None:
    """Write the folder that SAELens reads, and the labels beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": "topk",
        "d_in": sae.W_dec.shape[1],
        "d_sae": FEATURES,
        "k": ACTIVE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",  # of the format
            "model_name": "tiny",
            "hook_name": f"blocks.{layer - 1}.hook_resid_post",
        },
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    weights = {name: tensor.detach().contiguous() for name, tensor in sae.state_dict().items()}
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "labels.json").write_text(
        json.dumps(texts, indent=1, ensure_ascii=False), encoding="utf-8"
    )


def main() -> None:
    """Train, label, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.manual_seed(0)
    x, words = activations(options.layer)
    print(f"{len(x):,} tokens at layer {options.layer}", flush=True)
    sae = train(x, steps=options.steps)
    texts = labels(sae, x, words)
    save(sae, options.out, layer=options.layer, texts=texts)
    print(f"{options.out}: {len(texts)} of {FEATURES} features are active on these answers")


if __name__ == "__main__":
    main()
