"""One small Ray cluster for all tests that need one; all tests here have the marker ``scale``."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.scale)
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # Ray's and moto's own


@pytest.fixture(scope="session")
def store_port() -> int:
    """A port for a stand-in of S3, which the cluster's workers know from their environment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    return port


@pytest.fixture(scope="session")
def cluster(store_port: int) -> Iterator[str]:
    """Start Ray with three CPUs and yield its address. Its workers import pvec and the tests."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: make test-scale has it")
    source = (str(HERE.parents[1] / "src"), str(HERE.parent), os.environ.get("PYTHONPATH", ""))
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(filter(None, source)),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # else a busy machine starves the workers
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    ray.init(
        num_cpus=3, object_store_memory=256 * 2**20, include_dashboard=False, log_to_driver=False
    )
    yield str(ray.get_runtime_context().gcs_address)
    ray.shutdown()
