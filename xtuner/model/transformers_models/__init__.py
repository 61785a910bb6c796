"""Import paths of v0.1 for mixture-of-experts models; the classes are transformers' own."""
