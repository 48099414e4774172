"""Other erasers, for comparison."""
