"""Looks at what training does: conflict between timesteps, Pareto weights, and the loss landscape."""
