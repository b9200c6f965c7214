"""The diffusion policy: its configuration, encoders, denoisers and normalisers."""
