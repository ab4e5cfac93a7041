"""Blocks -> model: what run_clm.py calls, and `python -m clm` for what surrounds a run."""
