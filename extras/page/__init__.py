"""The page beside the paper, docs/reading.html: what the docstrings say, the code, and the shapes of its lines."""
