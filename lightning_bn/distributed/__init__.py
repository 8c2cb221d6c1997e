"""What ranks do together: merge moments, agree on numbers."""
