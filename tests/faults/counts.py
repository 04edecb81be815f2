"""Faults injected, survived and lost: `tests/conftest.py` prints their sum at the end of a run, in however many processes."""

import contextlib
import os
import random
import time
from collections import Counter

SEED = int(os.environ.get("CMLIB_FAULT_SEED", time.time_ns() % 10**9))
RANDOM = random.Random(SEED)
COUNTS: dict[str, Counter] = {"injected": Counter(), "survived": Counter(), "lost": Counter()}


@contextlib.contextmanager
def fault(kind: str):
    """One fault; survived, unless an error leaves the block. Also a decorator of a test that is one."""
    COUNTS["injected"][kind] += 1
    try:
        yield
    except BaseException:
        COUNTS["lost"][kind] += 1
        print(f"{kind} lost something; CMLIB_FAULT_SEED={SEED} repeats it")
        raise
    COUNTS["survived"][kind] += 1
