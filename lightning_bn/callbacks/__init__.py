"""One file a callback: when to act, and one call into the rooms below."""
