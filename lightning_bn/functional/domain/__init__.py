"""Statistics of several domains or feature levels."""
