"""Put the fake CUDA into every process that has this directory on its PYTHONPATH."""

import fake_cuda

fake_cuda.install()
