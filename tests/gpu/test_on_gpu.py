"""The tests that need a GPU, as far as they can be checked without one."""

import ast
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, python_of
from tests.gpu.on_gpu import machine
from tests.gpu.on_gpu.conftest import WAIT_S

ON_GPU = ROOT / "tests" / "gpu" / "on_gpu"
FILES = sorted(ON_GPU.rglob("*.py"))


def test_processes_keep_the_callers_import_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The packages of a bare machine lie in a folder that PYTHONPATH names: one function alone
    sets it, and appends."""
    monkeypatch.setenv("PYTHONPATH", "/wheels")
    assert machine.without("torch")["PYTHONPATH"].endswith(":/wheels")
    setting = [path.name for path in FILES if '"PYTHONPATH":' in path.read_text()]
    assert setting == ["machine.py"]


def test_no_subprocess_outlives_its_test() -> None:
    """A subprocess is ended by its timeout, with its output, before the alarm ends the whole
    run."""
    for path in FILES:
        module = ast.parse(path.read_text())
        of_module = [
            _limit_in(node) for node in module.body if isinstance(node, ast.Assign)
        ]
        for function in (
            node for node in module.body if isinstance(node, ast.FunctionDef)
        ):
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            runs = [
                call for call in calls if ast.unparse(call.func) == "subprocess.run"
            ]
            timeouts = [
                _constant(module, word.value)
                for call in runs
                for word in call.keywords
                if word.arg == "timeout"
            ]
            assert len(timeouts) == len(runs), (
                f"{path.name}, {function.name}: subprocess.run without a timeout"
            )
            marks = [_limit_in(decorator) for decorator in function.decorator_list]
            limit = max([WAIT_S, *of_module, *marks])
            assert all(timeout < limit for timeout in timeouts), (
                f"{path.name}, {function.name}: add limit_s to its mark"
            )


def _limit_in(node: ast.AST) -> int:
    """Return the largest sum of numbers given as `limit_s`; names count as nothing less than
    240."""
    found = [
        word.value
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
        for word in call.keywords
        if word.arg == "limit_s"
    ]
    return max(
        (int(eval(ast.unparse(value), {"_LIMIT_S": 240})) for value in found), default=0
    )


def _constant(module: ast.Module, value: ast.expr) -> float:
    names = {
        node.targets[0].id: node.value.value
        for node in module.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    return float(eval(ast.unparse(value), names))


_STUCK = """
import threading


def test_stuck():
    threading.Lock().acquire() and threading.Event().wait()
"""


def test_a_test_that_waits_forever_ends_the_run_with_its_stacks(tmp_path: Path) -> None:
    """After WAIT_S seconds by default, and not after ten minutes of a borrowed machine's
    fifteen."""
    assert WAIT_S == 45
    (tmp_path / "test_stuck.py").write_text(_STUCK)
    (tmp_path / "conftest.py").write_text(
        "from tests.conftest import pytest_configure\n"
        "from tests.gpu.on_gpu import conftest\n"
        "from tests.gpu.on_gpu.conftest import pytest_runtest_protocol\n"
        "conftest.WAIT_S = 1\n"
        "def pytest_addoption(parser):\n"
        "    parser.addoption('--gpu', action='store_true')\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--gpu",
        "-p",
        "no:cacheprovider",
        f"--rootdir={tmp_path}",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGALRM
    assert "test_stuck.py" in done.stderr and "in test_stuck" in done.stderr


def test_the_case_with_a_broken_worker_ends_without_its_stream() -> None:
    """It reports inside the `with`, and leaves by os._exit: the session would wait for a stream
    that stands still."""
    source = (ON_GPU / "jax_client" / "cases.py").read_text()
    program = source.split('_BREAKING = """')[1].split('"""')[0]
    block = ast.parse(program).body[-1]
    assert isinstance(block, ast.With)
    last = [ast.unparse(statement) for statement in block.body[-3:]]
    assert last == [
        "print('right', flush=True)",
        "session._host.close()",
        "os._exit(0)",
    ]


def test_the_demos_model_multiplies_in_full_precision() -> None:
    """XLA's default on recent GPUs is TF32, which would fail the demo's comparison with torch."""
    program = (
        "import jax, jax.numpy as jnp, digits_head as head\n"
        "module, variables = head.model\n"
        "print(jax.jit(module.apply).lower(variables, jnp.zeros((1, head.FEATURES))).as_text())\n"
    )
    done = subprocess.run(
        [python_of(".venv-jax"), "-c", program],
        cwd=ROOT / "examples",
        capture_output=True,
        text=True,
        timeout=120,
    )
    products = [line for line in done.stdout.splitlines() if "dot_general" in line]
    assert len(products) == 2 and all(
        "precision = [HIGHEST, HIGHEST]" in line for line in products
    ), done.stderr
