"""Tokenizers of the families whose hub folders bring tokenizer code of their own."""
