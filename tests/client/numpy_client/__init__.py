"""The NumPy client as its users see it. Neither torch nor jax is imported here."""
