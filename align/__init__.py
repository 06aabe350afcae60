"""Stage 1: the encoder is aligned with captions. python -m align config/align.py"""
