"""Generation: `Engine.generate` yields one record for each token. Start with `engine.py`."""
