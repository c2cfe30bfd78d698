"""The judge of ``judges.openai`` through the batch endpoint: half the price, within a day.

Batches wait in the run (``judges.batch_folder``), so that a later call of the same command collects
what an earlier one submitted. Requests that the server failed to answer go into another batch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pvec.errors import JudgeError
from pvec.judges.batch_folder import MOST_BYTES, MOST_REQUESTS, Batch, open_batches, query_id
from pvec.judges.batch_server import ENDPOINT, BatchServer, BatchState, Gone, read_results
from pvec.judges.client import GaveUp
from pvec.judges.openai import OpenAIJudge, reading_of_failure
from pvec.judges.pacing import Patience
from pvec.judges.reply import MalformedReply, is_error, parse_error, parse_reply, parse_usage
from pvec.judges.scales import Reading, mean_reading
from pvec.judges.server import sendable
from pvec.types import JudgeQuery, Score

_ATTEMPTS = 3
"""How often a request is submitted before its score counts as an error of this call."""

_FIRST_POLL, _LONGEST_POLL = 2.0, 60.0
_WORTH_ANOTHER_TRY = (408, 409, 425, 429)


class BatchJudge(OpenAIJudge):
    """Scores through ``/files`` and ``/batches``; the scores have the same name and ids as those of
    ``OpenAIJudge``. ``work_in`` comes before ``score``.

    ``wait`` is how many hours ``score`` waits (None: until all is done), ``poll`` the seconds
    before it asks again for the first time.
    """

    def __init__(
        self,
        model: str,
        *,
        wait: float | None = None,
        poll: float = _FIRST_POLL,
        patience: Patience | None = None,
        **fields: Any,
    ) -> None:
        patience = patience or Patience()
        super().__init__(model, patience=patience, **fields)
        self._server = BatchServer(self._endpoint.server, tries=patience.tries)
        self._wait, self._poll = wait, poll
        self._limit_reached: str | None = None
        self._shown: dict[str, str] = {}
        self._folder: Path | None = None

    @property
    def stopped(self) -> str | None:
        """The cost limit, once it is reached."""
        return self._limit_reached or super().stopped

    def work_in(self, folder: Path, *, name: str, notify: Callable[[str], None]) -> None:
        """Keep batches in the run ``folder``, for scores that are kept under ``name``."""
        self._folder, self._kept_name, self._notify = folder, name, notify

    def check(self) -> None:
        """Find out whether the server has batches and, by one plain request, how it is read."""
        if not self._checked:
            self._server.check()
        super().check()

    def close(self) -> None:
        """Close the connections; batches go on at the server."""
        self._server.close()
        super().close()

    def score(self, queries: Iterable[JudgeQuery]) -> Iterator[Score]:
        """Yield the scores of batches that were submitted before and of one for the other queries.

        Waits until they are done. Raises ``JudgeError`` when that takes longer than allowed, when a
        batch failed or was cancelled: its finished scores come first, nothing paid for is lost.
        """
        assert self._folder is not None, "work_in comes before score"
        self.check()
        waiting = list(open_batches(self._folder, judge=self._kept_name))
        known = {identity for batch in waiting for identity in batch.queries}
        queue = [*waiting, *self._packed(query for query in queries if query.id not in known)]
        running: list[Batch] = []
        started, pause, full = time.monotonic(), self._poll, False
        while queue or running:
            while queue and not full:
                running.append(self._submitted(queue.pop(0)))
            for batch in list(running):
                state = self._state(batch)
                if not state.ended:
                    continue
                running.remove(batch)
                full = state.over_quota
                if state.over_quota:
                    queue += self._shorter(batch, state, alone=not running)
                else:
                    queue += yield from self._finish(batch, state)
            if running:
                self._require_time(started, running)
                time.sleep(pause)
                pause = min(1.5 * pause, _LONGEST_POLL)
            full = full and bool(running)

    # -- what is asked --------------------------------------------------------------------------

    def _packed(self, queries: Iterable[JudgeQuery]) -> Iterator[Batch]:
        """Yield batches of as many queries as the server takes and the cost limit allows."""
        asked: list[JudgeQuery] = []
        lines: list[str] = []
        size = reserved = 0.0

        assert self._folder is not None
        folder = self._folder

        def packed() -> Batch:
            return Batch.create(
                folder, judge=self._kept_name, queries=asked, lines=lines, reserved=reserved
            )

        for query in queries:
            amount = self.budget.reserve(
                characters=self.repeats * sum(len(m["content"]) for m in query.messages),
                completion_tokens=self.repeats * self._tokens_for(query.scale),
                cautious=True,
            )
            if amount is None:
                self._limit_reached = f"the cost limit of ${self.budget.limit:g} is reached"
                break
            more = self._requests(query)
            longer = sum(len(line.encode()) for line in more)
            if asked and (len(lines) + len(more) > MOST_REQUESTS or size + longer > MOST_BYTES):
                yield packed()
                asked, lines, size, reserved = [], [], 0.0, 0.0
            asked.append(query)
            lines += more
            size, reserved = size + longer, reserved + amount
        if asked:
            yield packed()

    def _requests(self, query: JudgeQuery) -> list[str]:
        """Return the lines of a batch's input that ask one query."""
        body = {
            "model": self._endpoint.server.model,
            "messages": sendable(query.messages),
            **self._endpoint.dialect.parameters(max_tokens=self._tokens_for(query.scale)),
        }
        one = self.repeats == 1
        names = [query.id if one else f"{query.id}-{number}" for number in range(self.repeats)]
        request = {"method": "POST", "url": ENDPOINT, "body": body}
        return [json.dumps({"custom_id": name, **request}) + "\n" for name in names]

    def _submitted(self, batch: Batch) -> Batch:
        """Return a batch that the server has: submitted now, or by an earlier call."""
        if batch.id is not None:
            self._notify(
                f"collecting batch {batch.id} of {batch.submitted}: {len(batch.queries):,} scores"
            )
            return batch
        # A kill may have come after it was submitted and before that was noted.
        state = None if batch.fresh else self._server.find(batch.key)
        if state is None:
            state = self._server.submit(batch.requests, key=batch.key)
        self._notify(
            f"submitted batch {state.id}: {len(batch.queries):,} scores within 24 hours; when this "
            "command is interrupted, the same command collects them"
        )
        return batch.with_id(state.id)

    def _shorter(self, batch: Batch, state: BatchState, *, alone: bool) -> list[Batch]:
        """Return what to submit instead of a batch for which the account's queue has no room: the
        same once others have ended, or two halves when there are no others.
        """
        if alone and len(batch.queries) < 2:
            raise JudgeError(
                f"The account at {self._endpoint.server.host} takes no further batch "
                f"({state.problem}): run the same command again when its other batches are done."
            )
        names = list(batch.queries)
        half = len(names) // 2 if alone else len(names)
        shorter = [
            batch.part(names, share=len(names) / len(batch.queries))
            for names in (names[:half], names[half:])
            if names
        ]
        batch.forget()
        what = "submitted in halves" if alone else "submitted again when others are done"
        self._notify(f"the account's queue has no room for batch {state.id}: {what}")
        return shorter

    # -- what comes back ------------------------------------------------------------------------

    def _state(self, batch: Batch) -> BatchState:
        assert batch.id is not None
        try:
            state = self._server.state(batch.id)
        except Gone as error:
            raise JudgeError(
                f"The server at {self._endpoint.server.host} does not know the batch {batch.id} "
                f"that this run waits for ({error}): use the key and server it was submitted with, "
                f"or delete {batch.folder} to ask, and pay, again."
            ) from None
        progress = f"batch {state.id}: {state.status}"
        if state.total:
            tenth = state.total // 10 or 1
            progress += f", {state.done // tenth * tenth:,} of {state.total:,} answered"
        if self._shown.get(state.id) != progress:
            self._shown[state.id] = progress
            self._notify(progress)
        return state

    def _require_time(self, started: float, running: list[Batch]) -> None:
        if self._wait is None or time.monotonic() - started < 3600 * self._wait:
            return
        scores = sum(len(batch.queries) for batch in running)
        raise JudgeError(
            f"{scores:,} scores are still in batches at {self._endpoint.server.host}: run the same "
            "command again later, it collects them."
        )

    def _finish(self, batch: Batch, state: BatchState) -> Generator[Score, None, Sequence[Batch]]:
        """Yield the scores of a batch that ended; return what is to be submitted again."""
        if state.status == "failed":
            self.budget.release(batch.reserved, billed=False)
            batch.forget()
            raise JudgeError(
                f"The judge at {self._endpoint.server.host} refused batch {state.id} "
                f"({state.problem}): omit --judge-batch, or correct that and run the same command "
                "again."
            )
        readings, failures = self._results(batch, state)
        for identity, several in readings.items():
            yield self.scored(batch.queries[identity], mean_reading(several))
        left = [identity for identity in batch.queries if identity not in readings]
        if not left:
            batch.forget()
            return []
        if state.status == "cancelled":
            batch.forget()
            raise JudgeError(
                f"The batch {state.id} was cancelled with {len(readings):,} of "
                f"{len(batch.queries):,} scores, which are kept: run the same command again to "
                "submit the others."
            )
        default = "it expired" if state.status == "expired" else "the results do not mention it"
        reason = next((failures[identity] for identity in left if identity in failures), default)
        if batch.attempt >= _ATTEMPTS:
            for identity in left:
                detail = f"{failures.get(identity, default)} (gave up after {_ATTEMPTS} batches)"
                reading = Reading(score=None, status="error", detail=detail)
                yield self.scored(batch.queries[identity], reading)
            batch.forget()
            return []
        retry = batch.part(left, attempt=batch.attempt + 1)
        batch.forget()
        self._notify(f"{len(left):,} scores of batch {state.id} are missing (the first: {reason})")
        return [retry]

    def _results(
        self, batch: Batch, state: BatchState
    ) -> tuple[dict[str, list[Reading]], dict[str, str]]:
        """Return by query what its requests said, and why others are worth another try."""
        readings: dict[str, list[Reading]] = {}
        failures: dict[str, str] = {}
        share = batch.reserved / max(1, len(batch.queries) * self.repeats)
        seen: set[str] = set()
        for number, file in enumerate(state.files):
            path = batch.results(number)
            try:
                self._server.download(file, path)
            except Gone:
                self._notify(f"the server no longer has results of batch {state.id}")
                continue
            for line in read_results(path):
                name = line.get("custom_id")
                if not isinstance(name, str) or name in seen:
                    continue
                identity = query_id(name)
                if identity not in batch.queries:
                    continue
                outcome = self._outcome(line, batch.queries[identity], share=share)
                if isinstance(outcome, str):
                    failures[identity] = outcome
                    continue
                seen.add(name)
                readings.setdefault(identity, []).append(outcome)
        self.budget.release(batch.reserved - share * len(seen), billed=False)
        return readings, failures

    def _outcome(
        self, line: Mapping[str, Any], query: JudgeQuery, *, share: float
    ) -> Reading | str:
        """Return what one request of a batch gave, or why it is worth another try."""
        response = line.get("response")
        response = response if isinstance(response, dict) else {}
        body, status = response.get("body"), response.get("status_code")
        redact = self._endpoint.server.redact
        if status == 200 and isinstance(body, dict) and not is_error(body):
            try:
                reading = self._read(parse_reply(body), scale=query.scale)
            except MalformedReply as error:
                return str(error)
            self.budget.settle(share, parse_usage(body), characters=None)
            return reading
        said = parse_error(json.dumps(body or line.get("error")).encode())
        code = status if isinstance(status, int) and status != 200 else said.code
        detail = redact(f"HTTP {code}: {said.message}" if code else said.message or "no answer")
        lasting = code is not None and code < 500 and code not in _WORTH_ANOTHER_TRY
        if not (lasting or said.filtered):
            return detail
        self.budget.release(share, billed=False)
        return reading_of_failure(GaveUp(detail, own_fault=True, filtered=said.filtered))
