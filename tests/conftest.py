"""What every test gives back: signals and PyTorch's settings, which a training in the process of the tests takes, and
the environment, in which a dask cluster leaves MKL_NUM_THREADS=1 for the processes of later tests."""

import os
import shutil
import signal
import sys
from unittest.mock import patch

import pytest

from training.stopping import STOPS


def keep_process_state():
    handlers = {number: signal.getsignal(number) for number in STOPS}
    with patch.dict(os.environ):
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if "torch" in sys.modules:
        sys.modules["torch"].use_deterministic_algorithms(False)


# fixtures of a module come before those of a test, so a training in one of them needs its own
keep_state_of_modules = pytest.fixture(scope="module", autouse=True)(keep_process_state)
keep_state_of_tests = pytest.fixture(autouse=True)(keep_process_state)


@pytest.fixture(scope="module", autouse=True)
def remove_files_of_module(request, tmp_path_factory):
    """Datasets and runs of one file of tests go before the next one's come, unless a test failed: pytest keeps the
    files of three sessions, and tmp may be small."""
    yield
    if not request.session.testsfailed:
        for path in tmp_path_factory.getbasetemp().iterdir():
            shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config that trains for a few steps on a hand-made preprocessed dataset; a module may have its own."""
    from derived_root import write_root
    from tiny_run import write_config  # loads PyTorch, which not all tests need

    folder = tmp_path_factory.mktemp("set")
    write_root(folder / "root")
    return write_config(folder / "tiny.yaml", folder / "root")
