"""Conversions: one checkpoint into another layout, type or format, streamed, resumable, and proved."""
