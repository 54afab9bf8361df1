"""Sound: a file to log-mels, which an encoder makes 12.5 tokens a second of.

    medium.py    what the rest of the package asks
    read.py      a file to samples at 16 kHz, within limits and as a stream
    features.py  samples to log-mels, 80 ms a row
    augment.py   what training changes of a recording
    encoder.py   log-mels to vectors of the decoder's width, with CTC over bytes
    maps.py      what the loops do to each moment, for people

The configuration is the section `audio` of a model's: `looptx_core.config.media.AudioConfig`.
"""
