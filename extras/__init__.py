"""What a first reader does not need: captions, checks, figures, the study with people."""
