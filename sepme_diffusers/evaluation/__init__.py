"""What an erasure did: pictures from fixed seeds, accuracies, changes, reports."""
