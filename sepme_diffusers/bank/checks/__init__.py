"""Whether a bank is what it says."""
