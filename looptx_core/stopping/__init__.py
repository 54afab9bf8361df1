"""When a token stops looping.

`calibration.py` turns the confidence head's output into a probability and nats, `rule.py` has
`Exit`, the one object that decides, and `resolve.py` makes an `Exit` from a request's options.
"""
