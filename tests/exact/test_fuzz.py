"""Random programs that compose operators, in processes that may crash."""

from pathlib import Path

import pytest

from exact import fuzz, graphs

# XLA compiles a dozen programs for each of JAX's.
PROGRAMS = {
    "inproc": 15,
    "torch-client": 4,
}


@pytest.mark.parametrize("way", PROGRAMS)
def test_random_programs_are_right(way: str, tmp_path: Path) -> None:
    """Value, gradient, jvp, batch and second derivative of random programs are the framework's,
    up to rounding."""
    findings = fuzz.run(way, PROGRAMS[way], 1, log=tmp_path)
    assert findings.faults == []
    assert findings.counts["right"] > 3 * PROGRAMS[way]


def test_a_program_follows_from_its_seed_and_number() -> None:
    """A failure is printed with the seed and the number that give the same program again."""
    for framework in ("torch", "jax"):
        sources = [
            graphs.graph.__wrapped__(framework, 3, number).source
            for number in range(50)
        ]
        assert sources == [
            graphs.graph.__wrapped__(framework, 3, number).source
            for number in range(50)
        ]
        assert len(set(sources)) == 50


def test_every_rule_can_be_drawn() -> None:
    """Each statement of the tables appears in some program."""
    for framework, rules in graphs._RULES.items():
        drawn = "\n".join(
            graphs.graph.__wrapped__(framework, 0, number).source
            for number in range(3000)
        )
        for rule in rules:
            fixed = max(
                rule.text.replace("{out}", "{")
                .replace("{a}", "{")
                .replace("{b}", "{")
                .split("{"),
                key=len,
            )
            assert fixed.strip().split("\n")[0] in drawn, rule.text
