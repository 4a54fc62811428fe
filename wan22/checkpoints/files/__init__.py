"""Containers of weights: safetensors, .pth, GGUF, folders of shards; and access to the hub."""
