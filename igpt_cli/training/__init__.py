"""Training: one task of three, one loop, one run; settings declared once."""
