"""Whether all that igpt needs is here and works, and what to do about what does not."""
