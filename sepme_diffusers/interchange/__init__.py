"""Banks in other tools' formats, and other erasers' files as banks."""
