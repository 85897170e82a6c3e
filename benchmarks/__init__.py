"""Measurements; README.md has their tables and the commands behind them."""
