"""Models as they lie on disk: their folders, shards, and the fingerprints of bases."""
