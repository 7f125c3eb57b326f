"""Known vulnerabilities of what requirements.txt pins: fails on any that is not accepted below with a reason.

Where no registry answers, nothing is known: it says so, and does not fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ACCEPTED: dict[str, str] = {}
"""Id of a vulnerability -> why it does no harm here."""

_SECONDS = 50
_ROOT = Path(__file__).parents[1]


def ask() -> dict[str, Any] | None:
    """What pip-audit has to say, or None if it got no answer."""
    command = [str(Path(sys.executable).with_name("pip-audit")), "--requirement", str(_ROOT / "requirements.txt")]
    # What is pinned with hashes is read as it stands: pip need not resolve it.
    command += ["--require-hashes", "--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        return json.loads(done.stdout)
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        return None


def judge(report: dict[str, Any] | None) -> tuple[str, int]:
    """What to say, and the exit status.

    Args:
        report: pip-audit's, as `ask` gives it.
    """
    packages = [] if report is None else report["dependencies"]
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        return "vulnerabilities: not audited, no registry answered", 0
    found = [(package, each) for package in audited for each in package["vulns"]]
    new = [(package, each) for package, each in found if not {each["id"], *each["aliases"]} & set(ACCEPTED)]
    lines = [_line(package, each) for package, each in new]
    lines.append(
        f"vulnerabilities: {len(audited)} of {len(packages)} packages audited, "
        f"{len(new)} open, {len(found) - len(new)} accepted"
    )
    if new:
        lines.append("raise these in pyproject.toml and make lock, or accept them in .ci/audit.py with a reason")
    return "\n".join(lines), 1 if new else 0


def _line(package: dict[str, Any], vulnerability: dict[str, Any]) -> str:
    mended = ", ".join(vulnerability["fix_versions"]) or "none yet"
    return f"{package['name']} {package['version']}: {vulnerability['id']}, mended in {mended}"


if __name__ == "__main__":
    text, status = judge(ask())
    sys.stdout.write(f"{text}\n")
    sys.exit(status)
