"""Checks of the bridge against the frameworks' own operator databases, written outside the project.

This file imports no framework.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
