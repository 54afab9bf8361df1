"""From one kind of model folder to another: ternary, transformers', other number types."""
