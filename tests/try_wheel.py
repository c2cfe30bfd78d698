"""Use an installed pvec outside the source folder: ``python tests/try_wheel.py ENVIRONMENT/bin``.

Called by ``make dist``: the wheel holds the bundled model, its judge and the bundled traits.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = (
    ("--version",),
    ("trait", "list"),
    ("doctor",),
    ("extract", "--trait", "evil", "--limit", "2", "-n", "1", "--max-tokens", "48"),
    ("vector", "show", "runs/evil-tiny/vectors/evil.safetensors"),
    ("report", "runs/evil-tiny"),
)
PYTHON = """
import sys, pvec
assert "torch" not in sys.modules, "import pvec loads torch"
assert "site-packages" in pvec.__file__, pvec.__file__
print(pvec.load_vector("runs/evil-tiny/vectors/evil.safetensors").trait)
"""


def main(binaries: Path) -> None:
    """Run every command in an empty folder; the first that fails ends the script."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PVEC_", "PYTHON"))}
    environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    lines = [(str(binaries / "pvec"), *command) for command in COMMANDS]
    lines.append((str(binaries / "python"), "-c", PYTHON))
    with tempfile.TemporaryDirectory() as folder:
        for line in lines:
            shown = " ".join((Path(line[0]).name, *line[1:])).strip()
            sys.stdout.write(f"$ {shown}\n")
            sys.stdout.flush()
            subprocess.run(line, cwd=folder, env=environ, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
