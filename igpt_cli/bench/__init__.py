"""Measuring: one small file for each thing measured."""
