"""Names of tensors in every dialect, and the configurations that follow from names and shapes."""
