"""Commands on a config before its run: what it needs, a rehearsal, proofs."""
