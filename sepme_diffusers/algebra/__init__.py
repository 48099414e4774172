"""Tensors in, tensors out: null spaces, closed forms, the objective."""
