"""Self-attention that leaves out most pairs of tokens: settings, masks, and the kernels that go by them."""
