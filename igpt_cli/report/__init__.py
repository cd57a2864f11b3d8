"""Figures, comparisons and HTML reports."""
