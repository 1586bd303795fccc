"""Doors to other libraries, each imported only by who has the package."""
