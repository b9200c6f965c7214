"""The diffusion process: its schedule, the DDIM steps, and the settings of a sampler."""
