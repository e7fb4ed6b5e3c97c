"""Weights that come from elsewhere or go elsewhere: other runs, other layouts of names, diffusers' folders."""
