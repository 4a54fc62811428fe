"""What `wan22.accel.quantize` is made of: the layers, and what they cost."""
