"""Check the installation and suggest fixes."""
