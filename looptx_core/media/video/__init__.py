"""Clips: a file to tubelets of two frames, which the encoder of pictures reads.

    medium.py   what the rest of the package asks
    read.py     a file to frames by their time, within limits, and these to tubelets
    maps.py     what the loops do over time, for people

The configuration is the section `video` of a model's: `looptx_core.config.media.VideoConfig`.
"""
