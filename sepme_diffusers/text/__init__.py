"""What is to be erased, in prompts; and prompts as embeddings."""
