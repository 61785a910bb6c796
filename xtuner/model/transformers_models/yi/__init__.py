"""Yi, under the type that its first folders (2023) had."""
