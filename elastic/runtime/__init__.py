"""Acts: starts processes, forms worlds, carries events in and instructions out."""
