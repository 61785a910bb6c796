"""One file a command, thin: ``add_arguments(parser)`` and ``run(args) -> exit status``."""
