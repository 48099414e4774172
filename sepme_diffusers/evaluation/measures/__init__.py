"""What is measured on pictures: one measure per file, listed in `registry`."""
