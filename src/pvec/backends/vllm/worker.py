"""What runs inside vLLM's worker: probes on the decoder layers, and the bookkeeping of every step.

A mix-in over vLLM's own worker class (``worker_cpu`` and ``worker_gpu``), named to the engine as
``worker_cls``. Its ``pvec_*`` methods are what the client calls. Probes are attached after the
weights are loaded, before anything is compiled or captured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from pvec.backends.vllm.live import LiveReports
from pvec.backends.vllm.packing import pack, unpack, unpack_plan
from pvec.backends.vllm.probe import SUMMED, Probe, attach, attach_before
from pvec.backends.vllm.token_rows import RequestMetadata, TokenRowMap
from pvec.backends.vllm.weights import complete_loading
from pvec.models.decoder import block_index

EXTRA = "pvec"
"""The key of pvec's part in ``additional_config`` and in ``SamplingParams.extra_args``."""

_SEAMS = ("_prepare_inputs", "prepare_inputs")
"""Where vLLM's first and second model runner lay out the tokens of a step."""


class ProbeWorker:
    """Mixed into a vLLM worker; every attribute of pvec begins with ``pvec_``."""

    model_runner: Any
    vllm_config: Any

    def load_model(self, **kwargs: Any) -> None:
        """Load the weights, attach the probes and stand in the way of every step."""
        with complete_loading():
            super().load_model(**kwargs)  # type: ignore[misc]
        setup = self.vllm_config.additional_config[EXTRA]
        self.pvec_layers = _local_layers(self.model_runner.get_model(), setup["num_layers"])
        self.pvec_where = torch.zeros(
            2, self._pvec_width(), dtype=torch.int32, device=_device_of(self.pvec_layers)
        )
        self.pvec_probes = _attach_all(
            self.pvec_layers,
            setup,
            where=self.pvec_where,
            dtype=self.vllm_config.model_config.dtype,
        )
        self.pvec_plans: dict[int, str] = {}  # of live requests, by slot
        self.pvec_row_map = TokenRowMap()
        self.pvec_live = LiveReports(self.pvec_row_map, self.pvec_probes.values())
        self.pvec_expected = 0  # tokens that every steering probe should have steered
        self.pvec_runner = _intercept(self.model_runner, self._pvec_lay_out)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Learn the new requests of the step, then run it."""
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            metadata = (params.extra_args or {}).get(EXTRA) if params is not None else None
            if metadata is None:
                continue
            if "plan" in metadata:
                self._pvec_take_plan(metadata["slot"], metadata["plan"], metadata["table"])
                metadata = self.pvec_live.open(request.req_id, metadata)
            self.pvec_row_map.open(request.req_id, RequestMetadata.of(metadata))
        self.pvec_live.close(scheduler_output.finished_req_ids)
        output = super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        return self.pvec_live.add_to(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the tokens of the step, and send along what live requests went through."""
        return self.pvec_live.add_to(super().sample_tokens(*args, **kwargs))  # type: ignore[misc]

    def execute_dummy_batch(self) -> None:
        """Run a step of no requests (data parallel ranks keep step): nobody's tokens."""
        self.pvec_where.zero_()
        super().execute_dummy_batch()  # type: ignore[misc]

    def pvec_describe(self) -> str:
        """Describe this worker, as JSON: its layers, runner, ranks and hidden size."""
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        layer = next(iter(self.pvec_probes.values()))
        return json.dumps(
            {
                "layers": sorted(self.pvec_probes),
                "runner": self.pvec_runner,
                "tp_rank": get_tp_group().rank_in_group,
                "pp_rank": get_pp_group().rank_in_group,
                "hidden_size": layer.sums.shape[1],
                "device": str(self.pvec_where.device),
            }
        )

    def pvec_load(self, slot: int, plan: bytes) -> None:
        """Write a plan into a slot of the tables, clearing what was there."""
        self.pvec_plans.pop(slot, None)
        rows = unpack_plan(plan)
        for layer, probe in self.pvec_probes.items():
            probe.load(slot, rows.get(layer))

    def pvec_watch(self, directions: bytes) -> None:
        """Take the ``directions`` float32 ``[D, H]`` to project on, each at its layer."""
        arrays = unpack(directions)
        for place, (layer, row) in enumerate(
            zip(arrays["layers"], arrays["directions"], strict=True)
        ):
            self.pvec_probes[int(layer)].directions[:, place] = torch.from_numpy(row)

    def pvec_fetch(self, keys: Sequence[int], rows: Sequence[int]) -> bytes | None:
        """Close requests; return their counts and the accumulators ``rows``, then clear these.

        ``counts`` int64 ``[len(keys), 3]`` (cached, high, gaps; -1 for a request never seen);
        ``layers``; ``sums`` float32 ``[layers, rows, H]``; ``stats`` float32 ``[layers, rows, 2]``.
        Ranks that hold a copy of what another rank returns give None.
        """
        from vllm.distributed.parallel_state import get_tp_group

        counts = [self.pvec_row_map.close(key) for key in keys]
        probes = [self.pvec_probes[layer] for layer in sorted(self.pvec_probes)]
        index = torch.tensor(rows, dtype=torch.int64, device=self.pvec_where.device)
        first = get_tp_group().rank_in_group == 0
        sums = [probe.sums[index].cpu().numpy() for probe in probes] if first else []
        stats = [probe.stats[index].cpu().numpy() for probe in probes] if first else []
        for probe in probes if rows else ():
            probe.sums[index] = 0
            probe.stats[index] = 0
        if not first:
            return None
        return pack(
            {
                "counts": np.array(
                    [(a.cached, a.high, a.gaps) if a else (-1, -1, -1) for a in counts],
                    dtype=np.int64,
                ).reshape(-1, 3),
                "layers": np.array(sorted(self.pvec_probes), dtype=np.int64),
                "sums": np.stack(sums),
                "stats": np.stack(stats),
            }
        )

    def pvec_proof(self) -> str:
        """Return as JSON how many tokens were to be steered, and were, by each layer's probe.

        The second number is counted by the probe itself, on the device, inside the graph.
        """
        counted = {
            layer: int(probe.steered) for layer, probe in self.pvec_probes.items() if probe.steers
        }
        return json.dumps({"expected": self.pvec_expected, "counted": counted})

    def _pvec_take_plan(self, slot: int, plan: str, table: bytes) -> None:
        """Write the plan that a live request brings along, unless its slot has it already."""
        if slot and self.pvec_plans.get(slot) != plan:
            self.pvec_load(slot, table)
            self.pvec_plans[slot] = plan

    def _pvec_width(self) -> int:
        """Return the most tokens a step can have, padding included."""
        sizes: list[int] = self.vllm_config.compilation_config.cudagraph_capture_sizes or []
        tokens: int = self.vllm_config.scheduler_config.max_num_batched_tokens
        return max([tokens, *sizes])

    def _pvec_lay_out(self, requests: Sequence[str], first: np.ndarray, counts: np.ndarray) -> None:
        steering, summed = self.pvec_row_map.step(requests, first, counts)
        self.pvec_expected += int((steering > 0).sum())
        staged = torch.zeros(
            self.pvec_where.shape, dtype=torch.int32, pin_memory=self.pvec_where.is_cuda
        )
        staged[0, : len(steering)] = torch.from_numpy(steering)
        staged[SUMMED, : len(summed)] = torch.from_numpy(summed)
        self.pvec_where.copy_(staged, non_blocking=True)
        self.pvec_live.begin(requests, counts)


LayOut = Callable[[Sequence[str], np.ndarray, np.ndarray], None]


def _intercept(runner: Any, lay_out: LayOut) -> str:
    """Call ``lay_out`` for every step of the runner; return which of vLLM's runners it is."""
    if hasattr(runner, "_prepare_inputs") and hasattr(runner, "input_batch"):
        _intercept_v1(runner, lay_out)
        return "V1"
    if hasattr(runner, "prepare_inputs") and hasattr(runner, "req_states"):
        _intercept_v2(runner, lay_out)
        return "V2"
    raise RuntimeError(
        f"pvec does not know the model runner {type(runner).__name__} of this vLLM "
        f"(it has neither of {', '.join(_SEAMS)})"
    )


def _intercept_v1(runner: Any, lay_out: LayOut) -> None:
    prepare = runner._prepare_inputs  # noqa: SLF001

    def prepare_inputs(scheduler_output: Any, num_scheduled_tokens: np.ndarray, *rest: Any) -> Any:
        batch = runner.input_batch
        number = batch.num_reqs
        lay_out(
            batch.req_ids[:number],
            batch.num_computed_tokens_cpu[:number],
            np.asarray(num_scheduled_tokens)[:number],
        )
        return prepare(scheduler_output, num_scheduled_tokens, *rest)

    runner._prepare_inputs = prepare_inputs  # noqa: SLF001


def _intercept_v2(runner: Any, lay_out: LayOut) -> None:
    prepare = runner.prepare_inputs

    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        batch = prepare(*args, **kwargs)
        number = len(batch.req_ids)
        lay_out(
            batch.req_ids,
            np.asarray(batch.num_computed_tokens_np)[:number],
            np.asarray(batch.num_scheduled_tokens)[:number],
        )
        return batch

    runner.prepare_inputs = prepare_inputs


def _local_layers(model: nn.Module, num_layers: int) -> dict[int, nn.Module]:
    """Return this rank's decoder layers by layer number, found by structure."""
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not lists:
        raise RuntimeError(
            f"pvec finds no list of {num_layers} decoder layers in {type(model).__name__}"
        )
    blocks = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    layers = {
        layer: blocks[block_index(layer)]
        for layer in range(1, num_layers + 1)
        if not isinstance(blocks[block_index(layer)], nn.Identity)  # of another pipeline rank
    }
    if not layers:
        raise RuntimeError("pvec finds no decoder layer on this pipeline rank")
    return layers


def _attach_all(
    layers: dict[int, nn.Module], setup: dict[str, Any], *, where: torch.Tensor, dtype: torch.dtype
) -> dict[int, Probe]:
    """Attach a probe to each layer, and one before the first block for layer 0."""

    def probe(*, slots: int, along: torch.Tensor | None = None, watched: bool = False) -> Probe:
        return Probe(
            where=where,
            hidden_size=setup["hidden_size"],
            slots=slots,
            clamps=setup["clamps"] if slots else 0,
            rows=setup["rows"],
            dtype=dtype,
            along=along,
            watched=watched,
        )

    watched = setup["watched"]
    along = None
    if watched is not None:
        along = torch.zeros(where.shape[1], len(watched) + 1, device=where.device)
    probes: dict[int, Probe] = {}
    for layer, module in layers.items():
        probes[layer] = probe(slots=setup["slots"], along=along, watched=layer in (watched or ()))
        attach(module, probes[layer])
    if 1 in layers:
        probes[0] = probe(slots=0)
        attach_before(layers[1], probes[0])
    return probes


def _device_of(layers: dict[int, nn.Module]) -> torch.device:
    return next(p.device for layer in layers.values() for p in layer.parameters())
