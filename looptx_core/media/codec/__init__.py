"""Codecs: what is drawn or spoken as codes, which are ordinary tokens of a model."""
