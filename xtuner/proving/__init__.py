"""Trying a config on a shrunk model of its class: proofs of its computation, a rehearsal."""
