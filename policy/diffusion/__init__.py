"""The diffusion process: noise schedule, coefficient tables of the solvers, DDIM, and the settings of a sampler."""
