"""`bridge_client check-gradients`: right and wrong derivatives, what it prints, and how it ends."""

import random
import re
from collections.abc import Iterator

import pytest

from bridge_client.cli import main
from bridge_client.commands import gradients, numbers
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import SpecError
from bridge_wire.specs import Spec
from tests.workers import Worker, models, run_program, serving

_HOSTED = ("square", "affine", "wrong_vjp", "wrong_jvp", "raises_at_trace")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker with x64 that hosts right and wrong models, and was told what some of them take."""
    directory = tmp_path_factory.mktemp("gradients")
    warm = [
        "--warmup=affine=float32[4,3]",
        "--warmup=square=float64[2,3]",
        "--warmup=square=bfloat16[5]",
    ]
    listen = f"--listen=unix:{directory}/worker.sock"
    with serving(directory, listen, "--x64", *models(*_HOSTED), *warm) as worker:
        yield worker


Checked = tuple[int, list[list[str]], str]


@pytest.fixture
def check(worker: Worker, capsys: pytest.CaptureFixture[str]):
    """Checks, and returns the status, the words of each line of stdout, and stderr."""

    def check(*args: str) -> Checked:
        status = main(["check-gradients", worker.address, *args])
        printed = capsys.readouterr()
        return (
            status,
            [line.split() for line in printed.out.splitlines() if line],
            printed.err,
        )

    return check


def test_right_derivatives_agree(check) -> None:
    """Of the types that the worker was told of, every model's derivatives agree: parameters'
    too; status 0."""
    status, lines, errors = check()
    assert (status, errors) == (0, "")
    heads = [line for line in lines if "(" in line[0]]
    assert heads == [
        ["square(float64[2,3])"],
        ["square(bfloat16[5])"],
        ["affine(float32[4,3])"],
    ]
    rows = [line for line in lines if line[-1] == "ok"]
    assert [row[:2] for row in rows] == [
        ["result", name] for name in ("x", "x", "bias", "weight", "x")
    ]
    for row in rows[:1] + rows[2:]:
        vjp, jvp, difference = map(float, row[2:5])
        assert vjp == pytest.approx(jvp, rel=1e-4) and vjp == pytest.approx(
            difference, rel=1e-2
        )
    assert lines[-1] == ["all", "5", "derivatives", "agree"]


@pytest.mark.parametrize("types", ["float64[3],float64[3]", "float32[3],float32[3]"])
def test_a_wrong_vjp_is_a_mismatch(check, types: str) -> None:
    """A custom_vjp with a wrong rule for one input is found, and that input is named; status 1."""
    status, lines, _ = check("--model", "wrong_vjp", "--input", types)
    assert status == 1
    assert [(line[1], line[3], line[-1]) for line in lines[2:4]] == [
        ("x", "none", "MISMATCH"),
        ("y", "none", "ok"),
    ]
    assert lines[-1] == ["1", "of", "2", "derivatives", "differ"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_wrong_jvp_is_a_mismatch(check, dtype: str) -> None:
    """Where VJP and JVP are wrong alike, the differences show it, in any type."""
    status, lines, _ = check("--model", "wrong_jvp", "--input", f"{dtype}[4,2]")
    assert status == 1
    _, _, vjp, jvp, difference, verdict = lines[2]
    assert verdict == "MISMATCH"
    assert float(vjp) == pytest.approx(float(jvp), rel=0.1) and float(
        vjp
    ) == pytest.approx(float(difference) / 2, 0.2)


def test_arguments_are_reproducible(check) -> None:
    """The same seed gives the same numbers, another one others; --range says where the numbers
    lie."""
    first, second, third, far = (
        check("--model", "square", "--input", "float64[3]", *extra)[1][2]
        for extra in ((), (), ("--seed", "1"), ("--range", "100", "101"))
    )
    assert first == second != third
    assert abs(float(far[2])) > 100 > abs(float(first[2]))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["--input", "float[3"],
            "'float[3' is no list of specs; write it like float32[8,64],int32[8]",
        ),
        (["--input", "float32[3]", "--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_a_misspelt_command_is_misuse(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be read ends with status 2 before anybody is called."""
    with pytest.raises(SystemExit) as ended:
        main(["check-gradients", "unix:/nowhere", *args])
    assert ended.value.code == 2
    assert said.lower() in capsys.readouterr().err.lower()


def test_unknown_arguments_are_misuse(check) -> None:
    """A model that nobody told the arguments of needs --input: status 2."""
    status, lines, errors = check("--model", "wrong_vjp")
    assert (status, lines) == (2, [])
    assert "--input" in errors and "--warmup" in errors


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "cube", "--input", "float32[3]"], "hosts no model 'cube'"),
        (["--input", "float32[3]"], "pick one with"),
        (["--model", "square", "--input", "int32[3]"], "takes or returns no floats"),
        (["--model", "square", "--input", "float8_e5m2[3]"], "too few digits"),
        (
            ["--model", "square", "--input", "float32[10000000000]"],
            "20000000000 numbers",
        ),
        (
            ["--model", "square", "--input", "float16[3]", "--range", "1e5", "1e6"],
            "does not fit in float16[3]",
        ),
        (
            ["--model", "square", "--input", "float32[3],float32[3]"],
            "takes 1 positional argument",
        ),
        (
            ["--model", "raises_at_trace", "--input", "float32[3]"],
            "dislikes every input",
        ),
    ],
)
def test_what_cannot_be_checked_is_a_failure(check, args: list[str], said: str) -> None:
    """A model that is not there, raises, or has no derivative: status 1, and why on stderr."""
    status, lines, errors = check(*args)
    assert (status, lines) == (1, [])
    assert said in errors


def test_the_command_needs_no_framework(worker: Worker) -> None:
    """It computes with NumPy, and imports neither torch nor jax."""
    done = run_program(
        """
        import sys
        from bridge_client.cli import main
        status = main(["check-gradients", sys.argv[1]])
        print({"torch", "jax"} & set(sys.modules), status)
        """,
        worker.address,
    )
    assert done.stdout.splitlines()[-1] == "set() 0", done.stderr


def test_without_numpy_a_sentence_says_how_to_install_it(worker: Worker) -> None:
    """Where NumPy is not installed the command ends with status 1, and names the extra."""
    done = run_program(
        """
        import sys
        sys.modules["numpy"] = None
        from bridge_client.cli import main
        print(main(["check-gradients", sys.argv[1]]))
        """,
        worker.address,
    )
    assert done.stdout == "1\n"
    assert 'pip install "torch-jax-bridge[numpy]"' in done.stderr, done.stderr


def test_describe_shows_what_was_compiled_for(
    worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    """`bridge_client describe` shows the arguments that the worker was told of."""
    assert main(["describe", worker.address]) == 0
    shown = capsys.readouterr().out
    compiled = "  compiled for (float64[2,3])\n  compiled for (bfloat16[5])\n"
    assert re.search(r"(?m)^square\(x\)\n(    .*\n)*" + re.escape(compiled), shown), (
        shown
    )


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name in BY_NAME if not name.startswith("float8")]
)
def test_numbers_of_every_type_come_back(name: str) -> None:
    """Numbers that a type holds are the same after packing and unpacking, and take the bytes
    that the type says."""
    spec = Spec(BY_NAME[name], (2, 3))
    values = [float(i % 2) for i in range(numbers.size_of(spec))]
    packed = numbers.pack(spec, values)
    assert len(packed) == spec.nbytes
    assert numbers.unpack(spec, packed) == values


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    """Numbers between two of bfloat16 go to the nearer one, ties to the even one, as in torch."""
    torch = pytest.importorskip("torch")
    chance = random.Random(0)
    values = [chance.uniform(-3, 3) for _ in range(500)] + [
        1 + 2**-8,
        1 + 3 * 2**-8,
        -0.0,
        float("inf"),
    ]
    spec = Spec(BY_NAME["bfloat16"], (len(values),))
    expected = torch.tensor(values, dtype=torch.float32).bfloat16().tolist()
    assert numbers.unpack(spec, numbers.pack(spec, values)) == expected


def test_types_without_letters_are_refused() -> None:
    """float8 arrays are neither made nor differentiated."""
    spec = Spec(BY_NAME["float8_e5m2"], (2,))
    with pytest.raises(SpecError, match="no Python equivalent"):
        numbers.pack(spec, [1.0, 2.0])
    with pytest.raises(SpecError, match="too few digits"):
        gradients.epsilon_of(spec)
