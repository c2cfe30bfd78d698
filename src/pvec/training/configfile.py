"""Reading a training configuration: YAML or JSON, ours or the reference's, every error at once.

The paper's own code has flat JSON files; their keys are put in place here, and the user is told
which ones have no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pvec.documents import parse_yaml, read_yaml
from pvec.errors import InputError, did_you_mean
from pvec.settings.resolve import nest
from pvec.training.config import TrainConfig

_TELLING = frozenset(
    ("training_file", "per_device_train_batch_size", "enable_steering_during_training", "is_peft")
)

_PLACES = {
    "model": "model.id",
    "training_file": "data.train",
    "max_seq_length": "data.max_tokens",
    "target_modules": "lora.targets",
    "lora_bias": "lora.bias",
    "r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_rslora": "lora.rslora",
    "per_device_train_batch_size": "batch.micro",
    "epochs": "optim.epochs",
    "max_steps": "optim.max_steps",
    "warmup_steps": "optim.warmup_steps",
    "learning_rate": "optim.lr",
    "optim": "optim.name",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.max_grad_norm",
    "lr_scheduler_type": "optim.schedule",
    "logging_steps": "output.log_every",
    "save_steps": "output.save_every",
    "save_total_limit": "output.keep",
    "output_dir": "output.folder",
    "merge_before_push": "output.merge",
    "eval_steps": "data.eval_every",
    "gradient_checkpointing": "memory.gradient_checkpointing",
    "trust_remote_code": "model.trust_remote_code",
    "attn_implementation": "model.attention",
    "seed": "seed",
}
"""Key → our dotted path, where the value means the same."""

_READ_APART = frozenset(
    (
        "test_file",
        "load_in_4bit",
        "load_in_8bit",
        "save_strategy",
        "eval_strategy",
        "evaluation_strategy",
        "report_to",
        "loss",
        "is_peft",
        "gradient_accumulation_steps",
        "train_on_responses_only",
        "enable_steering_during_training",
        "steering_config",
    )
)

_NO_EFFECT = {
    "beta": "it belongs to preference losses",
    **dict.fromkeys(
        (
            "push_to_private",
            "push_to_hub",
            "finetuned_model_id",
            "hub_model_id",
            "hub_private_repo",
        ),
        "pvec pushes nothing to the hub",
    ),
    **dict.fromkeys(
        ("per_device_eval_batch_size", "packing", "group_by_length", "dataloader_num_workers"),
        "pvec chooses its forward passes by length, which changes only the speed",
    ),
    **dict.fromkeys(("bf16", "fp16", "tf32"), "model.dtype sets the number format"),
    **dict.fromkeys(
        ("logging_dir", "logging_strategy", "logging_first_step", "run_name", "disable_tqdm"),
        "pvec logs into the run folder",
    ),
    "warmup_ratio": "give warmup_steps",
    "load_best_model_at_end": "the adapter is that of the last step",
    "metric_for_best_model": "the adapter is that of the last step",
    "overwrite_output_dir": "a finished folder is kept, an unfinished training is resumed",
    "remove_unused_columns": "only the conversations are read",
}

_KEYS = frozenset(_PLACES) | _READ_APART | frozenset(_NO_EFFECT)
"""Every key that such a file may have."""

_OPTIMISERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw"}

_HELD_OUT = 0.1
"""The share of rows that the paper's code sets aside when no test file is given."""


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A valid configuration, and what the user should know of how it was read."""

    config: TrainConfig
    notes: tuple[str, ...] = ()


def load_config(path: Path, *, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read ``path`` and apply ``KEY=VALUE`` overrides (``lora.r=16``, ``steering.0.coef=3``).

    Raises ``InputError`` naming everything that is wrong, each with its path in the file.
    """
    tree = read_yaml(path)
    if not isinstance(tree, Mapping):
        raise InputError(f"{path} must hold sections such as `data:`, not a bare value or nothing.")
    notes: list[str] = []
    nested: dict[str, Any] = dict(tree)
    reference = bool(_TELLING & tree.keys())
    if reference:
        _refuse_unusable(path, tree)
        nested, notes = _from_reference(tree)
    if isinstance(nested.get("model"), str):
        nested["model"] = {"id": nested["model"]}
    for override in overrides:
        _apply(nested, override)
    try:
        config = TrainConfig.model_validate(nested)
    except ValidationError as error:
        known = _KEYS if reference else ()
        raise InputError(_sentence(path, error, known=tuple(known))) from None
    return LoadedConfig(config=config, notes=tuple(notes))


def _refuse_unusable(path: Path, tree: Mapping[str, Any]) -> None:
    wrong = [
        f"{key}: expected a number, not {tree[key]!r}"
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
        if key in tree and not (isinstance(tree[key], int) and tree[key] >= 1)
    ]
    if not isinstance(tree.get("steering_config") or {}, Mapping):
        wrong.append("steering_config: expected a mapping")
    if tree.get("loss", "sft") != "sft":
        wrong.append(f"loss: {tree['loss']!r} is not supported; only sft is")
    if wrong:
        raise InputError(f"{path}: {'; '.join(wrong)}.")


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one dotted path; a number in it is a place in a list."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise InputError(f"--set takes KEY=VALUE (such as lora.r=16), not {override!r}.")
    *sections, name = path.split(".")
    branch: Any = tree
    for section in sections:
        branch = _child(branch, section, override)
    branch[_key(branch, name, override)] = parse_yaml(text, where=f"--set {path}")


def _child(branch: Any, name: str, override: str) -> Any:
    key = _key(branch, name, override)
    if isinstance(branch, dict) and branch.get(key) is None:
        branch[key] = {}
    child = branch[key]
    if not isinstance(child, dict | list):
        raise InputError(f"--set {override}: {name} is a value, not a section.")
    return child


def _key(branch: dict[str, Any] | list[Any], name: str, override: str) -> Any:
    """Return what ``name`` is in a section, or the place that it is in a list."""
    if isinstance(branch, dict):
        return name
    if not name.isdigit() or int(name) >= len(branch):
        raise InputError(
            f"--set {override}: {name!r} is not a position in a list of {len(branch)}; the first "
            f"is 0."
        )
    return int(name)


def _sentence(path: Path, error: ValidationError, *, known: tuple[str, ...]) -> str:
    """Return everything that is wrong, each with its path in the file."""
    parts: dict[str, None] = {}
    for item in error.errors(include_url=False):
        where = ".".join(str(step) for step in item["loc"] if not _is_branch_name(step))
        if item["type"] == "extra_forbidden":
            names = (*_names_at(item["loc"][:-1]), *(known if len(item["loc"]) == 1 else ()))
            hint = did_you_mean(str(item["loc"][-1]), names).strip()
            parts[f"{where}: unknown key{hint and f' ({hint})'}"] = None
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = "" if item["type"] in ("missing", "value_error") else f" (it is {_short(item)})"
            parts[f"{where or 'the whole'}: {message[0].lower()}{message[1:]}{value}"] = None
    return f"{path}: {'; '.join(parts)}."


def _is_branch_name(step: int | str) -> bool:
    """Whether a step of pydantic's path names an alternative of a union, not a key."""
    return isinstance(step, str) and any(mark in step for mark in ("[", "literal", "function-"))


def _short(item: Any) -> str:
    text = repr(item["input"])
    return text if len(text) <= 60 else f"{text[:60]}…"


def _names_at(place: Sequence[int | str]) -> tuple[str, ...]:
    """Return the keys that the configuration has at a place."""
    model: type[BaseModel] = TrainConfig
    for step in place:
        if isinstance(step, str) and step in model.model_fields:
            model = _part_of(model.model_fields[step].annotation) or model
    return tuple(model.model_fields)


def _part_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        part = _part_of(argument)
        if part is not None:
            return part
    return None


# ── the reference's keys ────────────────────────────────────────────────────────────────────────


def _from_reference(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration in our keys, nested, and notes about what was understood how.

    Unknown keys are passed on, so that they are refused like any other.
    """
    notes = [f"{key} has no effect here: {why}" for key, why in _NO_EFFECT.items() if key in tree]
    flat = {
        place: tree[key] for key, place in _PLACES.items() if key in tree and tree[key] is not None
    }
    flat["optim.name"] = _OPTIMISERS.get(tree.get("optim", "adamw"), tree.get("optim", "adamw"))
    if flat.get("lora.bias") is None:
        flat["lora.bias"] = "none"
    micro = tree.get("per_device_train_batch_size", 2)
    flat["batch.size"] = micro * tree.get("gradient_accumulation_steps", 8)
    flat.pop("batch.micro", None)
    notes.append(
        f"batches: {flat['batch.size']} rows a step as there (per device), in forward passes of "
        f"pvec's choice, which changes only the speed"
    )
    for bits in ("4bit", "8bit"):
        if tree.get(f"load_in_{bits}"):
            flat["model.quantize"] = bits
    _intervals(tree, flat, notes)
    if tree.get("report_to") not in (None, [], "none", ["none"], "all", ["all"]):
        flat["output.report_to"] = tree["report_to"]
    if not tree.get("train_on_responses_only", False):
        flat["data.loss_on"] = "all"
    _held_out(tree, flat, notes)
    if tree.get("is_peft") is False:
        notes.append("is_peft false is read as true: pvec trains adapters")
    nested = nest(flat)
    if tree.get("enable_steering_during_training"):
        nested["steering"] = [_steering(tree.get("steering_config") or {})]
    elif tree.get("steering_config"):
        notes.append("steering_config has no effect here: enable_steering_during_training is off")
    nested.update({key: value for key, value in tree.items() if key not in _KEYS})
    return nested, notes


def _intervals(tree: Mapping[str, Any], flat: dict[str, Any], notes: list[str]) -> None:
    """Take when to save and to evaluate: by steps, or at the end of each epoch as by default."""
    names = ("save_strategy", "evaluation_strategy", "eval_strategy")
    for name, every in zip(names, ("output.save_every", *["data.eval_every"] * 2), strict=True):
        if tree.get(name) not in (None, "steps"):
            flat.pop(every, None)
        if tree.get(name) not in (None, "steps", "epoch"):
            notes.append(f"{name} {tree[name]} has no effect here: it is done after each epoch")


def _held_out(tree: Mapping[str, Any], flat: dict[str, Any], notes: list[str]) -> None:
    if tree.get("test_file"):
        flat["data.eval"] = tree["test_file"]
        return
    flat["data.eval_fraction"] = _HELD_OUT
    notes.append(
        f"no test_file: a share of {_HELD_OUT:g} of the rows is held out as there, and evaluated"
    )


def _steering(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the steering part; keys it does not know are passed on to be refused."""
    names = {
        "steering_vector_path": "vector",
        "type": "operator",
        "steering_coef": "coef",
        "layers": "layers",
    }
    part = {names.get(key, key): value for key, value in config.items() if value is not None}
    operator = part.get("operator", "steer")
    part["operator"] = {"steer": "add", "ablate": "ablate"}.get(operator, operator)
    if part["operator"] == "ablate":
        part.pop("coef", None)
    return part
