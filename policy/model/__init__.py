"""The networks: a diffusion policy, its encoders, denoisers and normalisers."""
