"""Original Qwen for today's transformers: the four files that travel with every export.

Each is self-contained as remote code (it imports torch, transformers, tiktoken and its siblings
only); this file stays behind. Importing the package loads nothing: pick the module you need.
"""
