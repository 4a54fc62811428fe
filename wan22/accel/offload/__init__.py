"""Where weights are and how they move: on the device, on the way there, at home on the host."""
