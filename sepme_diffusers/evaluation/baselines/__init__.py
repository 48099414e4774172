"""Other erasers, for comparison: one per file, listed in `registry`."""
