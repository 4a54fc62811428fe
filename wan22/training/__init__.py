"""Training of LoRAs and small models: data, objective, loop, and the files that result."""
