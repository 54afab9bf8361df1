"""Media: what a model reads and writes besides text. One folder a medium, one registry line.

Everything outside this package speaks of media by name, through the methods of `Medium` and one
argument, `media: Mapping[str, MediaBatch]`. To add a medium, write a folder with a subclass of
`Medium` and register it in `registry.MEDIA`:

    names            of the medium, its marker in texts, its modules in a model, its files' suffixes
    configuration    `ModelConfig.media[name]`, a section of its own; `enable` gives its defaults
    read, measure    a file or its bytes to a `MediaItem`, within limits
    length, positions, span, groups   how many tokens an item takes, where they stand, who sees whom
    encoder          a module from a `MediaBatch` to vectors of the model's width
    head, losses     an objective of its own on hidden rows, if it has one
    codes, writer    the ids that a model writes it with, and how they become a file, if it can
    inspect, sentences, lines, figures   what people see of it
"""
