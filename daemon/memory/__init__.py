"""Pools, regions, files and staging memory."""
