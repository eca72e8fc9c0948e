"""What is not about brains at all: readers, files, videos, options, experiments, pictures."""
