"""What the bytes of a checkpoint mean. Pure: knows no store, no clock, no torch."""
