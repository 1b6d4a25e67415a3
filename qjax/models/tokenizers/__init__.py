"""Tokenizers, chat templates and streams of text."""
