from __future__ import annotations

import re

from tests.job_scripts import REPOSITORY


def test_the_tree_has_a_line_for_each_module() -> None:
    listed = set(
        re.findall(r"^ *(?:jobs/|bench/)?([a-z_]+\.py)  ", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    )
    folders = [REPOSITORY / name for name in ("scalenet_ray", "jobs", "bench")]
    modules = {path.name for folder in folders for path in folder.rglob("*.py")} - {"__init__.py"}
    assert listed == modules
