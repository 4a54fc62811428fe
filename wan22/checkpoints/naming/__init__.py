"""Names of tensors in every dialect, and the configurations that names and shapes tell."""
