"""Everything that reads, writes, merges or verifies a Hugging Face model folder."""
