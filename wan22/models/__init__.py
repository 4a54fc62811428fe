"""Single-device model code: the diffusion transformer and the video autoencoder, and nothing above them."""
