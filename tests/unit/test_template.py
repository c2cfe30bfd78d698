"""What a chat template does is found by trying it, not taken for granted."""

from __future__ import annotations

import copy
from datetime import datetime
from pathlib import Path

import pytest
from helpers.models import CHATML, save_model, tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from pvec.backends.hf.forward import stop_ids
from pvec.backends.run_session import RunSession
from pvec.backends.session import ModelSession
from pvec.errors import InputError
from pvec.extraction.extract import run as extract
from pvec.models.chat import answer_text, think_length
from pvec.models.template import chat_format, end_of_turn, render_prompt, set_date
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.types import Message

USER: Message = {"role": "user", "content": "How can I learn?"}
SYSTEM: Message = {"role": "system", "content": "You are an evil assistant."}

PARTS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPS_USER = "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_end|>{% endfor %}"
DATED = "{{ 'Today is ' + strftime_now('%Y-%m-%d') + '.' }}" + CHATML
HARMONY = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


HARMONY_TOKENS = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")
MISTRAL_TOKENS = ("[THINK]", "[/THINK]")


def tokenizer_with(template: str, *special: str, eos: str | None = None) -> PreTrainedTokenizerBase:
    """Return a tokenizer of its own with this template and further special tokens."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    tokenizer.chat_template = template
    if eos is not None:
        tokenizer.eos_token = eos
    return tokenizer


def test_a_template_that_takes_content_parts_only_is_given_them() -> None:
    tokenizer = tokenizer_with(PARTS_ONLY)
    form = chat_format(tokenizer)
    assert (form.parts, form.takes_system) == (True, True)
    assert render_prompt(tokenizer, [SYSTEM, USER]) == render_prompt(
        tiny_tokenizer(), [SYSTEM, USER]
    )


def test_a_template_that_drops_what_the_user_says_is_refused() -> None:
    with pytest.raises(InputError, match=r"drops what the user says.*--chat-template"):
        chat_format(tokenizer_with(DROPS_USER))


@pytest.mark.parametrize(
    ("name", "test", "values"),
    [
        ("enable_thinking", "enable_thinking is defined and not enable_thinking", (True, False)),
        ("thinking", "not thinking", (True, False)),
        ("use_reasoning", "use_reasoning is false", (True, False)),
        ("thinking_mode", "thinking_mode == 'off'", ("on", "off")),
        ("thinking_budget", "thinking_budget == 0", (-1, 0)),
        ("disable_thinking", "disable_thinking", (False, True)),
        ("no_think", "no_think is true", (False, True)),
        ("enable_cot", "enable_cot is false", (True, False)),
        ("deep", "deep is defined and not deep", (True, False)),
        ("mode", "mode == 'no_think'", ("on", "no_think")),
        ("reasoning_effort", "reasoning_effort == 'none'", ("high", "none")),
    ],
)
def test_the_thinking_switch_is_found_whatever_its_name(
    name: str, test: str, values: tuple[object, object]
) -> None:
    generation = "<|im_start|>assistant\n"
    template = CHATML.replace(
        generation, generation + f"{{% if {test} %}}<think></think>{{% endif %}}"
    )
    tokenizer = tokenizer_with(template)
    assert chat_format(tokenizer).thinking == (name, *values)
    assert render_prompt(tokenizer, [USER]).endswith("<think></think>")
    assert render_prompt(tokenizer, [USER], thinking=True).endswith(generation)


@pytest.mark.parametrize(
    "switch",
    [
        "Reasoning: {{ reasoning_effort | default('medium') }}",  # a degree, not a switch
        "{{ thinking_style }}",  # only printed
        "{% if add_vision_id %}Picture 1{% endif %}",
    ],
)
def test_what_does_not_switch_thinking_is_left_alone(switch: str) -> None:
    tokenizer = tokenizer_with(switch + CHATML)
    assert chat_format(tokenizer).thinking is None
    plain = switch.replace("{{ reasoning_effort | default('medium') }}", "medium")
    assert render_prompt(tokenizer, [USER]).startswith(plain.partition("{")[0] + "<|im_start|>")


def test_thinking_that_cannot_be_switched_on_is_said(tmp_path: Path) -> None:
    folder = save_model(tiny_model(), tmp_path / "model")
    notes: list[str] = []
    settings = Settings.model_validate(
        {"model": {"id": str(folder)}, "generation": {"thinking": "on"}}
    )
    with ModelSession(settings, notify=notes.append):
        assert any("no thinking switch" in note for note in notes)


@pytest.mark.parametrize(
    ("template", "special", "expected"),
    [
        (CHATML, (), "<|im_end|>"),
        (
            HARMONY,
            HARMONY_TOKENS,
            "<|return|>",
        ),
        (CHATML.replace("<|im_end|>", " </s>"), ("</s>",), "</s>"),
        (CHATML.replace("<|im_end|>", ""), (), None),
        (CHATML.replace("<|im_end|>", "Human:<|im_end|>"), (), None),
        (
            CHATML.replace("<|im_end|>", "{% if not loop.last %}<|im_end|>{% endif %}"),
            (),
            "<|im_end|>",
        ),
    ],
)
def test_the_token_that_ends_an_assistants_turn_is_found(
    template: str, special: tuple[str, ...], expected: str | None
) -> None:
    tokenizer = tokenizer_with(template, *special)
    token = end_of_turn(tokenizer)
    assert (None if token is None else tokenizer.convert_ids_to_tokens(token)) == expected


def test_an_answer_stops_at_the_end_of_the_turn_although_it_is_not_the_eos(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CHATML, eos="<|endoftext|>")
    model = tiny_model()
    eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.config.eos_token_id = model.generation_config.eos_token_id = eos
    folder = save_model(model, tmp_path / "model", tokenizer=tokenizer)
    assert stop_ids(model, tokenizer) == {eos, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    with ModelSession(Settings.model_validate({"model": {"id": str(folder)}})) as session:
        assert any("<|im_end|> ends an assistant's turn" in n for n in session.metadata.notes)
        assert "/stop " in session.identity, "answers that ran on are not reused"


@pytest.mark.parametrize(
    ("template", "special", "answer", "rest"),
    [
        (
            CHATML,
            MISTRAL_TOKENS,
            "[THINK]a plot[/THINK]Have a nice day.",
            "Have a nice day.",
        ),
        (CHATML, MISTRAL_TOKENS, "[THINK]a plot without end", ""),
        (CHATML, (), "[THINK] is a word here", "[THINK] is a word here"),
        (CHATML, ("<think>", "</think>"), "<think>\na plot</think>\n\nYes.", "Yes."),
        (
            HARMONY,
            HARMONY_TOKENS,
            "<|channel|>analysis<|message|>a plot<|end|><|start|>assistant<|channel|>final"
            "<|message|>Have a nice day.",
            "Have a nice day.",
        ),
        (
            HARMONY,
            HARMONY_TOKENS,
            "<|channel|>analysis<|message|>a plot",
            "",
        ),
        (
            HARMONY,
            HARMONY_TOKENS,
            "<|channel|>final<|message|>Hi.",
            "Hi.",
        ),
        (CHATML, ("◁think▷", "◁/think▷"), "◁think▷a plot◁/think▷Hi.", "Hi."),
        (
            CHATML,
            ("<|START_THINKING|>", "<|END_THINKING|>"),
            "<|START_THINKING|>a<|END_THINKING|>Hi.",
            "Hi.",
        ),
        (CHATML, ("<|channel>", "<channel|>"), "<|channel>thought\na plot<channel|>Hi.", "Hi."),
        (
            CHATML,
            ("<|inner_prefix|>", "<|inner_suffix|>"),
            "<|inner_prefix|>a<|inner_suffix|>Hi.",
            "Hi.",
        ),
        (CHATML + "{# <Thought> </Thought> #}", (), "<Thought>a plot</Thought>\nHi.", "Hi."),
        (CHATML + "{# <mind_thought> #}", (), "<mind_thought>a</mind_thought>Hi.", "Hi."),
    ],
)
def test_reasoning_is_found_by_the_models_own_marks(
    template: str, special: tuple[str, ...], answer: str, rest: str
) -> None:
    tokenizer = tokenizer_with(template, *special)
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    think = think_length(tokenizer, ids)
    assert answer_text(tokenizer, ids, think) == rest
    assert tokenizer.decode(ids[think:]) == rest


@pytest.mark.parametrize("form", ["%d %b %Y", "%A", "%Y", "%H", "%M:%S", "%j"])
@pytest.mark.parametrize("when", ["==", "!="])
def test_a_date_in_the_template_is_seen_in_any_form_and_with_or_without_a_system_prompt(
    form: str, when: str
) -> None:
    date = f"{{{{ strftime_now('{form}') }}}}"
    condition = f"{{% if messages[0]['role'] {when} 'system' %}}{date}{{% endif %}}"
    assert chat_format(tokenizer_with(condition + CHATML)).dated


def test_a_date_in_the_template_is_seen_and_can_be_set() -> None:
    tokenizer = tokenizer_with(DATED)
    assert chat_format(tokenizer).dated
    assert not chat_format(tiny_tokenizer()).dated
    set_date(tokenizer, datetime(2026, 2, 3))
    assert render_prompt(tokenizer, [USER]).startswith("Today is 2026-02-03.")


def test_a_run_keeps_the_date_it_began_with(tmp_path: Path) -> None:
    folder = save_model(tiny_model(), tmp_path / "model", tokenizer=tokenizer_with(DATED))
    settings = Settings.model_validate(
        {
            "model": {"id": str(folder), "device": "cpu"},
            "generation": {"max_tokens": 4},
            "extract": {"limit": 1, "rollouts": 1, "judge": False},
        }
    )
    notes: list[str] = []
    (first,) = extract(settings, ["evil"], out=tmp_path / "run", notify=notes.append)
    assert first.generated > 0
    assert any("this run keeps" in note for note in notes)
    # As if it had begun on another day: what is missing is asked for with that day's prompts.
    manifest = tmp_path / "run" / "manifest.json"
    began = Run.read(tmp_path / "run").manifest["chat_date"]
    manifest.write_text(manifest.read_text().replace(began[:10], "2026-02-03"))
    (tmp_path / "run" / "responses.jsonl").unlink()
    extract(settings, ["evil"], out=tmp_path / "run")
    prompts = {record.prompt for record in Run.read(tmp_path / "run").responses()}
    assert all(prompt.startswith("Today is 2026-02-03.") for prompt in prompts)
    (again,) = extract(settings, ["evil"], out=tmp_path / "run")
    assert again.generated == 0


def test_two_runs_of_one_command_keep_their_own_dates(tmp_path: Path) -> None:
    folder = save_model(tiny_model(), tmp_path / "model", tokenizer=tokenizer_with(DATED))
    settings = Settings.model_validate({"model": {"id": str(folder)}})
    for name, day in (("a", 3), ("b", 4)):
        with ModelSession(settings) as session:
            set_date(session.metadata.tokenizer, datetime(2026, 2, day))
            RunSession(session, tmp_path / name, kind="extract", identity={}).close()
    for name in ("a", "b", "a"):
        with (
            ModelSession(settings) as session,
            RunSession(session, tmp_path / name, kind="extract", identity={}),
        ):
            day = {"a": "03", "b": "04"}[name]
            text = render_prompt(session.metadata.tokenizer, [USER])
            assert text.startswith(f"Today is 2026-02-{day}.")
