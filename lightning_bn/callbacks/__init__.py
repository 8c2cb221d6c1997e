"""Lightning callbacks, one per file: each decides when to act, and calls functions of the other folders."""
