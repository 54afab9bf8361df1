"""From one kind of model folder to another: ternary weights, Hugging Face's format, number types."""
