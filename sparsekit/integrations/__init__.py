"""Bridges to other packages and to their files."""
