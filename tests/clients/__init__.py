"""Clients that people use, against the whole service."""
