"""Networks; no training code."""
