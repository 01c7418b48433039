"""Models on disk: read, walk, write and check them block by block."""
