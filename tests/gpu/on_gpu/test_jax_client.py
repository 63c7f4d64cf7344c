"""The tests of `jax_client/cases.py`, run once in a process without torch, and told here one by
one."""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import ROOT
from tests.gpu.on_gpu.machine import TORCH, without

_LIMIT_S = 240  # of all cases together

pytestmark = pytest.mark.gpu(limit_s=_LIMIT_S + 30)

_CASES = Path(__file__).parent / "jax_client" / "cases.py"


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[ElementTree.Element]]:
    """What became of each case, by its name: a list, since some have parameters."""
    report = tmp_path_factory.mktemp("jax_client") / "report.xml"
    command = [sys.executable, "-m", "pytest", str(_CASES), "--gpu", "-q"]
    variables = (
        os.environ | without(*TORCH) | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    )
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", f"--junit-xml={report}"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        timeout=_LIMIT_S,
    )
    assert report.exists(), done.stdout.decode() + done.stderr.decode()
    found: dict[str, list[ElementTree.Element]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found.setdefault(case.attrib["name"].partition("[")[0], []).append(case)
    assert found, done.stdout.decode()
    return found


@pytest.mark.parametrize(
    "name", re.findall(r"^def (test_\w+)", _CASES.read_text(), re.MULTILINE)
)
def test_case(name: str, results: dict[str, list[ElementTree.Element]]) -> None:
    """As it was found there."""
    failed = [
        part.text
        for case in results[name]
        for part in case
        if part.tag in ("failure", "error")
    ]
    assert not failed, "\n\n".join(map(str, failed))
    if all(case.find("skipped") is not None for case in results[name]):
        pytest.skip("skipped there")
