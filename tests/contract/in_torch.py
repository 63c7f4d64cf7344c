"""The models of the runtimes' contract in torch; runs in .venv-torch."""

import torch

from tests.contract.models import MODELS

globals().update({name: make(torch) for name, make in MODELS.items()})
