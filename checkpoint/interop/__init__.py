"""Foreign formats: readers, writers, and rules that map their names and shards to global tensors."""
