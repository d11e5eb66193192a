"""What sd_demo.py stands on: run folders, scorers, labels, a pipeline as a policy, a page."""
