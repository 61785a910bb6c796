"""Fast implementations of attention and layers, by device."""
