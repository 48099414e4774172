"""A preview: what erasing each concept of a bank does on a user's own model, with no judge needed."""
