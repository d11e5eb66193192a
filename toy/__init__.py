"""The 2D world: everything that d3po.py does, where the right answer can be computed."""
