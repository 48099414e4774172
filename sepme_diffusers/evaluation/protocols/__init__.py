"""What is drawn and compared, and in which order."""
