"""The prompts of a table for ``screen``, ``monitor`` and ``shift``: bad rows are never silent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pvec.backends.session import ModelSession
from pvec.errors import InputError
from pvec.projection.inputs import open_samples, open_source
from pvec.settings import Settings


def test_rows_that_are_left_out_are_counted_with_the_first_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    user = {"role": "user", "content": "How do I bake bread?"}
    turns = [[user], [user, {"role": "tool", "content": "flour"}], [user], [{"role": "robot"}]]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in turns))
    notes: list[str] = []
    with ModelSession(Settings.model_validate({}), notify=notes.append) as session:
        source = open_source(path, session.settings.project)
        with pytest.raises(InputError, match="2 of 4 rows cannot be used"):
            open_samples(source, session, skip_bad=False)
        assert open_samples(source, session, skip_bad=True).lines == (1, 3)
    (note,) = (note for note in notes if "left out" in note)
    assert note.startswith(f"{path}: 2 rows left out that cannot be used, the first: line 2 has")
