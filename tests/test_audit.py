from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest

from tests.job_scripts import REPOSITORY

CLEAN = {"name": "a", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "b", "skip_reason": "not found"}
OPEN = {"name": "c", "version": "2.0", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.1"]}]}


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", REPOSITORY / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_known_vulnerability_fails_unless_it_is_accepted(audit: ModuleType, monkeypatch: pytest.MonkeyPatch):
    text, status = audit.judge({"dependencies": [CLEAN, UNKNOWN, OPEN]})
    assert status == 1
    assert "c 2.0: PYSEC-1, mended in 2.1\nvulnerabilities: 2 of 3 packages audited, 1 open, 0 accepted" in text
    monkeypatch.setattr(audit, "ACCEPTED", {"CVE-1": "we never call it"})
    accepted = "vulnerabilities: 2 of 3 packages audited, 0 open, 1 accepted"
    assert audit.judge({"dependencies": [CLEAN, UNKNOWN, OPEN]}) == (accepted, 0)


@pytest.mark.parametrize("report", [None, {"dependencies": [UNKNOWN]}])
def test_where_no_registry_answers_it_says_so_and_does_not_fail(audit: ModuleType, report: dict[str, Any] | None):
    assert audit.judge(report) == ("vulnerabilities: not audited, no registry answered", 0)
