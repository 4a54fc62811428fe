"""LoRA files in every dialect, and LoRAs in a transformer."""
