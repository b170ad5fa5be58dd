"""Checkpoints that other frameworks made, and the scripts that make them."""
