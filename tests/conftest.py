"""Prints what `tests/faults` counted. The main process of pytest-xdist reads this conftest, and not the one in that folder."""

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter):
    known = [r for some in terminalreporter.stats.values() for r in some if isinstance(r, pytest.TestReport)]
    reports = [r for r in known if r.nodeid.startswith("tests/faults")]
    total = {name: Counter() for name in ("injected", "survived", "lost")}
    for report in reports:
        if report.when == "teardown":
            for name, counts in dict(report.user_properties).get("faults", {}).items():
                total[name].update(counts)
    if not total["injected"]:
        return
    seconds = sum(report.duration for report in reports)
    said = ", ".join(f"{counter.total()} {name}" for name, counter in total.items())
    terminalreporter.write_line(f"faults: {said}, in {seconds:.0f} s of tests")
    for kind, n in sorted(total["injected"].items()):
        line = f"  {kind:40} {n:3} injected {total['survived'][kind]:3} survived {total['lost'][kind]:3} lost"
        terminalreporter.write_line(line)
