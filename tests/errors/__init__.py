"""A corpus of seeded mistakes: one Markdown file a mistake, each an edit of a file in ``base``."""
