"""Networks: one file an architecture, in torch alone."""
