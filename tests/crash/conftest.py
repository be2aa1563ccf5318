"""What the plans of kills come from."""

import random

import pytest


@pytest.fixture
def seed(pytestconfig: pytest.Config) -> int:
    asked = pytestconfig.getoption("--crash-seed")
    return random.SystemRandom().randrange(10**6) if asked is None else int(asked)
