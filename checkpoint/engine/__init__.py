"""How state moves: planned, captured into the arena, packed, committed, and read back."""
