"""Clips: a file to tubelets of two frames, which the encoder of pictures reads.

    medium.py   what the rest of the package asks
    frames.py   a file, or a pipe of pictures, to frames with their times, within limits
    read.py     frames to tubelets, evenly over their time
    maps.py     what the loops do over time, for people

The configuration is the section `video` of a model's: `looptx_core.config.media.VideoConfig`.
"""
