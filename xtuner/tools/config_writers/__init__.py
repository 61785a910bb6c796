"""What writes or changes the text of a config for ``copy-cfg`` and ``check-custom-dataset``."""
