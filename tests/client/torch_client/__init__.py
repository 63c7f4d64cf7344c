"""RemoteJaxFunction as its users see it.

Also holds the models it is tested with, which never import torch.
"""
