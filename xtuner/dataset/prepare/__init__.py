"""From raw rows to packed Arrow datasets."""
