"""Many requests through few slots, streams that are left early, and what is refused."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from queue import Queue
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pvec.backends.pool.jobs import Job
from pvec.backends.pool.worker import Worker
from pvec.backends.vllm.engine import VLLMBackend
from pvec.errors import InputError, ModelError, SteeringError
from pvec.types import Instruction, Progress, Request, Sampling, StreamChunk, TokenSpans
from vllm_backend.conftest import CACHE_BYTES, Start
from vllm_backend.oracle import WIDTH, forward, greedy, hf_model
from vllm_backend.requests import battery, plans, vector


@pytest.fixture(scope="module")
def backend(start: Start) -> VLLMBackend:
    return start()


def _request(number: int, *steering: Instruction, tokens: int = 3, prompt: int = 5) -> Request:
    return Request(
        id=f"r{number}",
        prompt_ids=tuple(range(30 + number % 7, 30 + number % 7 + prompt)),
        sampling=Sampling(temperature=0.0, max_tokens=tokens),
        steering=steering,
    )


def test_hundreds_of_different_steerings_pass_through_four_slots(backend: VLLMBackend) -> None:
    model = hf_model(Path(backend.info.id))
    base = Instruction(vector=vector(7), layer=2)
    requests = [
        _request(n, replace(base, vector=vector(n), coef=(-1) ** n * 1.0)) for n in range(300)
    ]
    before = backend._pool.clients[0].slots.loads
    found = {g.id: g for g in backend.generate(requests)}
    assert len(found) == 300
    assert backend._pool.clients[0].slots.loads - before == 300
    assert backend._pool.clients[0].slots.held == 0
    for request in requests[::10]:
        tokens, _ = greedy(model, request.prompt_ids, tokens=3, stop=[2], plan=request.steering)
        assert list(found[request.id].token_ids) == tokens, request.id
        assert found[request.id].touched == (1 + len(tokens) - 1,)


def test_requests_that_arrive_while_others_run_join_them(backend: VLLMBackend) -> None:
    """As a pool's worker gets them; a prompt as long as the context fails as it does alone."""
    long = [_request(n, tokens=40) for n in range(4)]
    late = [_request(n, tokens=2) for n in range(4, 8)]
    wanted = {g.id: g.token_ids for g in backend.generate([*long, *late])}
    worker, job = Worker(), Job(key="model", method="generate", number=1)
    worker._models["model"] = backend
    done = worker.exchange(job, [(r.id, r) for r in long], wait=0.0).results
    while not done:
        done = worker.exchange(job, [(r.id, r) for r in late], wait=30.0).results
        late = []
    last = worker.exchange(job, [], end=True, wait=30.0)
    order = [key for key, _ in done]
    while not last.ended:
        done += last.results
        last = worker.exchange(job, [], wait=30.0)
    done += last.results
    assert {key: answer.token_ids for key, answer in done} == wanted
    assert order[0] in {"r4", "r5", "r6", "r7"}, "short answers waited for the long ones' end"


def test_an_answer_whose_logits_overflow_fails_and_the_others_go_on(backend: VLLMBackend) -> None:
    base = Instruction(vector=vector(7), layer=2)
    mild = [_request(n, replace(base, vector=vector(n), coef=0.5)) for n in range(20)]
    plain = [_request(n) for n in range(20, 40)]
    broken = [
        replace(_request(40, replace(base, coef=1e38), tokens=9), id="greedy"),
        replace(
            _request(41, replace(base, coef=1e38, positions="all")),
            id="sampled",
            sampling=Sampling(temperature=1.0, max_tokens=5, seed=3),
        ),
    ]
    alone = {g.id: g.token_ids for g in backend.generate([*mild, *plain])}
    together = {g.id: g for g in backend.generate([*mild[:10], *broken, *mild[10:], *plain])}
    for request in broken:
        answer = together.pop(request.id)
        assert (answer.finish_reason, answer.token_ids, answer.text) == ("failed", (), "")
        assert "not finite numbers" in answer.detail
    assert {name: answer.token_ids for name, answer in together.items()} == alone
    ((answer, means),) = backend.generate_and_capture(broken[:1])
    assert answer.finish_reason == "failed"
    assert all(np.isnan(rows).all() for rows in means.means.values())
    (chunk,) = backend.stream(broken[:1])
    assert chunk.finished is not None
    assert chunk.finished.finish_reason == "failed"


def test_logits_that_overflow_all_the_same_end_the_stream_instead_of_spreading(
    models: Callable[[str], Path],
) -> None:
    """Three layers that add what the format just holds. In a cache of its own, then thrown away."""
    from pvec.settings.sections import VLLMSettings

    base = Instruction(vector=np.ones(WIDTH, dtype=np.float32), layer=1, coef=1.6e38)
    plan = [replace(base, layer=layer) for layer in (1, 2, 3)]
    options = VLLMSettings(
        kv_cache_memory_bytes=CACHE_BYTES, block_size=32, enforce_eager=True, max_num_seqs=8,
        max_num_batched_tokens=128, slots=2, captures=4,
    )  # fmt: skip
    with VLLMBackend(str(models("qwen2")), options=options) as engine:
        requests = [*(_request(n) for n in range(4)), _request(9, *plan)]
        with pytest.raises(ModelError, match=r"'r9' are not finite numbers.*--backend hf"):
            list(engine.generate(requests))
        with pytest.raises(ModelError, match="not finite"):  # its cache is spoiled
            list(engine.generate(requests[:1]))


def test_steerings_that_wait_for_a_slot_do_not_wait_for_long_answers(
    backend: VLLMBackend,
) -> None:
    base = Instruction(vector=vector(7), layer=2)
    long = _request(999, tokens=200)
    requests = [long, *(_request(n, replace(base, coef=1.0 + n)) for n in range(12))]
    order = [g.id for g in backend.generate(requests)]
    answer = next(g for g in backend.generate([long]))
    assert len(answer.token_ids) > 60, "this answer has to outlast the others"
    assert order.index(long.id) >= 8, "two rounds of four slots, while it ran"


def test_positions_touched_are_counted_per_instruction(backend: VLLMBackend) -> None:
    base = Instruction(vector=vector(7), layer=2, coef=0.01)
    steering = tuple(replace(base, positions=p) for p in ("all", "prompt", "response"))
    (generation,) = backend.generate([_request(0, *steering, tokens=4, prompt=6)])
    assert len(generation.token_ids) == 4
    assert generation.touched == (6 + 3, 6, 1 + 3)


def test_a_stream_that_is_left_early_leaves_slots_and_rows_free(backend: VLLMBackend) -> None:
    free = len(backend._pool.clients[0].rows._free)
    stream = backend.generate_and_capture(battery())
    next(stream)
    stream.close()
    assert backend._pool.clients[0].slots.held == 0
    assert len(backend._pool.clients[0].rows._free) == free
    assert not backend._pool.clients[0]._running
    assert len(list(backend.generate(battery()))) == len(battery())


def test_two_streams_share_the_engine_and_each_gets_its_own(backend: VLLMBackend) -> None:
    alone = {g.id: g for g in backend.generate(battery())}
    first, second = backend.generate(battery()), backend.generate(battery(copies=2))
    pairs = list(itertools.zip_longest(first, second))
    assert {g.id: g for g, _ in pairs if g} == alone
    assert {g.id for _, g in pairs if g} == {r.id for r in battery(copies=2)}


def test_streamed_answers_grow_token_by_token_to_what_generate_gives(
    backend: VLLMBackend,
) -> None:
    requests = battery(copies=1)
    whole = {g.id: g for g in backend.generate(requests)}
    grown: dict[str, list[StreamChunk]] = {r.id: [] for r in requests}
    for chunk in backend.stream(requests):
        grown[chunk.id].append(chunk)
    for name, chunks in grown.items():
        assert [p.finished for p in chunks] == [*[None] * (len(chunks) - 1), whole[name]]
        assert chunks[-1].token_ids == whole[name].token_ids
        for number, chunk in enumerate(chunks[:-1], start=1):
            assert chunk.token_ids == whole[name].token_ids[:number]
    assert max(len(chunks) for chunks in grown.values()) >= 5


def test_progress_is_told_of_every_answer(
    backend: VLLMBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Progress] = []
    monkeypatch.setattr(backend, "on_progress", heard.append)
    answers = list(backend.generate(battery(copies=1)))
    assert [p.done for p in heard] == list(range(1, len(answers) + 1))
    ended = sum(a.finish_reason == "stop" for a in answers)
    assert heard[-1].extra["tokens"] == sum(len(a.token_ids) for a in answers) + ended
    assert heard[-1].extra["rows"] == 0


def test_answers_that_the_context_cuts_are_announced(
    backend: VLLMBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(backend, "on_note", said.append)
    list(backend.generate([_request(0, tokens=50, prompt=250), _request(1)]))
    assert said == ["1 answers may be shorter than requested: the engine's context is 256 tokens"]


def test_requests_are_drawn_as_there_is_room(backend: VLLMBackend) -> None:
    drawn = 0

    def endless() -> Iterator[Request]:
        nonlocal drawn
        for number in itertools.count():
            drawn += 1
            yield _request(number)

    stream = backend.generate(endless())
    for _ in range(50):
        next(stream)
    stream.close()
    assert drawn <= 50 + 2 * backend.options.max_num_seqs + 1


def test_the_same_seed_gives_the_same_text_in_any_company(backend: VLLMBackend) -> None:
    def sampled(number: int, seed: int) -> Request:
        return replace(
            _request(number, *plans()[number % 3], tokens=12),
            sampling=Sampling(temperature=1.0, top_p=0.9, max_tokens=12, seed=seed),
        )

    together = {g.id: g.token_ids for g in backend.generate([sampled(n, n) for n in range(9)])}
    for number in (8, 3, 0):
        (alone,) = backend.generate([sampled(number, number)])
        assert alone.token_ids == together[alone.id]
    (other,) = backend.generate([sampled(3, 2**64 - 5)])
    assert other.token_ids != together["r3"]


def test_coefficient_zero_is_no_steering(backend: VLLMBackend) -> None:
    zero = Instruction(vector=vector(7), layer=2, coef=0.0, positions="all")
    steered, plain = _request(1, zero, tokens=8), replace(_request(1, tokens=8), id="plain")
    texts = {g.id: g.token_ids for g in backend.generate([steered, plain])}
    assert texts["r1"] == texts["plain"]


def test_steering_shows_where_it_should_and_only_there(backend: VLLMBackend) -> None:
    shared = _request(1, tokens=8, prompt=70)
    strong = Instruction(vector=8 * vector(7), layer=1, positions="response")
    order = [shared, replace(shared, id="steered", steering=(strong,)), replace(shared, id="again")]
    texts = [next(iter(backend.generate([r]))).token_ids for r in order]
    assert texts[0] == texts[2] != texts[1]


BAD = {
    "width": (
        ModelError,
        "hidden size is 64",
        lambda: _request(0, Instruction(vector=np.ones(5, np.float32), layer=1)),
    ),
    "layer": (
        ModelError,
        "layers 1 to 3",
        lambda: _request(0, Instruction(vector=vector(1), layer=9)),
    ),
    "not a number": (
        ModelError,
        "NaN",
        lambda: _request(0, Instruction(vector=np.full(WIDTH, np.nan, np.float32), layer=1)),
    ),
    "no room": (ModelError, "leaves no room", lambda: _request(0, prompt=256)),
    "no prompt": (ModelError, "is empty", lambda: replace(_request(0), prompt_ids=())),
    "strange token": (ModelError, "vocabulary", lambda: replace(_request(0), prompt_ids=(9**9,))),
    "too many clamps": (
        InputError,
        "backend.vllm.clamps to 3",
        lambda: _request(
            0, *[Instruction(vector=vector(s), layer=1, operator="ablate") for s in range(3)]
        ),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_one_sentence_and_harm_nobody(backend: VLLMBackend, name: str) -> None:
    kind, words, make = BAD[name]
    with pytest.raises(kind, match=words):
        list(backend.generate([_request(1), make()]))
    assert len(list(backend.generate([_request(2)]))) == 1


def test_spans_outside_their_sequence_are_refused(backend: VLLMBackend) -> None:
    sequence = TokenSpans(id="s", token_ids=(30, 31), spans={"prompt": (0, 3)})
    with pytest.raises(InputError, match="outside its 2 tokens"):
        list(backend.capture([sequence]))
    with pytest.raises(ModelError, match="Layer 7"):
        list(backend.capture([], layers=[7]))


def test_a_prompt_that_fills_the_context_but_for_one_token_is_answered(
    backend: VLLMBackend,
) -> None:
    request = _request(0, tokens=50, prompt=backend.context - 1)
    (generation,) = backend.generate([request])
    assert len(generation.token_ids) <= 1
    with pytest.raises(ModelError, match="no room"):
        list(backend.generate_and_capture([request]))


def test_an_answer_that_is_cut_by_the_context_is_captured_to_its_last_token(
    backend: VLLMBackend,
) -> None:
    model, request = hf_model(Path(backend.info.id)), _request(0, tokens=50, prompt=250)
    ((generation, means),) = backend.generate_and_capture([request])
    assert len(generation.token_ids) == backend.context - 250 - 1
    _, states = forward(model, (*request.prompt_ids, *generation.token_ids), prompt=250)
    assert np.allclose(means.means["response"], states[:, 250:].mean(axis=1), atol=1e-3)


def test_a_worker_that_lost_a_request_is_an_error_not_a_number(
    backend: VLLMBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = backend._pool.clients[
        0
    ].engine.engine_core.engine_core.model_executor.driver_worker.worker
    with monkeypatch.context() as patch:
        patch.setattr(worker.pvec_row_map, "open", lambda *_args: None)
        with pytest.raises(SteeringError, match="without being seen"):
            list(backend.generate([_request(0, Instruction(vector=vector(1), layer=1))]))
    backend._pool.clients[0].slots._holders.clear()


def test_a_graph_that_did_not_steer_is_an_error_at_the_end(backend: VLLMBackend) -> None:
    worker = backend._pool.clients[
        0
    ].engine.engine_core.engine_core.model_executor.driver_worker.worker
    hooks = worker.pvec_layers[2]._forward_hooks
    kept = dict(hooks)
    hooks.clear()
    with pytest.raises(SteeringError, match=r"the graph steered \{'2': "):
        list(backend.generate([_request(0, Instruction(vector=vector(1), layer=1))]))
    hooks.update(kept)
    worker.pvec_expected = int(worker.pvec_probes[2].steered)
    worker.pvec_probes[1].steered.fill_(worker.pvec_expected)
    worker.pvec_probes[3].steered.fill_(worker.pvec_expected)


def test_a_worker_that_dies_is_one_sentence_and_what_was_finished_is_kept(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    backend = start(captures=8)  # of its own: it is of no use afterwards
    engine = backend._pool.clients[0].engine
    step, finished = engine.step, []

    def step_until_two_are_done() -> list[object]:
        if len(finished) >= 2:
            raise EngineDeadError()
        outputs: list[object] = step()
        return outputs

    monkeypatch.setattr(engine, "step", step_until_two_are_done)
    requests = [_request(n, tokens=1 + n) for n in range(6)]
    with pytest.raises(ModelError, match="worker of the vLLM engine died"):
        finished.extend(backend.generate(requests))  # list.extend keeps what came before an error
    assert len(finished) >= 2


def test_what_waits_for_an_engine_process_that_is_gone_fails_instead_of_waiting_for_ever() -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    from pvec.backends.vllm.start import _fail_lost_calls

    class Client:
        resources = SimpleNamespace(engine_dead=True)
        call: Future[object] = Future()
        utility_results = MappingProxyType({1: call})
        outputs_queue: Queue[object] = Queue()

    client = Client()
    threading.Thread(target=_fail_lost_calls, args=(weakref.ref(client),), daemon=True).start()
    with pytest.raises(EngineDeadError):
        client.call.result(timeout=20)
    assert isinstance(client.outputs_queue.get(timeout=20), EngineDeadError)


def test_a_model_that_vllm_cannot_run_or_hold_is_refused_with_a_remedy(
    models: Callable[[str], Path],
) -> None:
    from pvec.settings.sections import VLLMSettings

    folder = str(models("qwen2"))
    small = VLLMSettings(enforce_eager=True, kv_cache_memory_bytes=2**14, block_size=32, captures=4)
    with pytest.raises(ModelError, match=r"too little memory.*backend\.vllm\.max_model_len"):
        VLLMBackend(folder, options=small)


def test_an_engine_whose_layers_are_not_steered_does_not_start(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pvec.backends.vllm import probe
    from pvec.settings.sections import VLLMSettings

    monkeypatch.setattr(probe, "steering_change", lambda _row, hidden, *_, **_table: 0 * hidden)
    options = VLLMSettings(
        enforce_eager=True, kv_cache_memory_bytes=2**20, block_size=32, max_num_seqs=4, captures=4
    )
    with pytest.raises(SteeringError, match="self-test of steering on vLLM failed: at layer 1"):
        VLLMBackend(str(models("qwen2")), options=options)


def test_a_graph_compiled_without_probes_or_for_other_tables_is_not_taken_from_the_cache(
    models: Callable[[str], Path],
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from pvec.backends.vllm.start import engine_arguments
    from pvec.models.files import ModelSpec
    from pvec.models.load import inspect_model
    from pvec.settings.sections import VLLMSettings

    metadata = inspect_model(ModelSpec(model=str(models("qwen2"))))

    def key(arguments: dict[str, Any]) -> str:
        """Return what vLLM files a compiled graph under."""
        found: str = EngineArgs(**arguments).create_engine_config().compute_hash()
        return found

    def ours(**settings: Any) -> dict[str, Any]:
        options = VLLMSettings(kv_cache_memory_bytes=CACHE_BYTES, block_size=32, **settings)
        return engine_arguments(metadata, options, dtype="float32", trust_code=False)

    plain = ours() | {"additional_config": {}}
    asked = [plain, ours(), ours(slots=8), ours(clamps=2), ours(captures=8)]
    assert len({key(arguments) for arguments in asked}) == len(asked)
    assert key(ours()) == key(ours())


def test_steering_asked_of_an_engine_without_slots_is_refused(start: Start) -> None:
    backend = start(slots=0)
    assert len(list(backend.generate([_request(0)]))) == 1
    with pytest.raises(InputError, match=r"backend\.vllm\.slots"):
        list(backend.generate([_request(0, Instruction(vector=vector(1), layer=1))]))


def test_an_engine_that_is_closed_leaves_others_in_the_process_alone(
    backend: VLLMBackend, start: Start
) -> None:
    wanted = {g.id: g for g in backend.generate(battery(copies=1))}
    start(captures=12).close()
    assert {g.id: g for g in backend.generate(battery(copies=1))} == wanted


def test_asynchronous_scheduling_steers_alike_and_refuses_to_capture_while_generating(
    start: Start,
) -> None:
    ahead = start(async_scheduling=True)
    texts = {g.id: g.token_ids for g in start().generate(battery())}
    assert {g.id: g.token_ids for g in ahead.generate(battery())} == texts
    sequence = TokenSpans(id="s", token_ids=tuple(range(30, 60)), spans={"response": (9, 30)})
    (means,), (wanted,) = (list(one.capture([sequence])) for one in (ahead, start()))
    assert np.allclose(means.means["response"], wanted.means["response"], atol=1e-4)
    assert not ahead.captures_while_generating
    with pytest.raises(InputError, match=r"async_scheduling off"):
        list(ahead.generate_and_capture(battery()))


def test_seeded_texts_do_not_depend_on_chunks_or_preemption(start: Start) -> None:
    requests = [
        replace(r, sampling=Sampling(temperature=1.0, top_p=0.95, max_tokens=9, seed=n))
        for n, r in enumerate(battery())
    ]
    engines = [
        start(),
        start(max_num_batched_tokens=24),
        start(kv_cache_memory_bytes=6 * 32 * 2 * 3 * 32 * 4, max_model_len=128),
    ]
    texts = [{g.id: g.token_ids for g in engine.generate(requests)} for engine in engines]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0].values())) > len(requests) // 2
