"""What steering costs in capability: lm-evaluation-harness tasks on the steered model.

An optional extra (``eval``). The harness drives our own loaded model; each of
its forwards and generations runs inside ``pvec.steer``. Its tasks score whole texts, without a
boundary between prompt and answer, so tasks are steered at all positions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pvec.backends.session import require_this_process
from pvec.errors import InputError, install_command
from pvec.settings import Settings
from pvec.types import Instruction, Progress

if TYPE_CHECKING:
    from pvec.backends.base import Backend


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of one task under one condition; ``stderr`` as the harness estimates it."""

    condition: str
    task: str
    metric: str
    score: float
    stderr: float | None
    n: int | None


def check_tasks(tasks: Sequence[str], settings: Settings) -> None:
    """Raise ``InputError`` when tasks are asked for and cannot be run: on workers, or without the
    harness.
    """
    if tasks:
        require_this_process(
            settings,
            "The harness of capability tasks",
            remedy=", or run the tasks by themselves with a command of their own",
        )
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "Capability tasks need lm-evaluation-harness, which is not installed: "
            f"{install_command('eval')}."
        )


def evaluate_tasks(
    backend: Backend,
    tasks: Sequence[str],
    conditions: Mapping[str, Sequence[Instruction]],
    *,
    limit: int | None = None,
    include_path: str | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> tuple[TaskScore, ...]:
    """Run ``tasks`` under each condition (name → instructions) on the backend's loaded model.

    ``limit`` takes the first so many documents of each task; ``include_path`` is a folder of task
    definitions of one's own. Raises ``InputError`` for an unknown task, a task whose data cannot be
    had, and a backend that does not run the model in this process.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    from pvec.backends.hf.backend import HFBackend

    if not isinstance(backend, HFBackend) or backend.model is None:
        raise InputError("Capability tasks need the model in this process: use --backend hf.")
    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"There is no task {unknown[0]!r}: `lm-eval ls tasks` lists what there is."
        )
    scores: list[TaskScore] = []
    for done, (name, steering) in enumerate(conditions.items()):
        on_progress(Progress(stage="tasks", done=done, total=len(conditions), unit="conditions"))
        model = _steered_lm(backend, steering)
        try:
            results = lm_eval.simple_evaluate(
                model=model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0
            )
        except (ConnectionError, FileNotFoundError) as error:
            raise InputError(
                f"The data of the tasks {', '.join(tasks)} cannot be had ({error}): "
                f"connect to the hub once, or leave --tasks away."
            ) from error
        scores += _scores(name, results)
    on_progress(
        Progress(stage="tasks", done=len(conditions), total=len(conditions), unit="conditions")
    )
    return tuple(scores)


def _steered_lm(backend: Any, steering: Sequence[Instruction]) -> Any:
    """Return the harness's model class around ours, every forward of which is steered."""
    from lm_eval.models.huggingface import HFLM

    from pvec.steering.hooks import steer

    everywhere = [replace(instruction, positions="all") for instruction in steering]

    class SteeredLM(HFLM):  # type: ignore[misc]
        """Steers the two places where the harness runs the model."""

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            with _context(self.model):
                return super()._model_call(inps, *args, **kwargs)

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            with _context(self.model):
                return super()._model_generate(context, *args, **kwargs)

    def _context(model: Any) -> Any:
        return steer(model, everywhere) if everywhere else nullcontext()

    return SteeredLM(pretrained=backend.model, tokenizer=backend.tokenizer, batch_size=16)


def _scores(condition: str, results: Mapping[str, Any]) -> list[TaskScore]:
    scores = []
    for task, metrics in results["results"].items():
        counts = results.get("n-samples", {}).get(task, {})
        for key, score in metrics.items():
            metric, _, _variant = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(score, int | float):
                continue
            stderr = metrics.get(key.replace(metric, f"{metric}_stderr", 1))
            scores.append(
                TaskScore(
                    condition=condition,
                    task=task,
                    metric=metric,
                    score=float(score),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    n=counts.get("effective"),
                )
            )
    return scores
