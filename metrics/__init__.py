"""Frames in, numbers out: one file a family of metrics."""
