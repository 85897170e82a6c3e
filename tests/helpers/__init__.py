"""What tests share and is no test: `helpers`, because pyproject.toml puts `tests/` on pytest's path."""
