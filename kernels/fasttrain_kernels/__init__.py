"""Fused operations for training diffusion transformers: each with a readable torch reference and a Triton kernel."""
