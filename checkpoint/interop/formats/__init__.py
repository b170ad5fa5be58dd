"""Readers and writers of other frameworks' checkpoints. They execute nothing, and prove what they read."""
