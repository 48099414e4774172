"""A bank in a folder: its manifest, its shards, and how both are read and replaced."""
