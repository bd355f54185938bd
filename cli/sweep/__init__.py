"""`hivegrpo sweep`: a grid of settings, its runs as processes, what they measure, and the report."""
