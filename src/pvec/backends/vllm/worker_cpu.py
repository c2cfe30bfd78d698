"""vLLM's CPU worker with pvec's probes; named to the engine as ``worker_cls``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from pvec.backends.vllm.worker import ProbeWorker


class Worker(ProbeWorker, CPUWorker):  # type: ignore[misc]
    """The CPU worker."""

    def load_model(self, **kwargs: Any) -> None:
        """Load the weights, attach the probes, and mend what the first runner lacks on a CPU."""
        super().load_model(**kwargs)
        if self.pvec_runner == "V1":
            _rewind_draws(self.model_runner)
            _make_room_between_ranks(self.model_runner)


class RewindableGenerator(torch.Generator):
    """A CPU generator that answers ``set_offset`` by taking back its last draw.

    vLLM's first runner samples after every chunk of a prompt, drops what it drew before the last,
    and rewinds the request's generator by an offset, which only a GPU's generator has.
    """

    before: torch.Tensor

    def remember(self) -> None:
        """Keep the state to which the next ``set_offset`` goes back."""
        self.before = self.get_state()

    def get_offset(self) -> int:
        """Return 0: a CPU generator has no offset."""
        return 0

    def set_offset(self, _offset: int) -> torch.Generator:
        """Take back what was drawn since ``remember``."""
        return self.set_state(self.before)


def _make_room_between_ranks(runner: Any) -> None:
    """Allocate what a later pipeline rank receives into.

    The runner does so in a warm-up run, which the CPU worker leaves out when it need not compile.
    """
    from vllm.distributed.parallel_state import get_pp_group

    if get_pp_group().is_first_rank or runner.intermediate_tensors is not None:
        return
    runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
        batch_size=runner.max_num_tokens,
        dtype=runner.model_config.dtype,
        device=runner.device,
    )


def _rewind_draws(runner: Any) -> None:
    """Before each step, remember the generators of the requests that will not keep their draw."""
    prepare = runner._prepare_inputs  # noqa: SLF001

    def prepare_inputs(scheduler_output: Any, num_scheduled_tokens: np.ndarray, *rest: Any) -> Any:
        batch = runner.input_batch
        for index, generator in list(batch.generators.items()):
            request = runner.requests[batch.req_ids[index]]
            reached = batch.num_computed_tokens_cpu[index] + num_scheduled_tokens[index]
            if reached < request.num_tokens:
                if not isinstance(generator, RewindableGenerator):
                    generator = _rewindable(generator)  # noqa: PLW2901 (it takes the place)
                    batch.generators[index] = request.generator = generator
                generator.remember()
        return prepare(scheduler_output, num_scheduled_tokens, *rest)

    runner._prepare_inputs = prepare_inputs  # noqa: SLF001


def _rewindable(generator: torch.Generator) -> RewindableGenerator:
    rewindable = RewindableGenerator()
    rewindable.set_state(generator.get_state())
    return rewindable
