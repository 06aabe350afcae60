"""Measuring and looking inside: python -m lab.NAME. Nothing imports it."""
