"""The built-in small base model."""
