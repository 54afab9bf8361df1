"""The model folder: written whole or not at all, read without ever running what it holds."""
