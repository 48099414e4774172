"""How increments are made."""
