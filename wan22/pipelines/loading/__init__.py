"""Where a pipeline comes from: find a checkpoint, outline it without weights, load it, set it up."""
