"""``python -m xtuner``: the same as the ``xtuner`` command; torchrun starts its ranks this way."""

from xtuner import cli

if __name__ == "__main__":
    cli()
