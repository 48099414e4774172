"""Erasures by name: in memory, on disk and on the Hub."""
