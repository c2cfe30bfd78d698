"""Starts vLLM's engine and its server's application with pvec's part in both."""

from __future__ import annotations

import asyncio
import os
import queue
import shlex
import signal
import warnings
from argparse import Namespace
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib.util import find_spec
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI

from pvec.backends.session import ModelSession
from pvec.backends.vllm.client import EngineClient
from pvec.backends.vllm.engine import describe_workers
from pvec.backends.vllm.packing import pack
from pvec.backends.vllm.requests import RequestBuilder
from pvec.backends.vllm.selftest import prove
from pvec.backends.vllm.start import (
    INSTALL,
    check_vllm,
    engine_arguments,
    platform,
    refuse,
    stop_ids,
    why_not,
)
from pvec.backends.vllm.weights import check_served_adapter
from pvec.errors import InputError, ModelError
from pvec.models.precision import choose_dtype
from pvec.models.template import chat_format
from pvec.models.weights import check_checkpoint
from pvec.serve.rules import Rules
from pvec.serve.service import AnswerLog
from pvec.settings.sections import VLLMSettings
from pvec.types import ModelInfo

_SELF_TEST_SECONDS = 600


def check_served_by_vllm(options: VLLMSettings, rules: Rules) -> None:
    """Raise ``InputError`` for what pvec's server on vLLM does not do."""
    if rules.plan(None).alarms:
        raise InputError(
            "A policy with an alarm needs --backend hf: leave 'alarm' out, which caps always."
        )
    several = ("data_parallel_size", "pipeline_parallel_size")
    for name in [name for name in several if getattr(options, name) > 1]:
        raise InputError(f"pvec serve runs one engine: leave backend.vllm.{name} at 1.")
    if options.async_scheduling:
        raise InputError(
            "pvec serve measures every token: leave backend.vllm.async_scheduling off."
        )


@asynccontextmanager
async def vllm_service(
    session: ModelSession, rules: Rules, *, log: AnswerLog | None
) -> AsyncIterator[tuple[Any, FastAPI]]:
    """Start the engine, prove that it steers, and give the service and its application."""
    # vLLM's own messages are of interest where something fails, as in the other commands
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    version = check_vllm()
    if find_spec("vllm.entrypoints.launchers") is None:
        raise InputError(
            f"pvec serve works with the server of vLLM 0.32, and this is {version}: {INSTALL}, or "
            f"use --backend hf."
        )
    metadata, spec = session.metadata, session.spec
    check_checkpoint(metadata.files.folder, name=spec.model, pickle=spec.allow_pickle)
    options = _options(session, rules)
    if metadata.adapter is not None:
        check_served_adapter(metadata.files.folder, Path(metadata.adapter))
    dtype, why = choose_dtype(spec.dtype, platform())
    info = metadata.info(dtype=dtype, device=platform())
    session.notify(f"starting {metadata.id} on vLLM {version} ({info.dtype}: {why})")
    directions = [vector.direction for vector in rules.vectors.values()]
    arguments = engine_arguments(
        metadata, options, dtype=info.dtype, trust_code=spec.trust_remote_code,
        watched=[layer for layer, _ in directions],
    )  # fmt: skip
    args = server_arguments(
        session.settings.serve.vllm_args,
        arguments | {"skip_tokenizer_init": False, "disable_log_stats": False},
    )
    for module in args.lora_modules or ():
        check_served_adapter(metadata.files.folder, Path(module.path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own, about what it uses itself
        llm = _start(metadata.id, args)
        try:
            await _prove(llm, info, options, directions)
            builder = RequestBuilder(
                info=info,
                options=options,
                tokenizer=metadata.tokenizer,
                context=llm.model_config.max_model_len,
                vocab=llm.model_config.get_vocab_size(),
                stop_ids=sorted(stop_ids(metadata)),
            )
            from pvec.serve.vllm.app import make_vllm_app
            from pvec.serve.vllm.service import VLLMService

            with VLLMService(session, rules, llm, builder, log=log) as service:
                inner = await _application(llm, args, session, service.name)
                async with inner.router.lifespan_context(inner):
                    yield service, make_vllm_app(service, inner)
        finally:
            llm.shutdown()


def server_arguments(text: str, ours: dict[str, Any]) -> Namespace:
    """Return the arguments of vLLM's server: those in ``text``, and ``ours`` for the engine.

    Raises ``InputError`` for an argument that vLLM does not know, or that pvec has a setting for.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            why = " ".join(message.split())[:300]
            raise InputError(f"--vllm-args: vLLM's server refuses them ({why}): correct them.")

    parser = make_arg_parser(Parser())
    args: Namespace = parser.parse_args(shlex.split(text))
    ours = ours | {"host": None, "port": 0, "api_key": None, "served_model_name": None}
    for key in ours:
        if getattr(args, key) != parser.get_default(key):
            raise InputError(
                f"--vllm-args has --{key.replace('_', '-')}, which pvec sets: use its own "
                f"option or setting (--host, --port, --api-key, --served-model-name, --model, "
                f"--dtype, backend.vllm.{key})."
            )
    vars(args).update(ours, disable_fastapi_docs=True)
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise InputError(f"--vllm-args: {error}") from None
    return args


def _options(session: ModelSession, rules: Rules) -> VLLMSettings:
    """Return the engine's settings with room for what the rules always cap."""
    options = session.settings.backend.vllm
    check_served_by_vllm(options, rules)
    changed = {"clamps": options.clamps + len(rules.policies), "captures": 4}
    if session.metadata.adapter is not None:
        changed["max_loras"] = max(options.max_loras, 1)
    return options.model_copy(update=changed)


def _start(model: str, args: Namespace) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    from pvec.serve.vllm.engine import SteeredLLM

    try:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        refuse(config)
        with _uninterrupted_children():
            return SteeredLLM.from_vllm_config(config)
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ModelError(why_not(model, error)) from error


@contextmanager
def _uninterrupted_children() -> Iterator[None]:
    """Start processes that Ctrl-C, which reaches all of a terminal, does not end.

    Answers under way are finished after it; this process stops the others at the end.
    """
    resource_tracker.ensure_running()  # it would lift the block as it starts
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


async def _application(llm: Any, args: Namespace, session: ModelSession, name: str) -> FastAPI:
    """Return vLLM's own application, which knows the model by ``name`` only."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    args.model, args.served_model_name = name, [name]
    args.chat_template = args.chat_template or session.spec.chat_template
    if session.metadata.thinking_switch:
        form = chat_format(session.metadata.tokenizer)
        assert form.thinking is not None
        switch, on, off = form.thinking
        given = args.default_chat_template_kwargs or {}
        args.default_chat_template_kwargs = {switch: on if session.thinking else off} | given
    tasks = await llm.get_supported_tasks()
    app: FastAPI = build_app(args, tasks, llm.model_config)
    await init_app_state(llm, app.state, args, tasks)
    return app


async def _prove(
    llm: Any,
    info: ModelInfo,
    options: VLLMSettings,
    directions: Sequence[tuple[int, np.ndarray]],
) -> None:
    """Check the workers, give them the directions, and prove that steering holds."""
    describe_workers(await llm.collective_rpc("pvec_describe"), num_layers=info.num_layers)
    arrays: dict[str, np.ndarray] = {
        "layers": np.array([layer for layer, _ in directions], dtype=np.int64),
        "directions": np.array([row for _, row in directions], dtype=np.float32),
    }
    await llm.collective_rpc("pvec_watch", args=(pack(arrays),))
    client = EngineClient(
        _Blocking(llm, asyncio.get_running_loop()),
        options,
        window=options.max_num_seqs,
    )
    vocab = llm.model_config.get_vocab_size()
    await asyncio.to_thread(prove, client, info, vocab=vocab, clamps=options.clamps)


class _Blocking:
    """The engine as ``EngineClient`` drives it, for another thread than that of its loop."""

    def __init__(self, llm: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._llm, self._loop = llm, loop
        self._outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def add_request(self, identity: str, prompt: Any, params: Any, **options: Any) -> None:
        async def run() -> None:
            try:
                async for output in self._llm.generate(prompt, params, identity, **options):
                    self._outputs.put(output)
            except Exception as error:
                self._outputs.put(error)
                raise

        asyncio.run_coroutine_threadsafe(run(), self._loop)

    def step(self) -> list[Any]:
        output = self._outputs.get(timeout=_SELF_TEST_SECONDS)
        if isinstance(output, Exception):
            raise output
        return [output]

    def abort_request(self, identities: Sequence[str]) -> None:
        self._wait(self._llm.abort(identities))

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> Any:
        return self._wait(self._llm.collective_rpc(method, args=args))

    def _wait(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(_SELF_TEST_SECONDS)
