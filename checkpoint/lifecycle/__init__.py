"""How checkpoints age: which are kept, which go, and whether they still say what was written."""
