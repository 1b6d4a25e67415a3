"""Stored quantised models: our artifact, and the matrices of other projects."""
