"""Residual, HC and mHC in models that are no Transformer decoders; each file is an example."""
