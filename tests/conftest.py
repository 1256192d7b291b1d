"""What every test of this folder needs before anything else is imported."""

import os

# Triton decides at its first import whether kernels run in its interpreter, on the CPU. Its numpy
# and torch must not both start threads: on two cores they slow each other down tenfold.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
import torch

from tests.aot_client import Worker


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `cuda` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One process that compiles kernels for absent GPUs, with cache folders of its own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEFX_CACHE", str(folder))
        patch.setenv("TRITON_CACHE_DIR", str(folder / "compiled"))
        started = Worker()
        started.__enter__()
    try:
        yield started
    finally:
        started.__exit__(None, None, None)
