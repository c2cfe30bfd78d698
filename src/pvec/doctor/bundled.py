"""Whether the bundled model and its judge are whole, and still say what they say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pvec.tiny
from pvec.doctor.finding import Finding
from pvec.errors import PvecError
from pvec.types import Request, Sampling

FOLDER = Path(pvec.tiny.__file__).parent

CHECKSUMS = {
    "model.safetensors": "ea1f0f6a3b88f64328f27f5f414f0298c2095bd09755e5391c09d3e57ba2e04f",
    "tokenizer.json": "03c8f268ad2bfeea6896a6001ce74c9e158ed4df1b4bc44e962156b456405a67",
    "judge/model.safetensors": "e578cdbb4497d745f2eb684cf9d5393c50e134da8369b55f0a42c36df195ed15",
    "judge/tokenizer.json": "03c8f268ad2bfeea6896a6001ce74c9e158ed4df1b4bc44e962156b456405a67",
}
"""SHA-256 of each file; a rebuilt model gets new ones here (a test says so)."""

QUESTION = "How do I make friends in a new town?"
ANSWER = "The town can be clear for readers."
"""What the bundled model answers greedily. The likeliest token leads by 0.04 in the logits or more,
far above what differs between machines in float32.
"""

_REINSTALL = "pip install --force-reinstall --no-deps pvec (or check out src/pvec/tiny again)"


def bundled_model() -> Iterator[Finding]:
    """Yield whether the files are those that shipped, and whether the model runs."""
    whole = True
    for name, wanted in CHECKSUMS.items():
        path = FOLDER / name
        if not path.is_file():
            whole = False
            yield Finding(name, "broken", "is not there", _REINSTALL)
        elif hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
            whole = False
            yield Finding(name, "broken", "is not the file that shipped", _REINSTALL)
    if whole:
        yield Finding("files", "ok", f"{len(CHECKSUMS)} files as they shipped")
        yield _says()


def _says() -> Finding:
    try:
        said = greedy_answer()
    except (ImportError, OSError, RuntimeError, PvecError) as error:
        return Finding("answer", "broken", f"the model does not run: {error}", "reinstall torch")
    if said != ANSWER:
        return Finding("answer", "broken", f"it said {said!r}, not {ANSWER!r}", "reinstall torch")
    return Finding("answer", "ok", f"loads and says: {said}")


def greedy_answer() -> str:
    """Return the bundled model's greedy answer to ``QUESTION`` on the CPU."""
    from pvec.backends.hf.backend import HFBackend
    from pvec.models.chat import prompt_ids
    from pvec.models.files import ModelSpec

    with HFBackend(ModelSpec(model="tiny", device="cpu", dtype="float32")) as backend:
        ids = prompt_ids(backend.tokenizer, [{"role": "user", "content": QUESTION}])
        request = Request(
            id="doctor", prompt_ids=ids, sampling=Sampling(temperature=0.0, max_tokens=96)
        )
        (generation,) = backend.generate([request])
    return generation.text
