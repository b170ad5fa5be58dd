"""Where bytes live: keys and values. Knows nothing of tensors, manifests or steps."""
