"""The mathematics of diffusion: schedules, targets, weightings, timesteps and the objective that joins them."""
