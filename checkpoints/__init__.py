"""A model on disk as a sequence of blocks: read, walk, write, fingerprint, N:M masks."""
