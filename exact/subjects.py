"""Entries of all databases for calls from JAX, as functions of flat tensors.

Imports torch, never jax.
"""

from typing import Any

import torch
from torch import Tensor

from exact import graphs
from exact.cases import Entry
from exact.torch_db import Subject, batch_of_sample, samples, subject_of_sample


def count(entry: Entry) -> int:
    """Return the number of an entry's samples."""
    return 1 if entry.database == "graph" else len(samples(entry))


def subject(entry: Entry, index: int) -> Subject:
    """Return a sample as a function and its inputs.

    Raises:
      Unusable: an input is not a strided tensor.
    """
    if entry.database != "graph":
        return subject_of_sample(entry, index)
    graph = graphs.graph_of(entry)
    inputs = list(map(torch.from_numpy, graph.inputs(entry.seed)))
    return Subject(graph.function(), inputs, range(len(inputs)), graph.needs_key)


def batch(entry: Entry, index: int) -> list[Tensor]:
    """Return the sample's inputs, each stacked with another value of its type or with itself."""
    if entry.database != "graph":
        return batch_of_sample(entry, index)
    graph = graphs.graph_of(entry)
    rows: list[list[Any]] = [graph.inputs(entry.seed + i) for i in range(2)]
    return [
        torch.stack([torch.from_numpy(row[i]) for row in rows])
        for i in range(len(graph.shapes))
    ]
