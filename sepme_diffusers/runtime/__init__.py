"""Pipelines on which any subset of a bank can be erased."""
