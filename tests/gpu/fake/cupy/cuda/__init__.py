"""CuPy's bindings of CUDA."""

import fake_cuda as runtime

__all__ = ["runtime"]
