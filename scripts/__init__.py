"""Commands run by hand, each a module: `python -m scripts.kill --help`."""
