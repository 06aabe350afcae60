"""Other people's weights: from their files to a config and tensors under our names."""
