"""The torch runtime, in a worker without jax and in this process."""
