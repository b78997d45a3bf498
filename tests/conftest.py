"""What every test gives back: a training that runs in the process of the tests takes signals and PyTorch's settings."""

import signal
import sys

import pytest

from training.stopping import STOPS


def keep_process_state():
    handlers = {number: signal.getsignal(number) for number in STOPS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if "torch" in sys.modules:
        sys.modules["torch"].use_deterministic_algorithms(False)


# fixtures of a module come before those of a test, so a training in one of them needs its own
keep_state_of_modules = pytest.fixture(scope="module", autouse=True)(keep_process_state)
keep_state_of_tests = pytest.fixture(autouse=True)(keep_process_state)
