"""Chat templates shaped like those of well-known families, and what an assistant says in each.

Written for these tests. ``SAYS[name](texts)`` is the text that must carry loss for conversations
whose assistant turns are ``texts``, turn by turn: worked out by hand, not by rendering.
"""

from __future__ import annotations

import copy

from transformers import PreTrainedTokenizerBase

from helpers.models import CHATML, tiny_tokenizer

LLAMA3 = (
    "{{ '<|begin|>' }}{% for m in messages %}"
    "{{ '<|header|>' + m['role'] + '<|end_header|>\\n\\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>\\n\\n' }}{% endif %}"
)

QWEN2 = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# thinking is shown in the last turn only, and an empty thought is written when it is off
QWEN3 = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% set said = parts[-1].lstrip('\\n') %}"
    "{% set thought = (parts[0].split('<think>')[-1].strip('\\n')) if parts | length > 1 else '' %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ said + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)

GEMMA = (
    "{{ '<bos>' }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

# no generation prompt at all: the answer begins with a blank right after the instruction's end
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
    "{% endfor %}"
)

BUNDLED_LIKE = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' -}}"
    "{%- if m['role'] == 'assistant' -%}"
    "{%- generation -%}{{- m['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- m['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

TEMPLATES = {
    "llama3": LLAMA3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "chatml": CHATML,
    "bundled": BUNDLED_LIKE,
}

SAYS = {
    "llama3": lambda texts: [t.strip() + "<|eot|>" for t in texts],
    "qwen2": lambda texts: [t + "<|im_end|>" for t in texts],
    "qwen3": lambda texts: [t + "<|im_end|>" for t in texts],
    "gemma": lambda texts: [t.strip() + "<end_of_turn>" for t in texts],
    "mistral": lambda texts: [" " + t + "</s>" for t in texts],
    "chatml": lambda texts: [t + "<|im_end|>" for t in texts],
    "bundled": lambda texts: [t + "<|im_end|>" for t in texts],
}

_SPECIAL = (
    "<|begin|>",
    "<|header|>",
    "<|end_header|>",
    "<|eot|>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<|im_start|>",
    "<|im_end|>",
)


def templated_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tiny tokenizer with a family's template and special tokens."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL)})
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer
