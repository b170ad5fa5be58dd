"""Keepers among each other: what they hold is read by peers, and protected by parity in peers' memory."""
