"""pvec on stock vLLM: steering and capture inside its continuous batch and compiled graph.

    start.py       version check, the engine's arguments and memory, and what is refused
    packing.py     arrays as bytes for the worker processes
    token_rows.py  which token of a step belongs to which request, and its role (numpy)
    probe.py       the module attached to each decoder layer: steers, counts, accumulates
    live.py        what the worker sends along with the tokens of a server's requests
    worker.py      the part that runs inside vLLM's worker process
    slots.py       who holds which slot and rows (bookkeeping)
    requests.py    requests and sequences as engine requests, and engine results as answers
    client.py      requests into the engine and results out of it
    replicas.py    several engines side by side
    selftest.py    proof, before the first request, that steering and capture hold
    scores.py      log-probabilities of continuations
    engine.py      ``VLLMBackend``, the contract of ``pvec.backends.base``

Importing this package imports neither vLLM nor torch.
"""
