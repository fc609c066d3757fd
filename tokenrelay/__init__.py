"""tokenrelay: an inference server whose streams survive the death of any of its processes."""

__version__ = "0.1.0"
