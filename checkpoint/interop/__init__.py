"""Foreign formats: rules that map their names and shards to global tensors. Knows no store."""
