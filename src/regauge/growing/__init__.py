"""Growth in width: which index sets can be made larger, how the model is rebuilt, and what fills it."""
