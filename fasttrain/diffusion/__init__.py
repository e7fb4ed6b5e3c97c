"""The mathematics of diffusion: schedules, targets, weightings, timesteps and the objective that joins them."""

from fasttrain.diffusion import curriculum, log_normal, preconditioning, timestep_weights, window  # noqa: F401  (their registrations)
