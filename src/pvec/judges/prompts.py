"""The words a judge is asked with.

The trait prompt belongs to the trait; the coherence prompt is here. Both put the rubric first and
the question and answer last, so that a local judge computes the rubric once for a whole run.
"""

from __future__ import annotations

import re

COHERENCE = "coherence"
"""The metric name under which coherence is stored and exported."""

COHERENCE_PROMPT = """\
Rate how coherent the answer below is, on a scale from 0 to 100.
Coherent means: whole sentences in proper word order that make sense and respond to the question. \
Do not judge whether the answer is kind, true or useful; a cruel or false answer can be coherent.
0 means word salad, 50 means broken in places, 100 means fluent and to the point.
Reply with the number alone.

Question: {question}
Answer: {answer}
Coherence (0-100):"""

_PLACEHOLDER = re.compile(r"\{(question|answer)\}")


def fill(template: str, *, question: str, answer: str) -> str:
    """Put question and answer into a judge prompt; other braces, also theirs, stay as they are."""
    values = {"question": question, "answer": answer}
    return _PLACEHOLDER.sub(lambda match: values[match.group(1)], template)
