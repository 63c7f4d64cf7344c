"""CuPy, as far as the bridge uses it: its runtime, faked."""

from fake_cuda import pose_as_host

undo = pose_as_host()
