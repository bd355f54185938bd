"""How the contributions to a span become one, one file a rule."""
