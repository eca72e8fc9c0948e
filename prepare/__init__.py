"""From a release of recordings and films to data/<name>/: one file a step."""
