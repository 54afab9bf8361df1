"""Images: a file to a grid of patches, which an encoder with RoPE by row and column reads.

    medium.py   what the rest of the package asks
    read.py     a file to patches, within limits
    encoder.py  patches to vectors of the decoder's width
    masked.py   hidden patches drawn back, the medium's own objective
    maps.py     what the loops do to each patch, for people

The configuration is flat in config.json: `vision_layers`, `vision_width`, `patch_size`,
`max_patches`, `image_token`, `image_attention` and `reconstruct` of `ModelConfig`.
"""
