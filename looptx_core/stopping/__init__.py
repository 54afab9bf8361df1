"""When a token stops looping.

`calibration.py` turns the confidence head's output into a probability and nats, `rule.py` is the
one rule object that everything asks, `resolve.py` makes one from a request's options.
"""
