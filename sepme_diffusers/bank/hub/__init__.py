"""A bank on the Hugging Face Hub."""
