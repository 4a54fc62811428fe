"""What fits into memory, and how long it takes, before it is done."""
