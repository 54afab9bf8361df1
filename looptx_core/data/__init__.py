"""From raw text to tokens: readers, tokenizer, shards. Import the modules, not this package."""
