"""The worker's models: `sample` runs any operator's sample by name; `m_...` are modules.

Never imports jax.
"""

import functools
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor, nn

from exact.cases import Entry, parse_entry
from exact.subjects import subject
from exact.torch_db import Subject

_MODULE = re.compile(r"m_(\w+)_(float\d+|complex\d+)_(train|eval)_(\d+)")


def sample(*tensors: Tensor, entry: str) -> Any:
    """Call an operator's sample, such as `op/sin/float32/plain/0`, on the given tensors."""
    return _subject(entry).target(*tensors)


def __getattr__(name: str) -> nn.Module:
    described = _MODULE.fullmatch(name)
    if described is None:
        raise AttributeError(name)
    module, dtype, kind, index = described.groups()
    target = subject(Entry("module", module, dtype, kind), int(index)).target
    assert isinstance(target, nn.Module)
    return target


@functools.lru_cache(maxsize=4)
def _subject(text: str) -> Subject:
    # In another thread: under tracing, this thread would create and cache a sample of fake tensors.
    entry, index = text.rsplit("/", 1)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(subject, parse_entry(entry), int(index)).result()
