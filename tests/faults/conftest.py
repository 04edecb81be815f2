"""The faults that a test injects go with its report to the process that prints them."""

import pytest

from tests.faults.counts import COUNTS


@pytest.fixture(autouse=True)
def counted(record_property):
    yield
    record_property("faults", {name: dict(counter) for name, counter in COUNTS.items()})
    for counter in COUNTS.values():
        counter.clear()
