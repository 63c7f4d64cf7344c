"""The bridge against the frameworks' own operator databases: cases that nobody in this project
wrote."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
