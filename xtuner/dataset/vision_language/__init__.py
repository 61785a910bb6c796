"""Rows with images for the vision-language models that transformers loads."""
