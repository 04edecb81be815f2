"""The notebooks as tests: one kernel a notebook at CMLIB_PROFILE (`ci` by default), the truth in the cells' asserts."""

import os
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch

from cmlib.handin import SEED
from cmlib.profiles import PROFILES

PROFILE = os.environ.get("CMLIB_PROFILE", "ci")
SECONDS = float(os.environ.get("CMLIB_NOTEBOOK_SECONDS", 60 if PROFILE == "ci" else 3600))
ROOT = Path(__file__).resolve().parent.parent
collect_ignore = ["personas"]  # not solved; tests/test_grading.py runs them


def tags(item):
    return item.cell.metadata.get("tags", [])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    if getattr(item.parent, "failed", False):
        pytest.skip("an earlier cell of this notebook failed")
    if "gpu" in tags(item) and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    with mock.patch.dict(os.environ, {"CMLIB_PROFILE": PROFILE, "OMP_NUM_THREADS": threads, "PYTHONPATH": path, SEED: "0"}):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if "budget" in tags(item):
        item.user_properties.append(("budget", True))
    try:
        result = yield
        used = psutil.Process(item.parent.kernel.km.provisioner.pid).cpu_times()  # a busy machine fails no notebook
        if used.user + used.system > SECONDS:
            pytest.fail(f"{item.parent.name} took {used.user + used.system:.0f} s of CPU up to here, allowed are {SECONDS:.0f}")
        return result
    except BaseException:
        item.parent.failed = True
        raise


def pytest_terminal_summary(terminalreporter):
    reports = [r for rs in terminalreporter.stats.values() for r in rs if ".ipynb::" in getattr(r, "nodeid", "")]
    notebooks = sorted({r.nodeid.split("::")[0] for r in reports})
    if notebooks:
        terminalreporter.section(f"notebooks at profile {PROFILE}")
    for name in notebooks:
        mine = [r for r in reports if r.nodeid.startswith(name + "::")]
        terminalreporter.line(f"{name}: {sum(r.duration for r in mine):.1f} s, {len({r.nodeid for r in mine})} code cells")
    spent = sum(r.duration for r in reports if ("budget", True) in r.user_properties) / 60
    if spent:
        terminalreporter.line(
            f"rollouts and student training: {spent:.1f} minutes of the {PROFILES[PROFILE].minutes:g} that {PROFILE} has"
            " for the whole recipe, of which the lessons run a part"
        )
