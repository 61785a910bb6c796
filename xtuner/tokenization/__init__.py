"""Text to token ids: chat templates, messages, segments."""
