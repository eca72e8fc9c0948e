"""The page beside the paper, docs/reading.html: docstrings, code, and the shapes of its lines."""
