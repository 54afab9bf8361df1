"""Runs over several processes, memories and disks: what fits, and Lightning's strategies."""
